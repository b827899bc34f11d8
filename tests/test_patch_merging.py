"""patch_merging: 2 x 2 neighbours side by side, LayerNorm over the four of them."""

import loops
import operator_suite as suite
import pytest
import torch

from videoswin_kernels import patch_merging

KERNELS = pytest.mark.parametrize("kernels", suite.kernel_sets("patch_merging"))
GRIDS = [(2, 4, 6), (3, 5, 4), (2, 4, 7), (2, 7, 7), (1, 1, 1), (3, 1, 2)]
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


@KERNELS
@pytest.mark.parametrize("dtype", suite.DTYPES)
@pytest.mark.parametrize("grid", GRIDS)
def test_forward(grid, dtype, kernels):
    inputs = make(grid, dtype=dtype)
    merged = patch_merging(*inputs, kernels=kernels)
    exact = judged(inputs)
    assert merged.is_contiguous()
    if dtype == torch.float64:
        suite.assert_near_loops(merged, exact.numpy())
    suite.assert_budget(merged, exact, suite.naive_merging(*inputs), dtype)


@KERNELS
@pytest.mark.parametrize("dtype", suite.DTYPES)
@pytest.mark.parametrize("grid", GRIDS)
def test_gradients(grid, dtype, kernels):
    inputs = make(grid, dtype=dtype, grad=True)
    leaves = [suite.exact_leaf(value) for value in inputs]
    merged = patch_merging(*inputs, kernels=kernels)
    weight = suite.random(*merged.shape, dtype=dtype)
    got = suite.gradients(merged, inputs, weight)
    naive = suite.gradients(suite.naive_merging(*inputs), inputs, weight)
    exact = suite.gradients(suite.naive_merging(*leaves), leaves, weight)
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


@KERNELS
@pytest.mark.trap(15)
def test_neighbours_are_in_the_order_of_h_first(kernels):
    # Tokens that say where they stand: the normed row shows in which order they came.
    h, w = torch.arange(4.0)[:, None], torch.arange(6.0)
    x = (h * 10 + w).view(1, 1, 4, 6, 1).repeat(2, 2, 1, 1, 1)
    merged = patch_merging(x, torch.ones(4), torch.zeros(4), kernels=kernels)
    # The token below comes second, the one to the right third.
    four = torch.tensor([0.0, 10.0, 1.0, 11.0])
    expected = (four - four.mean()) / (four.var(unbiased=False) + 1e-5).sqrt()
    torch.testing.assert_close(merged, expected.expand(2, 2, 2, 3, 4))
    # Weights are per output channel and apply after the norm, not to what comes in.
    weight, bias = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([0.0, 10.0, 20.0, 30.0])
    merged = patch_merging(x, weight, bias, kernels=kernels)
    torch.testing.assert_close(merged, (expected * weight + bias).expand(2, 2, 2, 3, 4))


@KERNELS
@pytest.mark.trap(16)
def test_padded_zeros_take_part_in_the_statistics(kernels):
    x, weight, _ = make((2, 7, 7), dtype=torch.float32)
    x = x.abs() + 1  # so that a zero is far from the mean
    merged = patch_merging(x, weight, torch.zeros_like(weight), kernels=kernels)
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


@KERNELS
@pytest.mark.trap(27)
def test_eps_is_inside_the_root_and_1e_minus_5_by_default(kernels):
    x, weight, bias = make(ODD, dtype=torch.float32)
    x = x * 1e-3
    naive = suite.naive_merging(x, weight, bias)
    exact = judged((x, weight, bias))
    suite.assert_budget(patch_merging(x, weight, bias, kernels=kernels), exact, naive)
    assert (judged((x, weight, bias), eps=1e-6) - exact).abs().max() > 0.1
    exact = judged((x, weight, bias), eps=1e-3)
    naive = suite.naive_merging(x, weight, bias, eps=1e-3)
    suite.assert_budget(patch_merging(x, weight, bias, eps=1e-3, kernels=kernels), exact, naive)


@KERNELS
@pytest.mark.parametrize("dtype", suite.LOW)
def test_statistics_are_float32(dtype, kernels):
    x, weight, bias = make(ODD, dtype=dtype)
    x = x + 30  # a sum of squares in the low precision would lose the deviation
    exact = judged((x, weight, bias))
    naive = suite.naive_merging(x.float(), weight.float(), bias.float()).to(dtype)
    suite.assert_budget(patch_merging(x, weight, bias, kernels=kernels), exact, naive)


@KERNELS
@pytest.mark.trap(32)
def test_every_layout(kernels):
    inputs = make(ODD, dtype=torch.float32)
    exact, naive = judged(inputs), suite.naive_merging(*inputs)
    for view in suite.layouts(inputs[0]).values():
        suite.assert_budget(patch_merging(view, *inputs[1:], kernels=kernels), exact, naive)
    weight = torch.stack([inputs[1], inputs[1]], -1)[:, 1]
    merged = patch_merging(inputs[0], weight, inputs[2], kernels=kernels)
    suite.assert_budget(merged, exact, naive)


@KERNELS
@pytest.mark.trap(32)
def test_gradient_of_a_channels_first_stage(kernels):
    clip = suite.random(2, CHANNELS, *ODD, dtype=torch.float32, grad=True)
    _, weight, bias = make(ODD, dtype=torch.float32)
    merged = patch_merging(clip.movedim(1, -1), weight, bias, kernels=kernels)
    up = suite.layouts(suite.random(*merged.shape, dtype=torch.float32))["channels first"]
    (got,) = torch.autograd.grad(merged, clip, up)
    (expected,) = torch.autograd.grad(
        suite.naive_merging(clip.movedim(1, -1), weight, bias), clip, up
    )
    torch.testing.assert_close(got, expected)


@KERNELS
@pytest.mark.parametrize("grid", [ODD, (1, 1, 1)])
def test_empty_batch(grid, kernels):
    inputs = make(grid, batch=0, dtype=torch.float32, grad=True)
    merged = patch_merging(*inputs, kernels=kernels)
    assert merged.shape == (0, grid[0], -(-grid[1] // 2), -(-grid[2] // 2), 4 * CHANNELS)
    for value, grad in zip(inputs, torch.autograd.grad(merged.sum(), inputs), strict=True):
        assert torch.equal(grad, torch.zeros_like(value))


@KERNELS
def test_more_than_65535_rows(kernels):
    x = suite.random(1, 4, 257, 255, 2, dtype=torch.float32)
    weight, bias = suite.random(8, dtype=torch.float32), suite.random(8, dtype=torch.float32)
    merged = patch_merging(x, weight, bias, kernels=kernels)
    assert merged.numel() // 8 > 65535
    exact = suite.naive_merging(x.double(), weight.double(), bias.double())
    suite.assert_budget(merged, exact, suite.naive_merging(x, weight, bias))


@KERNELS
@pytest.mark.parametrize("low", suite.LOW)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_result_is_low_and_the_stream_is_read_as_it_is(dtype, low, kernels):
    inputs = make(ODD, dtype=dtype, weights=torch.float32, grad=True)
    leaves = [suite.exact_leaf(value) for value in inputs]
    with torch.autocast("cpu", low):
        merged = patch_merging(*inputs, kernels=kernels)
        wide = [value.float() for value in inputs]
        # In eager autocast the norm is float32 and the reduction that reads it casts.
        eager = suite.naive_merging(*wide).to(low)
    exact = suite.naive_merging(*leaves)
    suite.assert_budget(merged, exact, eager, low)
    weight = suite.random(*merged.shape, dtype=torch.float32)
    got = suite.gradients(merged, inputs, weight)
    naive = suite.gradients(eager, inputs, weight)
    wanted = suite.gradients(exact, leaves, weight)
    for value, *parts in zip(inputs, got, wanted, naive, strict=True):
        suite.assert_budget(*parts, value.dtype)


@KERNELS
def test_autocast_does_not_round_what_it_reads(kernels):
    # 256 and 257 are one number in bfloat16, and a constant row would come out as the bias.
    x = torch.full((1, 1, 2, 2, 4), 256.0)
    x[..., ::2] = 257
    with torch.autocast("cpu", torch.bfloat16):
        merged = patch_merging(x, torch.ones(16), torch.zeros(16), kernels=kernels)
    torch.testing.assert_close(merged.float().abs(), torch.ones(1, 1, 1, 1, 16), atol=0.01, rtol=0)


@KERNELS
def test_compiles_to_one_graph_for_all_batch_sizes(kernels):
    _, weight, bias = make(ODD, dtype=torch.float32, grad=True)
    suite.assert_compiles(
        lambda *inputs: patch_merging(*inputs, kernels=kernels),
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
