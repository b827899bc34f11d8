"""window_partition and window_reverse: bit for bit the gather and scatter of windows."""

import loops
import operator_suite as suite
import pytest
import torch

from videoswin_kernels import window_partition, window_reverse

CASES = {
    "exact": ((4, 6, 6), (2, 3, 3), (1, 1, 1)),
    "unshifted": ((4, 6, 6), (2, 3, 3), (0, 0, 0)),
    "padded": ((5, 4, 7), (2, 3, 3), (1, 1, 1)),
    "one axis shifted": ((5, 4, 7), (2, 3, 3), (0, 2, 0)),
    "D clamped": ((2, 7, 5), (3, 3, 2), (2, 1, 1)),
    "H and W clamped": ((5, 2, 3), (2, 3, 3), (1, 2, 2)),
    "all clamped": ((2, 3, 2), (4, 4, 4), (3, 3, 3)),
    "one token": ((1, 1, 1), (2, 3, 3), (1, 1, 1)),
    "one token a window": ((3, 2, 4), (1, 1, 1), (0, 0, 0)),
    "production": ((4, 14, 14), (8, 7, 7), (4, 3, 3)),
}
CASE = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
PARTITION = pytest.mark.parametrize("kernels", suite.kernel_sets("window_partition"))
REVERSE = pytest.mark.parametrize("kernels", suite.kernel_sets("window_reverse"))
PADDED = CASES["padded"]


def _windows(batch, case, channels=3, **options):
    """Random [B*M, N, C] of the case."""
    table = loops.windows(*case)
    return suite.random(batch * len(table), len(table[0]), channels, **options)


@PARTITION
@pytest.mark.parametrize("dtype", suite.DTYPES)
@CASE
def test_partition_equals_loops(case, dtype, kernels):
    grid, window, shift = case
    x = suite.random(2, *grid, 3, dtype=dtype)
    windows = window_partition(x, window=window, shift=shift, kernels=kernels)
    expected = loops.window_partition(x.double().numpy(), window, shift)
    assert windows.dtype == dtype
    assert torch.equal(windows, torch.from_numpy(expected).to(dtype))


@REVERSE
@pytest.mark.parametrize("dtype", suite.DTYPES)
@CASE
def test_reverse_equals_loops(case, dtype, kernels):
    grid, window, shift = case
    windows = _windows(2, case, dtype=dtype)
    x = window_reverse(windows, grid=grid, window=window, shift=shift, kernels=kernels)
    expected = loops.window_reverse(windows.double().numpy(), grid, window, shift)
    assert x.dtype == dtype
    assert torch.equal(x, torch.from_numpy(expected).to(dtype))


@PARTITION
@CASE
def test_reverse_undoes_partition(case, kernels):
    grid, window, shift = case
    x = suite.random(2, *grid, 3, dtype=torch.float32)
    options = {"window": window, "shift": shift, "kernels": kernels}
    assert torch.equal(window_reverse(window_partition(x, **options), grid=grid, **options), x)


@PARTITION
@CASE
def test_gradients_drop_padding(case, kernels):
    grid, window, shift = case
    options = {"window": window, "shift": shift, "kernels": kernels}
    x = suite.random(2, *grid, 3, dtype=torch.float32, grad=True)
    weight = _windows(2, case, dtype=torch.float32)
    (grad_x,) = suite.gradients(window_partition(x, **options), [x], weight)
    back = loops.window_reverse(weight.double().numpy(), grid, window, shift)
    assert torch.equal(grad_x, torch.from_numpy(back).float())

    windows = _windows(2, case, dtype=torch.float32, grad=True)
    weight = suite.random(2, *grid, 3, dtype=torch.float32)
    reversed_ = window_reverse(windows, grid=grid, **options)
    (grad_windows,) = suite.gradients(reversed_, [windows], weight)
    spread = loops.window_partition(weight.double().numpy(), window, shift)
    assert torch.equal(grad_windows, torch.from_numpy(spread).float())


def test_gradcheck():
    grid, window, shift = (2, 3, 2), (1, 2, 3), (0, 1, 1)
    x = suite.random(1, *grid, 2, grad=True)
    windows = _windows(1, (grid, window, shift), grad=True)
    options = {"window": window, "shift": shift}
    assert torch.autograd.gradcheck(lambda x: window_partition(x, **options), [x])
    assert torch.autograd.gradcheck(lambda w: window_reverse(w, grid=grid, **options), [windows])


@PARTITION
@pytest.mark.trap(32)
def test_every_layout(kernels):
    grid, window, shift = PADDED
    options = {"window": window, "shift": shift, "kernels": kernels}
    x = suite.random(2, *grid, 6, dtype=torch.float32)
    expected = torch.from_numpy(loops.window_partition(x.numpy(), window, shift))
    for name, view in suite.layouts(x).items():
        assert torch.equal(window_partition(view, **options), expected), name
    windows = _windows(2, PADDED, 6, dtype=torch.float32)
    expected = suite.naive_reverse(windows, grid, window, shift)
    for name, view in suite.layouts(windows).items():
        assert torch.equal(window_reverse(view, grid=grid, **options), expected), name


@PARTITION
@pytest.mark.parametrize("case", [PADDED, CASES["all clamped"]])
def test_empty_batch(case, kernels):
    grid, window, shift = case
    options = {"window": window, "shift": shift, "kernels": kernels}
    x = torch.zeros(0, *grid, 3, requires_grad=True)
    windows = window_partition(x, **options)
    assert windows.shape == (0, len(loops.windows(*case)[0]), 3)
    back = window_reverse(windows, grid=grid, **options)
    assert back.shape == x.shape
    (grad_x,) = torch.autograd.grad(back.sum(), x)
    assert grad_x.shape == x.shape


@PARTITION
def test_more_than_65535_windows(kernels):
    x = torch.arange(257 * 256, dtype=torch.float32).view(1, 1, 257, 256, 1)
    options = {"window": (1, 1, 1), "kernels": kernels}
    windows = window_partition(x, **options)
    assert windows.shape == (65792, 1, 1)
    assert torch.equal(windows.flatten(), x.flatten())
    assert torch.equal(window_reverse(windows, grid=(1, 257, 256), **options), x)


@PARTITION
def test_autocast_changes_nothing(kernels):
    grid, window, shift = PADDED
    options = {"window": window, "shift": shift, "kernels": kernels}
    x = suite.random(2, *grid, 3, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        windows = window_partition(x, **options)
        back = window_reverse(windows, grid=grid, **options)
    assert windows.dtype == back.dtype == torch.float32
    assert torch.equal(back, x)


@PARTITION
@pytest.mark.parametrize("case", [PADDED, CASES["D clamped"]])
def test_compiles_to_one_graph_for_all_batch_sizes(case, kernels):
    grid, window, shift = case
    options = {"window": window, "shift": shift, "kernels": kernels}

    def function(x):
        windows = window_partition(x, **options)
        return windows, window_reverse(windows.sin(), grid=grid, **options)

    suite.assert_compiles(
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
