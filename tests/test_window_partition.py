"""window_partition and window_reverse: bit for bit the gather and scatter of windows."""

import loops
import operator_suite as suite
import plain
import pytest
import torch

from videoswin_kernels import window_partition, window_reverse
from videoswin_kernels.testing import MOVEMENT as CASES
from videoswin_kernels.testing import Case

CASE = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
EVERY = suite.every("window_partition")
PADDED = CASES["padded"]


def _windows(batch, case, channels=3, **options):
    """Random [B*M, N, C] of the case."""
    return suite.random(batch * case.windows, case.tokens, channels, **options)


def partition(run, x, case):
    return run(window_partition, x, window=case.window, shift=case.shift)


def reverse(run, windows, case):
    return run(window_reverse, windows, grid=case.grid, window=case.window, shift=case.shift)


@CASE
def test_the_cases_say_how_many_windows_and_tokens_they_have(case):
    table = loops.windows(*case)
    assert (case.windows, case.tokens) == (len(table), len(table[0]))


@suite.every("window_partition", suite.DTYPES)
@CASE
def test_partition_equals_loops(case, run, dtype):
    x = suite.random(2, *case.grid, 3, dtype=dtype)
    windows = partition(run, x, case)
    expected = loops.window_partition(x.double().numpy(), case.window, case.shift)
    assert windows.dtype == dtype
    assert torch.equal(windows, torch.from_numpy(expected).to(dtype))


@suite.every("window_reverse", suite.DTYPES)
@CASE
def test_reverse_equals_loops(case, run, dtype):
    windows = _windows(2, case, dtype=dtype)
    x = reverse(run, windows, case)
    expected = loops.window_reverse(windows.double().numpy(), *case)
    assert x.dtype == dtype
    assert torch.equal(x, torch.from_numpy(expected).to(dtype))


@suite.every("window_partition", [kind for kind in suite.MOVED if kind not in suite.DTYPES])
@pytest.mark.trap(8)
@pytest.mark.parametrize("channels", [1, 5, 16, 129])
def test_what_is_moved_may_be_anything_of_any_width(channels, run, dtype):
    x = suite.anything(2, *PADDED.grid, channels, dtype=dtype)
    windows = partition(run, x, PADDED)
    assert windows.dtype == dtype
    assert torch.equal(windows, plain.partition(x, PADDED.window, PADDED.shift))
    back = reverse(run, windows, PADDED)
    assert back.dtype == dtype
    assert torch.equal(back, x)


@EVERY
@CASE
def test_reverse_undoes_partition(case, run):
    x = suite.random(2, *case.grid, 3, dtype=torch.float32)
    assert torch.equal(reverse(run, partition(run, x, case), case), x)


@EVERY
@CASE
def test_gradients_drop_padding(case, run):
    grid, window, shift = case
    x = suite.random(2, *grid, 3, dtype=torch.float32, grad=True)
    weight = _windows(2, case, dtype=torch.float32)
    (grad_x,) = suite.gradients(partition(run, x, case), [x], weight)
    back = loops.window_reverse(weight.double().numpy(), grid, window, shift)
    assert torch.equal(grad_x, torch.from_numpy(back).float())

    windows = _windows(2, case, dtype=torch.float32, grad=True)
    weight = suite.random(2, *grid, 3, dtype=torch.float32)
    (grad_windows,) = suite.gradients(reverse(run, windows, case), [windows], weight)
    spread = loops.window_partition(weight.double().numpy(), window, shift)
    assert torch.equal(grad_windows, torch.from_numpy(spread).float())


@EVERY
def test_gradcheck(run):
    case = Case((2, 3, 2), (1, 2, 3), (0, 1, 1))
    x = suite.random(1, *case.grid, 2, grad=True)
    windows = _windows(1, case, 2, grad=True)
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(lambda x: partition(run, x, case), [x])
        assert check(lambda windows: reverse(run, windows, case), [windows])


@EVERY
@pytest.mark.trap(32)
def test_every_layout(run):
    grid, window, shift = PADDED
    options = {"window": window, "shift": shift, "kernels": run.kernels}
    x = suite.random(2, *grid, 6, dtype=torch.float32)
    expected = torch.from_numpy(loops.window_partition(x.numpy(), window, shift))
    for name, view in suite.layouts(run.put(x)).items():
        assert torch.equal(window_partition(view, **options).cpu(), expected), name
    windows = _windows(2, PADDED, 6, dtype=torch.float32)
    expected = plain.reverse(windows, grid, window, shift)
    for name, view in suite.layouts(run.put(windows)).items():
        assert torch.equal(window_reverse(view, grid=grid, **options).cpu(), expected), name


@EVERY
def test_strided_and_expanded_gradients(run):
    grid, window, shift = PADDED
    options = {"window": window, "shift": shift, "kernels": run.kernels}
    x = run.leaf(suite.random(2, *grid, 6, dtype=torch.float32, grad=True))
    windows = run.leaf(_windows(2, PADDED, 6, dtype=torch.float32, grad=True))
    up_windows, up_x = _windows(2, PADDED, 6).float(), suite.random(*x.shape).float()
    expected_x = plain.reverse(up_windows, *PADDED)
    expected_windows = plain.partition(up_x, window, shift)
    for name, up in suite.layouts(run.put(up_windows)).items():
        (grad,) = torch.autograd.grad(window_partition(x, **options), x, up)
        assert torch.equal(grad.cpu(), expected_x), name
    for name, up in suite.layouts(run.put(up_x)).items():
        (grad,) = torch.autograd.grad(window_reverse(windows, grid=grid, **options), windows, up)
        assert torch.equal(grad.cpu(), expected_windows), name
    # What `sum` sends back: one number, with strides of 0.
    (grad,) = torch.autograd.grad(window_partition(x, **options).sum(), x)
    assert torch.equal(grad, torch.ones_like(x))
    expanded = x[:1, ..., :1].expand(2, *grid, 6)
    moved = window_partition(expanded, **options)
    assert torch.equal(moved, window_partition(expanded.contiguous(), **options))


@EVERY
@pytest.mark.parametrize("case", [PADDED, CASES["all clamped"]])
def test_empty_batch(case, run):
    x = torch.zeros(0, *case.grid, 3, requires_grad=True)
    windows = partition(run, x, case)
    assert windows.shape == (0, case.tokens, 3)
    back = reverse(run, windows, case)
    assert back.shape == x.shape
    (grad_x,) = torch.autograd.grad(back.sum(), x)
    assert grad_x.shape == x.shape


@EVERY
def test_more_than_65535_windows(run):
    x = torch.arange(257 * 256, dtype=torch.float32).view(1, 1, 257, 256, 1)
    case = Case((1, 257, 256), (1, 1, 1), (0, 0, 0))
    windows = partition(run, x, case)
    assert windows.shape == (65792, 1, 1)
    assert torch.equal(windows.flatten(), x.flatten())
    assert torch.equal(reverse(run, windows, case), x)


@EVERY
@pytest.mark.parametrize("axis", [0, 1])
def test_offsets_beyond_2_31(axis, run, far):
    case = Case((2, 3, 4), (2, 2, 3), (0, 1, 1))
    options = {"window": case.window, "shift": case.shift, "kernels": run.kernels}
    x = suite.anything(2, *case.grid, 16, dtype=torch.uint8)
    windows = window_partition(far(run.put(x), axis), **options)
    assert torch.equal(windows.cpu(), plain.partition(x, case.window, case.shift))
    # Two windows of one clip, the second far from the first.
    case = Case((1, 2, 3), (1, 1, 3), (0, 0, 0))
    options = {"grid": case.grid, "window": case.window, "kernels": run.kernels}
    windows = suite.anything(2, 3, 16, dtype=torch.uint8)
    back = window_reverse(far(run.put(windows)), **options)
    assert torch.equal(back.cpu(), plain.reverse(windows, *case))


@EVERY
def test_autocast_changes_nothing(run):
    x = suite.random(2, *PADDED.grid, 3, dtype=torch.float32)
    with torch.autocast(run.device, torch.bfloat16):
        windows = partition(run, x, PADDED)
        back = reverse(run, windows, PADDED)
    assert windows.dtype == back.dtype == torch.float32
    assert torch.equal(back, x)


@EVERY
@pytest.mark.parametrize("case", [PADDED, CASES["D clamped"]])
def test_compiles_to_one_graph_for_all_batch_sizes(case, run):
    grid, window, shift = case
    options = {"window": window, "shift": shift, "kernels": run.kernels}

    def function(x):
        windows = window_partition(x, **options)
        return windows, window_reverse(windows.sin(), grid=grid, **options)

    suite.assert_compiles(
        run,
        function,
        lambda batch: [suite.random(batch, *grid, 3, dtype=torch.float32, grad=True)],
        exact=False,
    )


def test_lists_are_as_good_as_tuples_and_shift_is_optional():
    x = suite.random(2, 5, 4, 7, 3)
    expected = window_partition(x, window=(2, 3, 3), shift=(0, 0, 0))
    assert torch.equal(window_partition(x, window=[2, 3, 3]), expected)
    back = window_reverse(expected, grid=x.shape[1:4], window=[2, 3, 3])
    assert torch.equal(back, x)


BAD_WINDOWS = [
    ("window", (2, 3), (2, 3)),
    ("window", (0, 3, 3), (0, 3, 3)),
    ("window", (2, -3, 3), (2, -3, 3)),
    ("window", (2, 3.0, 3), (2, 3.0, 3)),
    ("window", (True, 3, 3), (True, 3, 3)),
    ("window", None, None),
    ("shift", (1, 1), (1, 1)),
    ("shift", (-1, 1, 1), (-1, 1, 1)),
    ("shift", (2, 1, 1), (2, 1, 1)),
    ("shift", (1, 1.0, 1), (1, 1.0, 1)),
    ("kernels", "fastest", "fastest"),
]


@pytest.mark.parametrize(
    ("argument", "value", "said"),
    [
        *BAD_WINDOWS,
        ("x", torch.zeros(4, 6, 6, 2), (4, 6, 6, 2)),
        ("x", 3.0, "float"),
    ],
)
def test_partition_refusals(argument, value, said):
    arguments = {"x": torch.zeros(1, 4, 6, 6, 2), "window": (2, 3, 3), "shift": (1, 1, 1)}
    with suite.refuses("window_partition", argument, said):
        window_partition(**{**arguments, argument: value})


@pytest.mark.parametrize(
    ("argument", "value", "said"),
    [
        *BAD_WINDOWS,
        ("windows", torch.zeros(8, 18), (8, 18)),
        ("windows", torch.zeros(8, 17, 2), (8, 17, 2)),
        ("windows", torch.zeros(9, 18, 2), (9, 18, 2)),
        ("windows", None, "NoneType"),
        ("grid", (4, 6), (4, 6)),
        ("grid", (4, 0, 6), (4, 0, 6)),
        ("grid", (4, 6.0, 6), (4, 6.0, 6)),
    ],
)
def test_reverse_refusals(argument, value, said):
    arguments = {"windows": torch.zeros(8, 18, 2), "grid": (4, 6, 6)}
    arguments |= {"window": (2, 3, 3), "shift": (1, 1, 1)}
    with suite.refuses("window_reverse", argument, said):
        window_reverse(**{**arguments, argument: value})
