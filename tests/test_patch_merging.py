"""patch_merging: 2 x 2 neighbours side by side, LayerNorm over the four of them."""

import loops
import operator_suite as suite
import plain
import pytest
import torch

from videoswin_kernels import patch_merging
from videoswin_kernels.testing import MERGING as GRIDS

EVERY = suite.every("patch_merging")
ODD = (2, 5, 7)
CHANNELS = 6


def make(grid, batch=2, dtype=torch.float64, weights=None, grad=False):
    """(x, weight, bias), weights in the dtype of x or in their own."""
    weights = weights or dtype
    x = suite.random(batch, *grid, CHANNELS, dtype=dtype, grad=grad)
    weight, bias = (suite.random(4 * CHANNELS, dtype=weights, grad=grad) for _ in range(2))
    return x, weight, bias


def judged(inputs, **options):
    """The float64 result of the loops."""
    arrays = [value.detach().double().numpy() for value in inputs]
    return torch.from_numpy(loops.patch_merging(*arrays, **options))


@suite.every("patch_merging", suite.DTYPES)
@pytest.mark.parametrize("grid", GRIDS)
def test_forward(grid, run, dtype):
    inputs = make(grid, dtype=dtype)
    merged = run(patch_merging, *inputs)
    exact = judged(inputs)
    assert merged.is_contiguous()
    if dtype == torch.float64:
        suite.assert_near_loops(merged, exact.numpy())
    suite.assert_budget(merged, exact, run.plain(plain.merging, *inputs), dtype)


@suite.every("patch_merging", suite.DTYPES)
@pytest.mark.parametrize("grid", GRIDS)
def test_gradients(grid, run, dtype):
    inputs = make(grid, dtype=dtype, grad=True)
    leaves = [suite.exact_leaf(value) for value in inputs]
    merged = run(patch_merging, *inputs)
    weight = suite.random(*merged.shape, dtype=dtype)
    got = suite.gradients(merged, inputs, weight)
    naive = suite.gradients(run.plain(plain.merging, *inputs), inputs, weight)
    exact = suite.gradients(plain.merging(*leaves), leaves, weight)
    for parts in zip(got, exact, naive, strict=True):
        if dtype == torch.float64:
            torch.testing.assert_close(*parts[:2], rtol=1e-10, atol=1e-10)
        suite.assert_budget(*parts, dtype)


def test_gradcheck():
    x, weight, bias = make((1, 3, 2), batch=1)
    small = [x[..., :2].clone(), weight[:8].clone(), bias[:8].clone()]
    for value in small:
        value.requires_grad_()
    assert torch.autograd.gradcheck(patch_merging, small)


@EVERY
@pytest.mark.trap(15)
def test_neighbours_are_in_the_order_of_h_first(run):
    # Tokens that say where they stand: the normed row shows in which order they came.
    h, w = torch.arange(4.0)[:, None], torch.arange(6.0)
    x = (h * 10 + w).view(1, 1, 4, 6, 1).repeat(2, 2, 1, 1, 1)
    merged = run(patch_merging, x, torch.ones(4), torch.zeros(4))
    # The token below comes second, the one to the right third.
    four = torch.tensor([0.0, 10.0, 1.0, 11.0])
    expected = (four - four.mean()) / (four.var(unbiased=False) + 1e-5).sqrt()
    torch.testing.assert_close(merged, expected.expand(2, 2, 2, 3, 4))
    # Weights are per output channel and apply after the norm, not to what comes in.
    weight, bias = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([0.0, 10.0, 20.0, 30.0])
    merged = run(patch_merging, x, weight, bias)
    torch.testing.assert_close(merged, (expected * weight + bias).expand(2, 2, 2, 3, 4))


@EVERY
@pytest.mark.trap(16)
def test_padded_zeros_take_part_in_the_statistics(run):
    x, weight, _ = make((2, 7, 7), dtype=torch.float32)
    x = x.abs() + 1  # so that a zero is far from the mean
    merged = run(patch_merging, x, weight, torch.zeros_like(weight))
    assert merged.shape == (2, 2, 4, 4, 4 * CHANNELS)
    # The corner holds one token and three pads.
    row = torch.cat([x[:, :, 6, 6], x.new_zeros(2, 2, 3 * CHANNELS)], -1).double()
    deviation = (row.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    expected = (row - row.mean(-1, keepdim=True)) / deviation * weight
    torch.testing.assert_close(merged[:, :, 3, 3].double(), expected, rtol=1e-5, atol=1e-5)
    pads = merged[:, :, 3, 3, CHANNELS:] / weight[CHANNELS:]
    assert (pads < -0.3).all()
    # Below the last row, h-odd slices are pads; right of the last column, w-odd slices are.
    assert (merged[:, :, 3, 0, CHANNELS : 2 * CHANNELS] / weight[CHANNELS : 2 * CHANNELS] < 0).all()
    low, high = 2 * CHANNELS, 3 * CHANNELS
    assert (merged[:, :, 0, 3, low:high] / weight[low:high] < 0).all()


@EVERY
@pytest.mark.trap(27)
def test_eps_is_inside_the_root_and_1e_minus_5_by_default(run):
    x, weight, bias = make(ODD, dtype=torch.float32)
    x = x * 1e-3
    naive = plain.merging(x, weight, bias)
    exact = judged((x, weight, bias))
    suite.assert_budget(run(patch_merging, x, weight, bias), exact, naive)
    assert (judged((x, weight, bias), eps=1e-6) - exact).abs().max() > 0.1
    exact = judged((x, weight, bias), eps=1e-3)
    naive = plain.merging(x, weight, bias, eps=1e-3)
    suite.assert_budget(run(patch_merging, x, weight, bias, eps=1e-3), exact, naive)


@suite.every("patch_merging", suite.LOW)
def test_statistics_are_float32(run, dtype):
    x, weight, bias = make(ODD, dtype=dtype)
    x = x + 30  # a sum of squares in the low precision would lose the deviation
    exact = judged((x, weight, bias))
    naive = plain.merging(x.float(), weight.float(), bias.float()).to(dtype)
    suite.assert_budget(run(patch_merging, x, weight, bias), exact, naive)


@EVERY
@pytest.mark.trap(32)
def test_every_layout(run):
    inputs = make(ODD, dtype=torch.float32)
    exact, naive = judged(inputs), run.plain(plain.merging, *inputs)
    for view in suite.layouts(run.put(inputs[0])).values():
        suite.assert_budget(run(patch_merging, view, *inputs[1:]), exact, naive)
    weight = torch.stack([run.put(inputs[1])] * 2, -1)[:, 1]
    merged = run(patch_merging, inputs[0], weight, inputs[2])
    suite.assert_budget(merged, exact, naive)


@EVERY
@pytest.mark.trap(32)
def test_gradients_of_every_layout(run):
    inputs = make(ODD, dtype=torch.float32, grad=True)
    x, weight, bias = map(run.leaf, inputs)
    naive = plain.merging(*inputs)
    up = suite.random(*naive.shape, dtype=torch.float32)
    expected = torch.autograd.grad(naive, inputs, up)
    views = suite.layouts(x.detach()).values()
    for view, grad in zip(views, suite.layouts(run.put(up)).values(), strict=True):
        leaves = [view.detach().requires_grad_(), weight, bias]
        got = torch.autograd.grad(patch_merging(*leaves, kernels=run.kernels), leaves, grad)
        for value, other in zip(got, expected, strict=True):
            torch.testing.assert_close(value.cpu(), other, rtol=1e-4, atol=1e-5)


@EVERY
@pytest.mark.trap(32)
def test_expanded_inputs_and_gradients(run):
    x, weight, bias = make(ODD, dtype=torch.float32, grad=True)
    flat = run.put(x)[:1, :, :1, :, :1].expand(2, *ODD, CHANNELS)
    merged = run(patch_merging, flat, weight, bias)
    assert torch.equal(merged, run(patch_merging, flat.contiguous(), weight, bias))
    # What `sum` sends back: one number, with strides of 0.
    leaves = (x, weight, bias)
    merged = run(patch_merging, *leaves)
    got = torch.autograd.grad(merged.sum(), leaves, retain_graph=True)
    expected = torch.autograd.grad(merged, leaves, torch.ones_like(merged))
    assert all(map(torch.equal, got, expected))


@suite.every("patch_merging", [torch.float32, torch.float16])
@pytest.mark.trap(8)
@pytest.mark.parametrize("channels", [1, 33, 96])
def test_rows_that_are_no_whole_number_of_tiles(channels, run, dtype):
    x = suite.random(1, 2, 3, 3, channels, dtype=dtype, grad=True)
    weight, bias = (suite.random(4 * channels, dtype=dtype, grad=True) for _ in range(2))
    inputs, leaves = (x, weight, bias), [suite.exact_leaf(v) for v in (x, weight, bias)]
    merged, exact = run(patch_merging, *inputs), plain.merging(*leaves)
    naive = run.plain(plain.merging, *inputs)
    suite.assert_budget(merged, exact, naive, dtype)
    up = suite.random(*merged.shape, dtype=dtype)
    got, own = (suite.gradients(value, inputs, up) for value in (merged, naive))
    for parts in zip(got, suite.gradients(exact, leaves, up), own, strict=True):
        suite.assert_budget(*parts, dtype)


@EVERY
@pytest.mark.parametrize("grid", [ODD, (1, 1, 1)])
def test_empty_batch(grid, run):
    inputs = make(grid, batch=0, dtype=torch.float32, grad=True)
    merged = run(patch_merging, *inputs)
    assert merged.shape == (0, grid[0], -(-grid[1] // 2), -(-grid[2] // 2), 4 * CHANNELS)
    for value, grad in zip(inputs, torch.autograd.grad(merged.sum(), inputs), strict=True):
        assert torch.equal(grad, torch.zeros_like(value))


@EVERY
def test_more_than_65535_rows(run):
    x = suite.random(1, 4, 257, 255, 2, dtype=torch.float32)
    weight, bias = suite.random(8, dtype=torch.float32), suite.random(8, dtype=torch.float32)
    merged = run(patch_merging, x, weight, bias)
    assert merged.numel() // 8 > 65535
    exact = plain.merging(x.double(), weight.double(), bias.double())
    suite.assert_budget(merged, exact, plain.merging(x, weight, bias))


@EVERY
@pytest.mark.parametrize("axis", [0, 2])
def test_offsets_beyond_2_31(axis, run, far):
    x = suite.random(2, 1, 2, 3, 8, dtype=torch.float16)
    weight, bias = (suite.random(32, dtype=torch.float16) for _ in range(2))
    merged = run(patch_merging, far(run.put(x), axis), weight, bias)
    assert torch.equal(merged, run(patch_merging, x, weight, bias))


@EVERY
def test_a_gradient_with_offsets_beyond_2_31(run, far):
    x = run.leaf(suite.random(2, 1, 2, 3, 8, dtype=torch.float16, grad=True))
    weight, bias = (run.put(suite.random(32, dtype=torch.float16)) for _ in range(2))
    up = run.put(suite.random(2, 1, 1, 2, 32, dtype=torch.float16))
    merged = patch_merging(x, weight, bias, kernels=run.kernels)
    (near,) = torch.autograd.grad(merged, x, up, retain_graph=True)
    (grad_x,) = torch.autograd.grad(merged, x, far(up))
    assert torch.equal(grad_x, near)


@suite.every("patch_merging", suite.LOW)
@pytest.mark.parametrize("is_low", [False, True])
def test_autocast_result_is_low_and_the_stream_is_read_as_it_is(is_low, run, dtype):
    stream = dtype if is_low else torch.float32
    inputs = make(ODD, dtype=stream, weights=torch.float32, grad=True)
    leaves = [suite.exact_leaf(value) for value in inputs]
    with torch.autocast(run.device, dtype):
        merged = run(patch_merging, *inputs)
    # In eager autocast the norm is float32 and the reduction that reads it casts.
    eager = run.plain(plain.merging, *[value.float() for value in inputs]).to(dtype)
    exact = plain.merging(*leaves)
    suite.assert_budget(merged, exact, eager, dtype)
    weight = suite.random(*merged.shape, dtype=torch.float32)
    got = suite.gradients(merged, inputs, weight)
    naive = suite.gradients(eager, inputs, weight)
    wanted = suite.gradients(exact, leaves, weight)
    for value, *parts in zip(inputs, got, wanted, naive, strict=True):
        suite.assert_budget(*parts, value.dtype)


@suite.every("patch_merging", suite.LOW)
def test_autocast_does_not_round_what_it_reads(run, dtype):
    # Both are one number in either low precision, and a constant row would come out as the bias.
    x = torch.full((1, 1, 2, 2, 4), 4096.0)
    x[..., ::2] = 4097
    with torch.autocast(run.device, dtype):
        merged = run(patch_merging, x, torch.ones(16), torch.zeros(16))
    torch.testing.assert_close(merged.float().abs(), torch.ones(1, 1, 1, 1, 16), atol=0.01, rtol=0)


@EVERY
def test_compiles_to_one_graph_for_all_batch_sizes(run):
    _, weight, bias = make(ODD, dtype=torch.float32, grad=True)
    suite.assert_compiles(
        run,
        lambda *inputs: patch_merging(*inputs, kernels=run.kernels),
        lambda batch: [make(ODD, batch, dtype=torch.float32, grad=True)[0], weight, bias],
        exact=False,
    )


@pytest.mark.parametrize(
    ("argument", "value", "said"),
    [
        ("x", torch.zeros(4, 6, 6, 2), (4, 6, 6, 2)),
        ("x", torch.zeros(1, 2, 4, 6, 2, dtype=torch.int32), torch.int32),
        ("x", None, "NoneType"),
        ("weight", torch.ones(2), (2,)),
        ("weight", torch.ones(1, 8), (1, 8)),
        ("weight", torch.ones(8, device="meta"), "meta"),
        ("weight", None, "NoneType"),
        ("bias", torch.ones(7), (7,)),
        ("bias", torch.ones(8, device="meta"), "meta"),
        ("bias", 0.0, "float"),
        ("eps", -1.0, -1.0),
        ("eps", "small", "small"),
        ("kernels", "apex", "apex"),
    ],
)
def test_refusals(argument, value, said):
    arguments = {"x": torch.zeros(1, 2, 4, 6, 2), "weight": torch.ones(8), "bias": torch.zeros(8)}
    with suite.refuses("patch_merging", argument, said):
        patch_merging(**{**arguments, argument: value})
