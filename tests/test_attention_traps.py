"""window_attention: one test for each way in which upstream can be misread.

Each compares with the float64 loops, and shows that the tempting wrong result is far away.
"""

import loops
import numpy as np
import operator_suite as suite
import pytest
import torch
from torch.nn import functional as F

from videoswin_kernels import window_attention

KERNELS = pytest.mark.parametrize("kernels", suite.kernel_sets("window_attention"))
FULL, HALF = (8, 7, 7), (4, 3, 3)


class Case:
    """One set of arguments, for the operator, the naive function and the loops."""

    def __init__(self, grid, window, shift, *, batch=1, heads=2, width=8, std=1.0, dtype=None):
        dtype = dtype or torch.float32
        wide = 3 * heads * width
        self.options = {"window": window, "shift": shift, "num_heads": heads}
        self.grid = grid
        self.qkv = suite.random(batch, *grid, wide, dtype=dtype)
        # Large tables and pads: at initialisation both are near zero and hide every mistake.
        self.table = suite.random(
            loops.table_rows(window),
            heads,
            std=std,
            dtype=torch.promote_types(dtype, torch.float32),
        )
        self.pad = suite.random(wide, dtype=dtype)

    def run(self, kernels, **options):
        options = self.options | {"pad_qkv": self.pad, "kernels": kernels} | options
        return window_attention(self.qkv, self.table, **options)

    def naive(self, **options):
        options = self.options | {"pad_qkv": self.pad} | options
        return suite.naive_attention(self.qkv, self.table, **options)

    def exact(self):
        arrays = [value.double().numpy() for value in (self.qkv, self.table, self.pad)]
        window, shift, heads = self.options.values()
        return torch.from_numpy(
            loops.window_attention(*arrays[:2], window, shift, heads, arrays[2])
        )

    def check(self, kernels, *wrong):
        """The result is within the budget, and every wrong one is off by more than 0.1."""
        exact = self.exact()
        suite.assert_budget(self.run(kernels), exact, self.naive())
        for other in wrong:
            assert (other - exact).abs().max() > 0.1


def true_rows(clamped, window, center):
    """[N, N] rows by the true offsets in a clamped window, which upstream does not always use."""
    extent = tuple(2 * size - 1 for size in window)
    return np.array(
        [
            [loops.flat(tuple(i[a] - j[a] + center[a] for a in range(3)), extent) for j in places]
            for places in [loops.positions(clamped)]
            for i in places
        ]
    )


@KERNELS
@pytest.mark.trap(1)
@pytest.mark.parametrize("grid", [(8, 4, 4), (4, 4, 7)])
def test_a_window_clamped_in_h_or_w_reads_the_first_tokens_of_the_full_one(grid, kernels):
    case = Case(grid, FULL, HALF, heads=1)
    offsets = true_rows(grid, FULL, (7, 6, 6))
    case.check(kernels, case.naive(rows=offsets))


@KERNELS
@pytest.mark.trap(2)
def test_a_window_clamped_in_d_alone_uses_true_offsets(kernels):
    window, grid = (8, 3, 4), (5, 3, 4)
    case = Case(grid, window, (4, 1, 2))
    exact = case.naive(rows=true_rows(grid, window, (7, 2, 3)))
    torch.testing.assert_close(case.run(kernels), exact)
    # The center stays that of the configured window.
    case.check(kernels, case.naive(rows=true_rows(grid, window, (4, 2, 3))))


@KERNELS
@pytest.mark.trap(3)
@pytest.mark.parametrize(
    ("grid", "left"),
    [
        ((4, 3, 3), (0, 0, 0)),
        ((4, 6, 6), (0, 1, 1)),
        ((8, 3, 3), (2, 0, 0)),
        ((8, 6, 3), (2, 1, 0)),
    ],
)
def test_an_axis_equal_to_its_window_has_no_shift(grid, left, kernels):
    case = Case(grid, (4, 3, 3), (2, 1, 1), batch=2)
    assert torch.equal(case.run(kernels), case.run(kernels, shift=left))
    if any(left):
        case.check(kernels, case.run(kernels, shift=(0, 0, 0)))


@KERNELS
@pytest.mark.trap(4)
def test_an_axis_without_a_shift_has_one_region(kernels):
    case = Case((4, 6, 6), (2, 3, 3), (0, 1, 1))
    # What results if the unshifted axis were cut at L - w like the shifted ones.
    cut = case.naive(shift=(1, 1, 1))
    case.check(kernels, cut, case.naive(masked=0.0))


@KERNELS
@pytest.mark.trap(5)
@pytest.mark.parametrize("grid", [(6, 10, 8), (4, 9, 6)])
def test_only_the_last_slab_is_masked(grid, kernels):
    case = Case(grid, (3, 5, 4), (1, 2, 2), heads=1)
    case.check(kernels, case.naive(masked=0.0))


@KERNELS
@pytest.mark.trap(6)
def test_the_mask_is_minus_100_and_leaks_under_large_logits(kernels):
    case = Case((4, 6, 6), (2, 3, 3), (1, 1, 1))
    case.qkv *= 20
    case.check(kernels, case.naive(masked=-float("inf")), case.naive(masked=-1e4))


@KERNELS
@pytest.mark.trap(7)
@pytest.mark.parametrize("shift", [(0, 0, 0), (2, 1, 1)])
def test_padded_places_are_keys_and_values(shift, kernels):
    case = Case((5, 4, 7), (4, 3, 3), shift)
    case.check(kernels, case.naive(pad_qkv=None), case.run(kernels, pad_qkv=None))
    # Keys so large that a pad takes all the weight of a query that sees one.
    case.qkv[..., :16], case.table[:], case.pad[:16] = 1.0, 0.0, 0.0
    case.pad[16:32], case.pad[32:] = 50.0, 5.0
    assert (case.run(kernels)[0, 4, 3, 6] - 5).abs().max() < 1e-5


@KERNELS
def test_no_pad_qkv_is_zeros(kernels):
    case = Case((5, 4, 7), (4, 3, 3), (2, 1, 1))
    zeros = torch.zeros_like(case.pad)
    assert torch.equal(case.run(kernels, pad_qkv=None), case.run(kernels, pad_qkv=zeros))


@KERNELS
@pytest.mark.trap(8)
@pytest.mark.parametrize("grid", [(5, 7, 7), (4, 7, 14), (3, 5, 9)])
def test_probabilities_sum_to_one_for_odd_numbers_of_tokens(grid, kernels):
    """Nothing but the window's own N places has weight, whatever N is padded to inside."""
    case = Case(grid, (4, 7, 7), (2, 3, 3))
    case.qkv[..., 32:], case.pad[32:] = 1, 1
    result = case.run(kernels)
    torch.testing.assert_close(result, torch.ones_like(result))


@KERNELS
@pytest.mark.trap(9)
@pytest.mark.parametrize("shift", [(1, 1, 1), (0, 2, 1), (1, 0, 0)])
def test_roll_goes_against_the_shift_and_comes_back(shift, kernels):
    grid, window = (4, 6, 9), (2, 3, 3)
    case = Case(grid, window, shift, heads=1, width=8)
    numbers = torch.arange(float(np.prod(grid))).view(1, *grid, 1)
    case.qkv[..., :16], case.qkv[..., 16:] = 0, numbers
    # One row far above the others makes the attention the identity: out comes what went in.
    case.table[:] = 0
    case.table[(loops.table_rows(window) - 1) // 2] = 500
    assert torch.equal(case.run(kernels), numbers.expand(1, *grid, 8))
    # A flat table makes it the mean over the window: which window depends on the direction.
    case.table[:] = 0
    back = tuple((size - step) % size for size, step in zip(window, shift, strict=True))
    other = () if back == shift else (case.naive(shift=back),)
    case.check(kernels, *other, case.naive(shift=(0, 0, 0)))


@KERNELS
@pytest.mark.trap(10)
def test_the_batch_is_outermost(kernels):
    case = Case((5, 4, 7), (2, 3, 3), (1, 1, 1), batch=3)
    case.check(kernels)
    together = case.run(kernels)
    for number, sample in enumerate(case.qkv.split(1)):
        case.qkv = sample
        torch.testing.assert_close(case.run(kernels)[0], together[number])


@KERNELS
@pytest.mark.trap(11)
def test_qkv_is_packed_as_three_then_heads(kernels):
    case = Case((2, 4, 3), (2, 2, 3), (1, 1, 1), heads=3, width=32)
    swapped = case.qkv.unflatten(-1, (3, 3, 32)).transpose(-3, -2).flatten(-3)
    wrong = suite.naive_attention(swapped, case.table, pad_qkv=case.pad, **case.options)
    case.check(kernels, wrong)


@KERNELS
@pytest.mark.trap(12)
@pytest.mark.parametrize("dtype", suite.LOW)
def test_scale_is_applied_to_q_before_rounding(dtype, kernels):
    case = Case((4, 6, 6), (2, 3, 3), (1, 1, 1), heads=1, width=32, dtype=dtype)
    case.check(kernels)
    # With q = (m, 1) and k = (K, -mK) the score is 0, unless q * scale has been rounded first.
    q = torch.stack([torch.arange(3.0, 40, 2), torch.ones(19)], -1).to(dtype)
    low = (q * 32**-0.5).double()
    score_of_one = low[:, 0] - q[:, 0].double() * low[:, 1]
    best = int((score_of_one.abs() / q[:, 0]).argmax())
    factor = 2.0 ** round(np.log2(2 / abs(score_of_one[best].item())))
    score = factor * score_of_one[best].item()
    assert 1 < abs(score) < 3
    qkv = torch.zeros(1, 1, 1, 2, 96, dtype=dtype)
    qkv[..., :2] = q[best]
    qkv[0, 0, 0, 1, 32:34] = torch.tensor([factor, -factor * q[best, 0].item()])
    qkv[0, 0, 0, 1, 64:] = 1
    assert torch.isfinite(qkv).all()
    table = torch.zeros(3, 1)
    result = window_attention(qkv, table, window=(1, 1, 2), num_heads=1, kernels=kernels)
    expected = torch.full_like(result, 1 / (1 + np.exp(-score)), dtype=torch.float64)
    torch.testing.assert_close(result.double(), expected, atol=0.01, rtol=0)


@KERNELS
@pytest.mark.trap(13)
@pytest.mark.parametrize("dtype", suite.LOW)
def test_bias_mask_and_softmax_are_float32(dtype, kernels):
    case = Case((4, 6, 6), (2, 3, 3), (1, 1, 1), dtype=dtype, std=5)
    exact = case.exact()
    error = (case.run(kernels) - exact).abs().mean()
    low = (case.naive(low_bias=True) - exact).abs().mean()
    suite.assert_budget(case.run(kernels), exact, case.naive())
    assert error < low
    # Biases of 1024 and 1024.25 are one number in both low precisions.
    qkv = torch.zeros(1, 1, 1, 2, 12, dtype=dtype)
    qkv[0, 0, 0, 1, 8:] = 1
    table = torch.tensor([[1024.25], [1024.0], [1024.0]])
    result = window_attention(qkv, table, window=(1, 1, 2), num_heads=1, kernels=kernels)
    expected = torch.full_like(result[0, 0, 0, 0], 1 / (1 + np.exp(-0.25)))
    torch.testing.assert_close(result[0, 0, 0, 0], expected, atol=0.005, rtol=0)


@KERNELS
@pytest.mark.trap(21)
@pytest.mark.parametrize(("grid", "used"), [((4, 7, 7), 1183), ((8, 4, 4), 783)])
def test_only_table_rows_of_a_clamped_window_get_gradient(grid, used, kernels):
    case = Case(grid, FULL, HALF, heads=1, width=4, std=1)
    weight = suite.random(1, *grid, 4, dtype=torch.float32)
    exact = case.table.double().requires_grad_()
    naive = suite.naive_attention(case.qkv.double(), exact, **case.options)
    (exact,) = suite.gradients(naive, [exact], weight)
    case.table.requires_grad_()
    (own,) = suite.gradients(case.naive(), [case.table], weight)
    (grad,) = suite.gradients(case.run(kernels), [case.table], weight)
    suite.assert_budget(grad, exact, own)
    assert torch.equal(grad != 0, exact != 0)
    assert int((grad != 0).sum()) == used


@KERNELS
@pytest.mark.trap(21)
@pytest.mark.parametrize("dtype", [torch.float32, *suite.LOW])
def test_table_gradient_sums_over_many_windows_the_same_each_time(dtype, kernels):
    case = Case((4, 12, 15), (2, 3, 3), (1, 1, 1), batch=4, dtype=dtype)
    weight = suite.random(4, 4, 12, 15, 16, dtype=dtype)
    exact = case.table.double().requires_grad_()
    options = case.options | {"pad_qkv": case.pad.double()}
    naive = suite.naive_attention(case.qkv.double(), exact, **options)
    (exact,) = suite.gradients(naive, [exact], weight)
    case.table.requires_grad_()
    (own,) = suite.gradients(case.naive(), [case.table], weight)
    first, second = (suite.gradients(case.run(kernels), [case.table], weight)[0] for _ in range(2))
    assert torch.equal(first, second)
    suite.assert_budget(first, exact, own, torch.float32)


def through_projection(kernels, grid, window, shift):
    """Gradients of norm and qkv projection: with pad_qkv, and as upstream that pads before it."""
    heads, channels = 2, 8
    shapes = {"x": (2, *grid, channels), "gamma": (channels,), "beta": (channels,)}
    shapes |= {"weight": (3 * channels, channels), "bias": (3 * channels,)}
    leaves = {name: suite.random(*shape, grad=True) for name, shape in shapes.items()}
    x, gamma, beta, weight, bias = leaves.values()
    table = suite.random(loops.table_rows(window), heads)
    options = {"window": window, "shift": shift, "num_heads": heads}

    normed = F.layer_norm(x, (channels,), gamma, beta)
    mine = window_attention(
        F.linear(normed, weight, bias), table, pad_qkv=bias, kernels=kernels, **options
    )
    padded = loops.clamp(grid, window, shift)[2]
    missing = [padded[axis] - grid[axis] for axis in range(3)]
    normed = F.layer_norm(x, (channels,), gamma, beta)
    padded = F.pad(normed, (0, 0, 0, missing[2], 0, missing[1], 0, missing[0]))
    upstream = suite.naive_attention(F.linear(padded, weight, bias), table, **options)
    upstream = upstream[:, : grid[0], : grid[1], : grid[2]]
    assert relative_error(mine, upstream) < 2e-15
    upstream_grads = suite.gradients(upstream, list(leaves.values()), torch.cos(mine.detach()))
    grads = suite.gradients(mine, list(leaves.values()), torch.cos(mine.detach()))
    return dict(zip(leaves, zip(grads, upstream_grads, strict=True), strict=True))


@KERNELS
@pytest.mark.trap(21)
def test_gradients_are_the_same_each_time_without_deterministic_algorithms(kernels):
    # Two threads and the full window: enough for a sum in the order of arrival to differ.
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(2)
    case = Case((8, 7, 7), FULL, HALF, heads=1, width=8, batch=2)
    weight = suite.random(2, 8, 7, 7, 8, dtype=torch.float32)
    case.table.requires_grad_()
    first, *others = (
        suite.gradients(case.run(kernels), [case.table], weight)[0] for _ in range(12)
    )
    assert all(torch.equal(first, other) for other in others)


def relative_error(got, expected):
    return ((got - expected).norm() / expected.norm()).item()


FLOAT64 = pytest.mark.parametrize(
    "kernels",
    [word for word in suite.kernel_sets("window_attention") if word not in ("triton", "cuda")],
)


@FLOAT64
@pytest.mark.trap(22)
@pytest.mark.parametrize("shift", [(0, 0, 0), (2, 1, 1)])
def test_gradient_of_the_qkv_bias_includes_padded_places(shift, kernels):
    grads = through_projection(kernels, (5, 4, 7), (4, 3, 3), shift)
    assert relative_error(*grads["bias"]) < 2e-15
    assert relative_error(*grads["weight"]) < 2e-15


@FLOAT64
@pytest.mark.trap(23)
@pytest.mark.parametrize("shift", [(0, 0, 0), (2, 1, 1)])
def test_gradient_of_the_norm_does_not_include_padded_places(shift, kernels):
    grads = through_projection(kernels, (5, 4, 7), (4, 3, 3), shift)
    for name in ("x", "gamma", "beta"):
        assert relative_error(*grads[name]) < 2e-15


@KERNELS
@pytest.mark.trap(22)
@pytest.mark.parametrize("grid", [(4, 6, 6), (5, 4, 7), (2, 2, 2), (1, 3, 8)])
def test_gradient_of_pad_qkv_is_never_none_and_has_no_part_for_q(grid, kernels):
    case = Case(grid, (2, 3, 3), (1, 1, 1))
    case.pad.requires_grad_()
    (grad,) = suite.gradients(case.run(kernels), [case.pad], torch.ones(1, *grid, 16))
    is_padded = loops.clamp(grid, (2, 3, 3), (1, 1, 1))[2] != grid
    assert torch.equal(grad[:16], torch.zeros(16))
    assert bool(grad[16:].all()) == is_padded
    assert bool(grad.any()) == is_padded


@KERNELS
@pytest.mark.trap(32)
def test_a_stage_in_channels_first_order(kernels):
    case = Case((5, 4, 7), (2, 3, 3), (1, 1, 1), batch=2)
    case.qkv = case.qkv.movedim(-1, 1).contiguous().movedim(1, -1)
    assert not case.qkv.is_contiguous()
    case.check(kernels)
