"""window_attention: one test for each way in which upstream can be misread.

Each compares with the float64 loops, and shows that the tempting wrong result is far away.
"""

import loops
import numpy as np
import operator_suite as suite
import plain
import pytest
import torch
from torch.nn import functional as F

from videoswin_kernels import window_attention

EVERY = suite.every("window_attention")
EVERY_LOW = suite.every("window_attention", suite.LOW)
FULL, HALF = (8, 7, 7), (4, 3, 3)
CPU = suite.Run("reference", "cpu")


class Case:
    """One set of arguments, for the operator, the naive function and the loops."""

    def __init__(self, grid, window, shift, *, batch=1, heads=2, width=16, std=1.0, dtype=None):
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

    def run(self, run, **options):
        options = self.options | {"pad_qkv": self.pad} | options
        return run(window_attention, self.qkv, self.table, **options)

    def naive(self, run=CPU, **options):
        options = self.options | {"pad_qkv": self.pad} | options
        return run.plain(plain.attention, self.qkv, self.table, **options)

    def exact(self):
        arrays = [value.cpu().double().numpy() for value in (self.qkv, self.table, self.pad)]
        window, shift, heads = self.options.values()
        return torch.from_numpy(
            loops.window_attention(*arrays[:2], window, shift, heads, arrays[2])
        )

    def check(self, run, *wrong):
        """The result is within the budget, and every wrong one is off by more than 0.1."""
        exact = self.exact()
        suite.assert_budget(self.run(run), exact, self.naive(run))
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


@EVERY
@pytest.mark.trap(1)
@pytest.mark.parametrize("grid", [(8, 4, 4), (4, 4, 7)])
def test_a_window_clamped_in_h_or_w_reads_the_first_tokens_of_the_full_one(grid, run):
    case = Case(grid, FULL, HALF, heads=1)
    offsets = true_rows(grid, FULL, (7, 6, 6))
    case.check(run, case.naive(rows=offsets))


@EVERY
@pytest.mark.trap(2)
def test_a_window_clamped_in_d_alone_uses_true_offsets(run):
    window, grid = (8, 3, 4), (5, 3, 4)
    case = Case(grid, window, (4, 1, 2))
    exact = case.naive(rows=true_rows(grid, window, (7, 2, 3)))
    torch.testing.assert_close(case.run(run), exact)
    # The center stays that of the configured window.
    case.check(run, case.naive(rows=true_rows(grid, window, (4, 2, 3))))


@EVERY
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
def test_an_axis_equal_to_its_window_has_no_shift(grid, left, run):
    case = Case(grid, (4, 3, 3), (2, 1, 1), batch=2)
    assert torch.equal(case.run(run), case.run(run, shift=left))
    if any(left):
        case.check(run, case.run(run, shift=(0, 0, 0)))


@EVERY
@pytest.mark.trap(4)
def test_an_axis_without_a_shift_has_one_region(run):
    case = Case((4, 6, 6), (2, 3, 3), (0, 1, 1))
    # What results if the unshifted axis were cut at L - w like the shifted ones.
    cut = case.naive(shift=(1, 1, 1))
    case.check(run, cut, case.naive(masked=0.0))


@EVERY
@pytest.mark.trap(5)
@pytest.mark.parametrize("grid", [(6, 10, 8), (4, 9, 6)])
def test_only_the_last_slab_is_masked(grid, run):
    case = Case(grid, (3, 5, 4), (1, 2, 2), heads=1)
    case.check(run, case.naive(masked=0.0))


@EVERY
@pytest.mark.trap(6)
def test_the_mask_is_minus_100_and_leaks_under_large_logits(run):
    case = Case((4, 6, 6), (2, 3, 3), (1, 1, 1))
    case.qkv *= 20
    case.check(run, case.naive(masked=-float("inf")), case.naive(masked=-1e4))


@EVERY
@pytest.mark.trap(7)
@pytest.mark.parametrize("shift", [(0, 0, 0), (2, 1, 1)])
def test_padded_places_are_keys_and_values(shift, run):
    case = Case((5, 4, 7), (4, 3, 3), shift)
    case.check(run, case.naive(pad_qkv=None), case.run(run, pad_qkv=None))
    # Keys so large that a pad takes all the weight of a query that sees one.
    case.qkv[..., :32], case.table[:], case.pad[:32] = 1.0, 0.0, 0.0
    case.pad[32:64], case.pad[64:] = 50.0, 5.0
    assert (case.run(run)[0, 4, 3, 6] - 5).abs().max() < 1e-5


@EVERY
def test_no_pad_qkv_is_zeros(run):
    case = Case((5, 4, 7), (4, 3, 3), (2, 1, 1))
    zeros = torch.zeros_like(case.pad)
    assert torch.equal(case.run(run, pad_qkv=None), case.run(run, pad_qkv=zeros))


@EVERY
@pytest.mark.trap(8)
@pytest.mark.parametrize("grid", [(5, 7, 7), (4, 7, 14), (3, 5, 9)])
def test_probabilities_sum_to_one_for_odd_numbers_of_tokens(grid, run):
    """Nothing but the window's own N places has weight, whatever N is padded to inside."""
    case = Case(grid, (4, 7, 7), (2, 3, 3))
    case.qkv[..., 64:], case.pad[64:] = 1, 1
    result = case.run(run)
    torch.testing.assert_close(result, torch.ones_like(result))


@EVERY
@pytest.mark.trap(9)
@pytest.mark.parametrize("shift", [(1, 1, 1), (0, 2, 1), (1, 0, 0)])
def test_roll_goes_against_the_shift_and_comes_back(shift, run):
    grid, window = (4, 6, 9), (2, 3, 3)
    case = Case(grid, window, shift, heads=1)
    numbers = torch.arange(float(np.prod(grid))).view(1, *grid, 1)
    case.qkv[..., :32], case.qkv[..., 32:] = 0, numbers
    # One row far above the others makes the attention the identity: out comes what went in.
    case.table[:] = 0
    case.table[(loops.table_rows(window) - 1) // 2] = 500
    assert torch.equal(case.run(run), numbers.expand(1, *grid, 16))
    # A flat table makes it the mean over the window: which window depends on the direction.
    case.table[:] = 0
    back = tuple((size - step) % size for size, step in zip(window, shift, strict=True))
    other = () if back == shift else (case.naive(shift=back),)
    case.check(run, *other, case.naive(shift=(0, 0, 0)))


@EVERY
@pytest.mark.trap(10)
def test_the_batch_is_outermost(run):
    case = Case((5, 4, 7), (2, 3, 3), (1, 1, 1), batch=3)
    case.check(run)
    together = case.run(run)
    for number, sample in enumerate(case.qkv.split(1)):
        case.qkv = sample
        torch.testing.assert_close(case.run(run)[0], together[number])


@EVERY
@pytest.mark.trap(11)
def test_qkv_is_packed_as_three_then_heads(run):
    case = Case((2, 4, 3), (2, 2, 3), (1, 1, 1), heads=3, width=32)
    swapped = case.qkv.unflatten(-1, (3, 3, 32)).transpose(-3, -2).flatten(-3)
    wrong = plain.attention(swapped, case.table, pad_qkv=case.pad, **case.options)
    case.check(run, wrong)


@EVERY_LOW
@pytest.mark.trap(12)
def test_scale_is_applied_to_q_before_rounding(run, dtype):
    case = Case((4, 6, 6), (2, 3, 3), (1, 1, 1), heads=1, width=32, dtype=dtype)
    case.check(run)
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
    result = run(window_attention, qkv, table, window=(1, 1, 2), num_heads=1)
    upstream = 1 / (1 + np.exp(-score))
    if run.kernels == "reference":
        expected = torch.full_like(result, upstream, dtype=torch.float64)
        torch.testing.assert_close(result.double(), expected, atol=0.01, rtol=0)
    # Kernels may scale in float32, which is nearer to the exact half, and may not be worse.
    assert (result.double() - 0.5).abs().max() <= abs(upstream - 0.5) + 0.01


@EVERY_LOW
@pytest.mark.trap(13)
def test_bias_mask_and_softmax_are_float32(run, dtype):
    case = Case((4, 6, 6), (2, 3, 3), (1, 1, 1), dtype=dtype, std=5)
    exact = case.exact()
    error = (case.run(run) - exact).abs().mean()
    low = (case.naive(low_bias=True) - exact).abs().mean()
    suite.assert_budget(case.run(run), exact, case.naive(run))
    assert error < low
    # Biases of 1024 and 1024.25 are one number in both low precisions.
    qkv = torch.zeros(1, 1, 1, 2, 48, dtype=dtype)
    qkv[0, 0, 0, 1, 32:] = 1
    table = torch.tensor([[1024.25], [1024.0], [1024.0]])
    result = run(window_attention, qkv, table, window=(1, 1, 2), num_heads=1)
    expected = torch.full_like(result[0, 0, 0, 0], 1 / (1 + np.exp(-0.25)))
    torch.testing.assert_close(result[0, 0, 0, 0], expected, atol=0.005, rtol=0)


@EVERY
@pytest.mark.trap(21)
@pytest.mark.parametrize(("grid", "used"), [((4, 7, 7), 1183), ((8, 4, 4), 783)])
def test_only_table_rows_of_a_clamped_window_get_gradient(grid, used, run):
    case = Case(grid, FULL, HALF, heads=1, std=1)
    weight = suite.random(1, *grid, 16, dtype=torch.float32)
    exact = case.table.double().requires_grad_()
    naive = plain.attention(case.qkv.double(), exact, **case.options)
    (exact,) = suite.gradients(naive, [exact], weight)
    case.table.requires_grad_()
    (own,) = suite.gradients(case.naive(run), [case.table], weight)
    (grad,) = suite.gradients(case.run(run), [case.table], weight)
    suite.assert_budget(grad, exact, own)
    assert torch.equal(grad != 0, exact != 0)
    assert int((grad != 0).sum()) == used


@suite.every("window_attention", [torch.float32, *suite.LOW])
@pytest.mark.trap(21)
def test_table_gradient_sums_over_many_windows_the_same_each_time(run, dtype):
    batch = 2 if run.is_interpreted else 4
    case = Case((4, 12, 15), (2, 3, 3), (1, 1, 1), batch=batch, dtype=dtype)
    weight = suite.random(batch, 4, 12, 15, 32, dtype=dtype)
    exact = case.table.double().requires_grad_()
    options = case.options | {"pad_qkv": case.pad.double()}
    naive = plain.attention(case.qkv.double(), exact, **options)
    (exact,) = suite.gradients(naive, [exact], weight)
    case.table.requires_grad_()
    (own,) = suite.gradients(case.naive(run), [case.table], weight)
    first, second = (suite.gradients(case.run(run), [case.table], weight)[0] for _ in range(2))
    assert torch.equal(first, second)
    suite.assert_budget(first, exact, own, torch.float32)


def through_projection(run, grid, window, shift):
    """Gradients of norm and qkv projection: with pad_qkv, and as upstream that pads before it."""
    heads, channels = 2, 8
    shapes = {"x": (2, *grid, channels), "gamma": (channels,), "beta": (channels,)}
    shapes |= {"weight": (3 * channels, channels), "bias": (3 * channels,)}
    leaves = {name: suite.random(*shape, grad=True) for name, shape in shapes.items()}
    x, gamma, beta, weight, bias = leaves.values()
    table = suite.random(loops.table_rows(window), heads)
    options = {"window": window, "shift": shift, "num_heads": heads}

    normed = F.layer_norm(x, (channels,), gamma, beta)
    mine = run(window_attention, F.linear(normed, weight, bias), table, pad_qkv=bias, **options)
    padded = loops.clamp(grid, window, shift)[2]
    missing = [padded[axis] - grid[axis] for axis in range(3)]
    normed = F.layer_norm(x, (channels,), gamma, beta)
    padded = F.pad(normed, (0, 0, 0, missing[2], 0, missing[1], 0, missing[0]))
    upstream = plain.attention(F.linear(padded, weight, bias), table, **options)
    upstream = upstream[:, : grid[0], : grid[1], : grid[2]]
    assert relative_error(mine, upstream) < 2e-15
    upstream_grads = suite.gradients(upstream, list(leaves.values()), torch.cos(mine.detach()))
    grads = suite.gradients(mine, list(leaves.values()), torch.cos(mine.detach()))
    return dict(zip(leaves, zip(grads, upstream_grads, strict=True), strict=True))


@EVERY
@pytest.mark.trap(21)
def test_gradients_are_the_same_each_time_without_deterministic_algorithms(run):
    # Two threads and the full window: enough for a sum in the order of arrival to differ.
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(2)
    case = Case((8, 7, 7), FULL, HALF, heads=1, batch=2)
    weight = suite.random(2, 8, 7, 7, 16, dtype=torch.float32)
    case.table.requires_grad_()
    first, *others = (
        suite.gradients(case.run(run), [case.table], weight)[0]
        for _ in range(2 if run.is_interpreted else 12)
    )
    assert all(torch.equal(first, other) for other in others)


def relative_error(got, expected):
    return ((got - expected).norm() / expected.norm()).item()


FLOAT64 = suite.every("window_attention", [torch.float64])


@FLOAT64
@pytest.mark.trap(22)
@pytest.mark.parametrize("shift", [(0, 0, 0), (2, 1, 1)])
def test_gradient_of_the_qkv_bias_includes_padded_places(shift, run, dtype):
    grads = through_projection(run, (5, 4, 7), (4, 3, 3), shift)
    assert relative_error(*grads["bias"]) < 2e-15
    assert relative_error(*grads["weight"]) < 2e-15


@FLOAT64
@pytest.mark.trap(23)
@pytest.mark.parametrize("shift", [(0, 0, 0), (2, 1, 1)])
def test_gradient_of_the_norm_does_not_include_padded_places(shift, run, dtype):
    grads = through_projection(run, (5, 4, 7), (4, 3, 3), shift)
    for name in ("x", "gamma", "beta"):
        assert relative_error(*grads[name]) < 2e-15


@EVERY
@pytest.mark.trap(22)
@pytest.mark.parametrize("grid", [(4, 6, 6), (5, 5, 7), (2, 2, 2), (1, 3, 8)])
def test_gradient_of_pad_qkv_is_never_none_and_has_no_part_for_q(grid, run):
    case = Case(grid, (2, 3, 3), (1, 1, 1))
    case.pad.requires_grad_()
    (grad,) = suite.gradients(case.run(run), [case.pad], torch.ones(1, *grid, 32))
    is_padded = loops.clamp(grid, (2, 3, 3), (1, 1, 1))[2] != grid
    assert torch.equal(grad[:32], torch.zeros(32))
    assert bool(grad[32:].all()) == is_padded
    assert bool(grad.any()) == is_padded


@EVERY
@pytest.mark.trap(32)
def test_a_stage_in_channels_first_order(run):
    case = Case((5, 4, 7), (2, 3, 3), (1, 1, 1), batch=2)
    case.qkv = run.put(case.qkv).movedim(-1, 1).contiguous().movedim(1, -1)
    assert not case.qkv.is_contiguous()
    case.check(run)
