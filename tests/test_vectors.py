"""Index vectors on devices: made once, plain, never where a capture would record the copy."""

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
