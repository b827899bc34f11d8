"""Index vectors on devices: made once, plain, never where a capture would record the copy."""

import functools
import threading

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from videoswin_kernels.ops import _vectors
from videoswin_kernels.ops._vectors import (
    attention_vectors,
    merge_vector,
    shift_vector,
    warm,
    window_vectors,
)

CPU = torch.device("cpu")
WINDOW, SHIFT = (2, 3, 3), (1, 1, 1)


@pytest.fixture(autouse=True)
def nothing_held(monkeypatch):
    monkeypatch.setattr(_vectors, "_held", {})


def test_what_is_made_under_any_mode_is_plain():
    with FakeTensorMode(), torch.inference_mode(), torch.device("meta"):
        vectors = window_vectors("window_attention", (3, 5, 4), WINDOW, SHIFT, CPU)
        others = (
            shift_vector("cyclic_shift", (3, 5, 4), SHIFT, CPU),
            merge_vector("x", (1, 3, 3), CPU),
        )
    for vector in (*vectors[:6], *others):
        assert type(vector) is torch.Tensor
        assert vector.dtype == torch.int32
        assert vector.device == CPU
        assert not vector.is_inference()


def test_each_geometry_is_made_once_and_none_is_taken_for_another():
    first = window_vectors("a", (3, 5, 4), WINDOW, SHIFT, CPU)
    assert window_vectors("b", [3, 5, 4], list(WINDOW), list(SHIFT), CPU) is first
    for other in (((3, 4, 5), WINDOW, SHIFT), ((3, 5, 4), (2, 3, 2), SHIFT)):
        assert window_vectors("a", *other, CPU) is not first
    unshifted = window_vectors("a", (3, 5, 4), WINDOW, (0, 0, 0), CPU)
    assert not torch.equal(unshifted.source, first.source)
    # Rolls that differ by whole turns are one.
    assert shift_vector("a", (3, 5, 4), (4, -5, 4), CPU) is shift_vector(
        "a", (3, 5, 4), (1, 0, 0), CPU
    )


def test_attention_has_the_depth_innermost_and_says_where_its_window_is_canonical():
    grid, window, shift = (8, 9, 7), (8, 7, 7), (4, 3, 3)
    rows = window_vectors("a", grid, window, shift, CPU).source.view(2, 8, 49)
    vectors = attention_vectors("a", grid, window, shift, CPU)
    assert torch.equal(vectors.source.view(2, 49, 8), rows.transpose(1, 2))
    assert vectors.code.view(49, 8)[:, 1].sub(vectors.code.view(49, 8)[:, 0]).eq(169).all()
    depths = {
        ((8, 9, 7), (8, 7, 7)): 8,
        ((8, 7, 7), (16, 7, 7)): 8,
        ((17, 7, 7), (16, 7, 7)): 16,
        # Too shallow, clamped in the width, of another table, of another size.
        ((7, 7, 7), (8, 7, 7)): 0,
        ((8, 7, 6), (8, 7, 7)): 0,
        ((8, 7, 7), (8, 7, 9)): 0,
        ((8, 7, 9), (8, 7, 9)): 0,
        ((2, 2, 2), (2, 2, 2)): 0,
    }
    for (grid, window), depth in depths.items():
        found = attention_vectors("a", grid, window, (0, 0, 0), CPU)
        assert found.canonical_depth == depth, (grid, window)


def test_a_bad_geometry_is_refused_as_everywhere():
    with pytest.raises(ValueError, match="shift must be below window"):
        window_vectors("window_attention", (3, 5, 4), WINDOW, (2, 0, 0), CPU)


def test_threads_share_what_the_first_to_finish_made():
    found, start = [], threading.Barrier(4)

    def look():
        start.wait()
        found.append(window_vectors("a", (5, 9, 9), WINDOW, SHIFT, CPU))

    threads = [threading.Thread(target=look) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(each is found[0] for each in found)


def held_bytes():
    """What is held of the CPU, without what the tensors themselves take."""
    each = [found for key, found in _vectors._held.items() if key[-1] == CPU]
    tensors = [t for found in each for t in ([found] if torch.is_tensor(found) else found[:6])]
    return sum(t.nbytes for t in tensors)


def values(found):
    """What was looked up, as lists and numbers."""
    each = (found,) if torch.is_tensor(found) else found
    return [one.tolist() if torch.is_tensor(one) else one for one in each]


def test_of_the_cpu_the_newest_are_held_up_to_a_bound(monkeypatch):
    calls = []
    for height in range(3, 40):
        grid = (2, height, 5)
        calls.append(functools.partial(window_vectors, "a", grid, WINDOW, SHIFT, CPU))
        calls.append(functools.partial(shift_vector, "a", grid, SHIFT, CPU))
        calls.append(functools.partial(merge_vector, "a", grid, CPU))
    everything = [call() for call in calls]
    assert all(call() is found for call, found in zip(calls, everything, strict=True))
    bound = 50_000
    assert held_bytes() > bound
    _vectors._held.clear()
    monkeypatch.setattr(_vectors, "CPU_BYTES", bound)
    for _ in range(2):
        found = []
        for call, expected in zip(calls, everything, strict=True):
            found.append(call())
            assert values(found[-1]) == values(expected)
            assert held_bytes() <= bound
            # The last two are still held, each as it was made.
            assert all(c() is f for c, f in zip(calls[: len(found)][-2:], found[-2:], strict=True))
    assert len(_vectors._held) > 2


def test_the_newest_is_held_whatever_its_size(monkeypatch):
    monkeypatch.setattr(_vectors, "CPU_BYTES", 1)
    for grid in ((3, 5, 4), (3, 5, 5)):
        found = window_vectors("a", grid, WINDOW, SHIFT, CPU)
        assert window_vectors("a", grid, WINDOW, SHIFT, CPU) is found
        assert len(_vectors._held) == 1


def test_vectors_of_a_few_tokens_count_as_the_tensors_that_they_are(monkeypatch):
    monkeypatch.setattr(_vectors, "CPU_BYTES", 50_000)
    for depth in range(1, 101):
        window_vectors("a", (1, 1, 1), (depth, 1, 1), (0, 0, 0), CPU)
    assert 5 < len(_vectors._held) < 20


def test_threads_may_drop_the_same(monkeypatch):
    class Raced(dict):
        """Another thread drops what this one has just seen."""

        def copy(self):
            seen = dict(self)
            if len(seen) > 1:
                self.pop(next(iter(seen)))
            return seen

    monkeypatch.setattr(_vectors, "CPU_BYTES", 1)
    monkeypatch.setattr(_vectors, "_held", Raced())
    for height in range(1, 5):
        found = shift_vector("a", (2, height, 5), (1, 0, 0), CPU)
        assert found.sort().values.tolist() == list(range(10 * height))
        assert len(_vectors._held) == 1


@pytest.fixture
def gpu(monkeypatch):
    """A machine that says it has one GPU, whose tensors stay on the CPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(_vectors, "_copied", lambda vector, device: torch.tensor(vector))
    return torch.device("cuda", 0)


def test_a_capture_is_refused_what_is_not_there_yet(gpu, monkeypatch):
    arguments = ("window_attention", (3, 5, 4), WINDOW, SHIFT)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    sentence = (
        r"^window_attention: the geometry of grid \(3, 5, 4\) is not on cuda:0 yet; "
        r"run once before capturing$"
    )
    with pytest.raises(RuntimeError, match=sentence):
        window_vectors(*arguments, gpu)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    made = window_vectors(*arguments, gpu)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert window_vectors(*arguments, gpu) is made


def test_vectors_of_other_devices_are_never_dropped(gpu, monkeypatch):
    monkeypatch.setattr(_vectors, "CPU_BYTES", 1)
    kept = {}
    for device in (gpu, torch.device("meta")):
        for height in range(3, 20):
            grid = (2, height, 5)
            kept[device, grid] = window_vectors("a", grid, WINDOW, SHIFT, device)
            window_vectors("a", grid, WINDOW, SHIFT, CPU)
    for (device, grid), found in kept.items():
        assert window_vectors("a", grid, WINDOW, SHIFT, device) is found
    assert [key[-1] for key in _vectors._held].count(CPU) == 1


def test_a_fake_kernel_warms_a_gpu_that_is_there_for_sizes_that_are_known(gpu):
    axes = ((3, 5, 4), WINDOW, SHIFT)
    for device in (CPU, torch.device("meta"), torch.device("cuda", 1)):
        warm(window_vectors, "window_attention", *axes, device=device)
    warm(window_vectors, "window_attention", (3, 5, object()), *axes[1:], device=gpu)
    assert not _vectors._held
    warm(window_vectors, "window_attention", *axes, device=gpu)
    assert [key[-1] for key in _vectors._held] == [gpu]


def test_every_fake_kernel_with_a_geometry_warms(gpu):
    operators = torch.ops.videoswin_triton
    with FakeTensorMode():
        x, weight = torch.empty(1, 3, 5, 4, 48, device=gpu), torch.empty(192, device=gpu)
        operators.cyclic_shift(x, SHIFT)
        windows = operators.window_partition(x, WINDOW, SHIFT)
        assert len(_vectors._held) == 2
        operators.window_reverse(windows, (3, 4, 5), WINDOW, SHIFT)
        operators.patch_merging(x, weight, weight, 1e-5, torch.float32)
        assert len(_vectors._held) == 4
        table = torch.empty(75, 1, device=gpu)
        operators.window_attention(x, table, None, (2, 3, 3), (0, 1, 1), 1, 0.25)
    kinds = [key[0] for key in _vectors._held]
    assert kinds == ["shift", "window", "window", "merge", "window"]
