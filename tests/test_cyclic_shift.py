"""cyclic_shift: bit for bit a roll of the token grid."""

import loops
import operator_suite as suite
import pytest
import torch

from videoswin_kernels import cyclic_shift
from videoswin_kernels.geometry import shift_index

GRID = (3, 5, 4)
SHIFTS = [(0, 0, 0), (1, 2, 3), (-1, -2, -3), (0, 2, 0), (7, -11, 4), (-300, 0, 1)]
KERNELS = pytest.mark.parametrize("kernels", suite.kernel_sets("cyclic_shift"))


@KERNELS
@pytest.mark.parametrize("dtype", suite.DTYPES)
@pytest.mark.parametrize("shift", SHIFTS)
def test_forward_equals_loops(shift, dtype, kernels):
    x = suite.random(2, *GRID, 3, dtype=dtype)
    expected = torch.from_numpy(loops.cyclic_shift(x.double().numpy(), shift)).to(dtype)
    rolled = torch.roll(x, shift, (1, 2, 3))
    moved = cyclic_shift(x, shift, kernels=kernels)
    assert moved.dtype == dtype
    assert torch.equal(moved, expected)
    assert torch.equal(moved, rolled)


@KERNELS
@pytest.mark.parametrize("shift", SHIFTS)
def test_gradient_is_the_inverse_shift(shift, kernels):
    x = suite.random(2, *GRID, 3, dtype=torch.float32, grad=True)
    weight = suite.random(2, *GRID, 3, dtype=torch.float32)
    (grad_x,) = suite.gradients(cyclic_shift(x, shift, kernels=kernels), [x], weight)
    back = loops.cyclic_shift(weight.numpy(), [-step for step in shift])
    assert torch.equal(grad_x, torch.from_numpy(back))


def test_gradcheck():
    x = suite.random(1, 2, 3, 2, 2, grad=True)
    assert torch.autograd.gradcheck(lambda x: cyclic_shift(x, (1, -1, 3)), [x])


@KERNELS
@pytest.mark.trap(32)
def test_every_layout(kernels):
    x = suite.random(2, *GRID, 6, dtype=torch.float32)
    expected = torch.from_numpy(loops.cyclic_shift(x.numpy(), (1, -2, 3)))
    for name, view in suite.layouts(x).items():
        assert torch.equal(cyclic_shift(view, (1, -2, 3), kernels=kernels), expected), name


@KERNELS
def test_expanded_input_and_strided_gradient(kernels):
    x = suite.random(1, *GRID, 1, dtype=torch.float32, grad=True)
    weight = suite.layouts(suite.random(2, *GRID, 6, dtype=torch.float32))["axes swapped"]
    moved = cyclic_shift(x.expand(2, *GRID, 6), (1, 2, 3), kernels=kernels)
    (grad_x,) = torch.autograd.grad(moved, x, weight)
    expected = torch.roll(weight, (-1, -2, -3), (1, 2, 3)).sum((0, -1), keepdim=True)
    torch.testing.assert_close(grad_x, expected)


@KERNELS
@pytest.mark.parametrize("shape", [(0, 2, 3, 4, 5), (1, 1, 1, 1, 1), (1, 1, 1, 1, 7)])
def test_empty_batch_and_one_token(shape, kernels):
    x = suite.random(*shape, dtype=torch.float32, grad=True)
    moved = cyclic_shift(x, (1, -1, 2), kernels=kernels)
    assert torch.equal(moved, torch.roll(x, (1, -1, 2), (1, 2, 3)))
    (grad_x,) = torch.autograd.grad(moved.sum(), x)
    assert torch.equal(grad_x, torch.ones(shape))


@KERNELS
def test_more_than_65535_tokens(kernels):
    x = torch.arange(257 * 256 * 2, dtype=torch.float32).view(1, 1, 257, 256, 2)
    moved = cyclic_shift(x, (0, -100, 3), kernels=kernels)
    assert torch.equal(moved, torch.roll(x, (0, -100, 3), (1, 2, 3)))


@KERNELS
def test_autocast_changes_nothing(kernels):
    x = suite.random(2, *GRID, 3, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        moved = cyclic_shift(x, (1, 2, 3), kernels=kernels)
    assert moved.dtype == torch.float32
    assert torch.equal(moved, torch.roll(x, (1, 2, 3), (1, 2, 3)))


@KERNELS
def test_compiles_to_one_graph_for_all_batch_sizes(kernels):
    suite.assert_compiles(
        lambda x: cyclic_shift(x, (1, -2, 3), kernels=kernels),
        lambda batch: [suite.random(batch, *GRID, 3, dtype=torch.float32, grad=True)],
        exact=True,
    )


@pytest.mark.parametrize(
    ("argument", "value", "said"),
    [
        ("x", torch.zeros(3, 5, 4, 2), (3, 5, 4, 2)),
        ("x", torch.zeros(1, 1, 3, 5, 4, 2), (1, 1, 3, 5, 4, 2)),
        ("x", [[1.0]], "list"),
        ("shift", (1, 2), (1, 2)),
        ("shift", (1, 2, 3, 4), (1, 2, 3, 4)),
        ("shift", (1, 2.0, 3), (1, 2.0, 3)),
        ("shift", (True, 0, 0), (True, 0, 0)),
        ("shift", 1, 1),
        ("kernels", "fastest", "fastest"),
        ("kernels", None, None),
    ],
)
def test_refusals(argument, value, said):
    arguments = {"x": torch.zeros(1, *GRID, 2), "shift": (1, 1, 1), argument: value}
    with suite.refuses("cyclic_shift", argument, said):
        cyclic_shift(**arguments)


@pytest.mark.parametrize("shift", [(2**70, -(2**63), 10**30), (-7, 0, 12)])
def test_a_shift_beyond_the_grid_and_beyond_64_bits_goes_round(shift):
    x = torch.arange(3 * 4 * 5.0).view(1, 3, 4, 5, 1)
    within = [s % size for s, size in zip(shift, (3, 4, 5), strict=True)]
    expected = torch.roll(x, within, (1, 2, 3))
    assert torch.equal(cyclic_shift(x, shift, kernels="reference"), expected)
    index = torch.from_numpy(shift_index((3, 4, 5), shift).copy()).long()
    assert torch.equal(x.flatten()[index], expected.flatten())
