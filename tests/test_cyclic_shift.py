"""cyclic_shift: bit for bit a roll of the token grid."""

import loops
import operator_suite as suite
import pytest
import torch

from videoswin_kernels import cyclic_shift
from videoswin_kernels.geometry import shift_index
from videoswin_kernels.testing import SHIFT_GRID as GRID
from videoswin_kernels.testing import SHIFTS

EVERY = suite.every("cyclic_shift")


@suite.every("cyclic_shift", suite.MOVED)
@pytest.mark.parametrize("shift", SHIFTS)
def test_forward_equals_loops(shift, run, dtype):
    x = suite.anything(2, *GRID, 3, dtype=dtype)
    expected = torch.roll(x, shift, (1, 2, 3))
    moved = run(cyclic_shift, x, shift)
    assert moved.dtype == dtype
    assert torch.equal(moved, expected)
    if dtype.is_floating_point:
        judged = torch.from_numpy(loops.cyclic_shift(x.double().numpy(), shift)).to(dtype)
        assert torch.equal(moved, judged)


@EVERY
@pytest.mark.parametrize("shift", SHIFTS)
def test_gradient_is_the_inverse_shift(shift, run):
    x = suite.random(2, *GRID, 3, dtype=torch.float32, grad=True)
    weight = suite.random(2, *GRID, 3, dtype=torch.float32)
    (grad_x,) = suite.gradients(run(cyclic_shift, x, shift), [x], weight)
    back = loops.cyclic_shift(weight.numpy(), [-step for step in shift])
    assert torch.equal(grad_x, torch.from_numpy(back))


@EVERY
def test_gradcheck(run):
    x = suite.random(1, 2, 3, 2, 2, grad=True)
    assert torch.autograd.gradcheck(lambda x: run(cyclic_shift, x, (1, -1, 3)), [x])
    # A roll is linear: the second derivative is that of the gradient's own inverse.
    assert torch.autograd.gradgradcheck(lambda x: run(cyclic_shift, x, (1, -1, 3)), [x])


@EVERY
@pytest.mark.trap(32)
def test_every_layout(run):
    x = suite.random(2, *GRID, 6, dtype=torch.float32)
    expected = torch.from_numpy(loops.cyclic_shift(x.numpy(), (1, -2, 3)))
    for name, view in suite.layouts(run.put(x)).items():
        moved = cyclic_shift(view, (1, -2, 3), kernels=run.kernels)
        assert torch.equal(moved.cpu(), expected), name


@suite.every("cyclic_shift", [torch.int64, torch.float16, torch.bool])
@pytest.mark.trap(8)
@pytest.mark.parametrize("channels", [1, 5, 8, 127, 129, 1030])
def test_rows_that_are_no_whole_number_of_tiles(channels, run, dtype):
    x = suite.anything(1, 2, 3, 2, channels, dtype=dtype)
    expected = torch.roll(x, (1, -1, 1), (1, 2, 3))
    assert torch.equal(run(cyclic_shift, x, (1, -1, 1)), expected)


@EVERY
def test_expanded_input_and_strided_gradient(run):
    x = run.leaf(suite.random(1, *GRID, 1, dtype=torch.float32, grad=True))
    weight = run.put(suite.random(2, *GRID, 6, dtype=torch.float32))
    for name, up in suite.layouts(weight).items():
        moved = cyclic_shift(x.expand(2, *GRID, 6), (1, 2, 3), kernels=run.kernels)
        (grad_x,) = torch.autograd.grad(moved, x, up)
        expected = torch.roll(weight, (-1, -2, -3), (1, 2, 3)).sum((0, -1), keepdim=True)
        torch.testing.assert_close(grad_x, expected, msg=lambda text, name=name: f"{name}: {text}")


@EVERY
def test_an_expanded_gradient(run):
    # What `sum` sends back: one number, with strides of 0.
    x = suite.random(2, *GRID, 6, dtype=torch.float32, grad=True)
    (grad_x,) = torch.autograd.grad(run(cyclic_shift, x, (1, 2, 3)).sum(), x)
    assert torch.equal(grad_x, torch.ones_like(x))


@EVERY
@pytest.mark.parametrize("shape", [(0, 2, 3, 4, 5), (1, 1, 1, 1, 1), (1, 1, 1, 1, 7)])
def test_empty_batch_and_one_token(shape, run):
    x = suite.random(*shape, dtype=torch.float32, grad=True)
    moved = run(cyclic_shift, x, (1, -1, 2))
    assert torch.equal(moved, torch.roll(x, (1, -1, 2), (1, 2, 3)))
    (grad_x,) = torch.autograd.grad(moved.sum(), x)
    assert torch.equal(grad_x, torch.ones(shape))


@EVERY
def test_more_than_65535_tokens(run):
    x = torch.arange(257 * 256 * 2, dtype=torch.float32).view(1, 1, 257, 256, 2)
    moved = run(cyclic_shift, x, (0, -100, 3))
    assert torch.equal(moved, torch.roll(x, (0, -100, 3), (1, 2, 3)))


@EVERY
@pytest.mark.parametrize("axis", [0, 2])
def test_offsets_beyond_2_31(axis, run, far):
    x = suite.anything(2, 2, 2, 3, 16, dtype=torch.uint8)
    expected = torch.roll(x, (1, 1, 2), (1, 2, 3))
    moved = cyclic_shift(far(run.put(x), axis), (1, 1, 2), kernels=run.kernels)
    assert torch.equal(moved.cpu(), expected)


@EVERY
def test_a_gradient_with_offsets_beyond_2_31(run, far):
    x = run.leaf(suite.random(2, 2, 2, 3, 8, dtype=torch.float16, grad=True))
    up = suite.random(2, 2, 2, 3, 8, dtype=torch.float16)
    moved = cyclic_shift(x, (1, 1, 2), kernels=run.kernels)
    (grad_x,) = torch.autograd.grad(moved, x, far(run.put(up)))
    assert torch.equal(grad_x.cpu(), torch.roll(up, (-1, -1, -2), (1, 2, 3)))


@EVERY
def test_autocast_changes_nothing(run):
    x = suite.random(2, *GRID, 3, dtype=torch.float32)
    with torch.autocast(run.device, torch.bfloat16):
        moved = run(cyclic_shift, x, (1, 2, 3))
    assert moved.dtype == torch.float32
    assert torch.equal(moved, torch.roll(x, (1, 2, 3), (1, 2, 3)))


@EVERY
def test_compiles_to_one_graph_for_all_batch_sizes(run):
    suite.assert_compiles(
        run,
        lambda x: cyclic_shift(x, (1, -2, 3), kernels=run.kernels),
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
