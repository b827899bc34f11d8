"""CUDA C++ attention: its instances agree, for every N, table and order of threads.

A window of 8x7x7 or 16x7x7 can be asked of the canonical kernel and of the generic one. What both
have in common, any window included, is asked of every kernel set in tests/test_attention*.py.
"""

import itertools
from math import prod

import operator_suite as suite
import plain
import pytest
import torch
from test_attention import attend, exactly, make, naive
from test_attention_backward import TILES, check

from videoswin_kernels.cuda.attention import empty_tables, launch_window_attention
from videoswin_kernels.cuda.attention_backward import launch_window_attention_backward
from videoswin_kernels.ops._vectors import attention_vectors
from videoswin_kernels.testing import HEAD_WIDTHS, Case

RUNS = [run for run in suite.runs("window_attention") if run.kernels == "cuda"]
EVERY = pytest.mark.parametrize(
    "run",
    RUNS or [pytest.param(None, marks=pytest.mark.skip("no CUDA C++ attention runs here"))],
    ids=lambda run: "-".join(run or ("nobody",)),
)
LOW = pytest.mark.parametrize("dtype", suite.LOW, ids=("float16", "bfloat16"))
DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, *suite.LOW], ids=("float32", "float16", "bfloat16")
)
EPS32 = torch.finfo(torch.float32).eps
# Bytes of shared memory that a block of attention takes at most.
SHARED = 96 << 10

CANONICAL = {
    "8x7x7, padded": (Case((9, 7, 7), (8, 7, 7), (4, 3, 3)), 8),
    "8x7x7, masked": (Case((8, 9, 14), (8, 7, 7), (4, 3, 3)), 8),
    # Regions that meet between an even place and the next.
    "8x7x7, odd shift": (Case((14, 7, 7), (8, 7, 7), (3, 3, 3)), 8),
    "16x7x7, padded": (Case((16, 7, 13), (16, 7, 7), (8, 3, 3)), 16),
    "16x7x7, clamped": (Case((8, 7, 10), (16, 7, 7), (8, 3, 3)), 8),
}
# One window, without a pad or a mask: the smallest that the canonical kernel takes.
ONE = Case((8, 7, 7), (8, 7, 7), (4, 3, 3))
LONG = Case((16, 7, 7), (16, 7, 7), (8, 3, 3))
PADDED = CANONICAL["8x7x7, padded"][0]
SLOW_16 = pytest.param(CANONICAL["16x7x7, padded"][0], marks=pytest.mark.slow)


def wide(inputs):
    """The same values in float64."""
    return [value if value is None else value.double() for value in inputs]


def options(case, heads, scale):
    return {"window": case.window, "shift": case.shift, "num_heads": heads, "scale": scale}


def vectors_of(run, case):
    return attention_vectors("test", case.grid, case.window, case.shift, torch.device(run.device))


def launch(run, inputs, vectors, scale):
    """(out, log_sum_exp) on the CPU, of one launch with these vectors."""
    qkv, table, pad = (value if value is None else run.put(value.detach()) for value in inputs)
    clips, *grid, packed = qkv.shape
    heads = table.shape[1]
    out = qkv.new_full((clips, *grid, packed // 3), torch.nan)
    log_sum_exp = out.new_full((clips, heads, prod(grid)), torch.nan, dtype=torch.float32)
    launch_window_attention(out, log_sum_exp, qkv, table, pad, heads, scale, vectors)
    return out.cpu(), log_sum_exp.cpu()


def assert_both_instances(run, inputs, case, scale):
    """Canonical and generic: both within the budget, and near each other."""
    qkv, table, pad = inputs
    dtype, heads = qkv.dtype, table.shape[1]
    given = {"pad_qkv": pad, **options(case, heads, scale)}
    exactly_given = {**given, "pad_qkv": wide([pad])[0]}
    exact = plain.attention(*wide(inputs[:2]), **exactly_given)
    exact_sum = plain.log_sum_exp(*wide(inputs[:2]), **exactly_given)
    own = run.plain(plain.attention, qkv, table, **given)
    own_sum = run.plain(plain.log_sum_exp, qkv, table, **given)
    vectors = vectors_of(run, case)
    assert vectors.canonical_depth in (8, 16)
    found = [
        launch(run, inputs, vectors._replace(canonical_depth=depth), scale)
        for depth in (vectors.canonical_depth, 0)
    ]
    # Two roundings alone: of the weights, and of what comes out. No score, and no sum, is rounded.
    values = qkv[..., -qkv.shape[-1] // 3 :].abs().max().item()
    if vectors.has_padding and pad is not None:
        values = max(values, pad[-len(pad) // 3 :].abs().max().item())
    # Of a float32 score, some roundings at its size.
    largest = exact_sum.abs().max().item() + table[table.isfinite()].abs().max().item()
    limit = 8 * EPS32 * max(largest, 1.0)
    for out, log_sum_exp in found:
        suite.assert_budget(out, exact, own, dtype)
        suite.assert_budget(log_sum_exp, exact_sum, own_sum, torch.float32)
        rounding = torch.finfo(dtype).eps + limit
        assert (out.double() - exact).abs().max() <= rounding * values
        torch.testing.assert_close(log_sum_exp.double(), exact_sum, rtol=0, atol=limit)
    (out, log_sum_exp), (other, other_sum) = found
    assert (out.double() - other.double()).abs().max() <= 2 * rounding * values
    torch.testing.assert_close(log_sum_exp, other_sum, rtol=0, atol=limit)


@EVERY
@LOW
@pytest.mark.parametrize("name", CANONICAL)
@pytest.mark.trap(6)
@pytest.mark.trap(7)
@pytest.mark.trap(8)
def test_instances_agree(name, dtype, run):
    case, depth = CANONICAL[name]
    assert vectors_of(run, case).canonical_depth == depth
    # Emulated float16 takes twice as long as bfloat16.
    clips, heads = {8: (2, 2), 16: (1, 1 if dtype == torch.float16 else 3)}[depth]
    qkv = suite.random(clips, *case.grid, 96 * heads, dtype=dtype, std=2)
    table = suite.random((2 * case.window[0] - 1) * 169, heads, dtype=torch.float32)
    pad = suite.random(96 * heads, dtype=dtype, std=2)
    assert_both_instances(run, (qkv, table, pad), case, 32**-0.5)


@EVERY
@LOW
@pytest.mark.parametrize("scale", [0.5, -0.3, 1e-3])
@pytest.mark.parametrize("table_dtype", ["float32", "the same"])
def test_instances_agree_under_any_scale_without_pad_qkv(scale, table_dtype, dtype, run):
    qkv = suite.random(1, *PADDED.grid, 192, dtype=dtype)
    table = suite.random(15 * 169, 2, dtype=torch.float32 if table_dtype == "float32" else dtype)
    assert_both_instances(run, (qkv, table, None), PADDED, scale)


def positions(window):
    """Of each row of a table query - key as three numbers (d, h, w)."""
    axes = [torch.arange(1 - size, size, dtype=torch.float64) for size in window]
    return torch.meshgrid(*axes, indexing="ij")


def ramp(slope):
    """Biases that rise from each key to the next, in the order that attention has them."""

    def make_table(window):
        d, h, w = positions(window)
        return -slope * ((7 * h + w) * window[0] + d)

    return make_table


def hidden(axis, sign):
    def make_table(window):
        return torch.where(positions(window)[axis] * sign > 0, -torch.inf, 0.0)

    return make_table


TABLES = {
    "later frames hidden": hidden(0, -1),
    # Keys in rows above, and below: the first tiles of keys, and the last, have none to see.
    "first keys hidden": hidden(1, 1),
    "last keys hidden": hidden(1, -1),
    "300": lambda window: torch.full_like(positions(window)[0], 300),
    "-300": lambda window: torch.full_like(positions(window)[0], -300),
    "both": lambda window: torch.randn_like(positions(window)[0]).sign() * 300,
    # In all by 8, by 100 or by 800.
    **{
        f"{'rising' if slope > 0 else 'falling'} by {abs(slope)}": ramp(slope)
        for size in (0.02, 0.3, 2)
        for slope in (size, -size)
    },
}


@EVERY
@LOW
@pytest.mark.parametrize("name", TABLES)
@pytest.mark.trap(8)
@pytest.mark.parametrize("case", [PADDED, SLOW_16], ids=["8x7x7", "16x7x7"])
def test_instances_agree_under_every_kind_of_table(case, name, dtype, run):
    qkv = suite.random(1, *case.grid, 96, dtype=dtype)
    table = TABLES[name](case.window).reshape(-1, 1)
    table = (table + torch.randn_like(table)).float()
    pad = suite.random(96, dtype=dtype)
    assert_both_instances(run, (qkv, table, pad), case, 32**-0.5)


@EVERY
@LOW
# Times 8.2: the powers of 2 by which the weights of keys grow.
@pytest.mark.parametrize("step", [0.25, 0.9375, 1.0, 2.0, 12.0])
@pytest.mark.parametrize(
    "keys",
    [[391], [0], [15, 16, 63, 64, 191, 192], [390], [8, 200, 391], [*range(0, 392, 28)]],
    ids=["last", "first", "borders", "last but one", "spread", "stairs"],
)
def test_instances_agree_where_scores_rise_late(keys, step, dtype, run):
    """The largest score of a row is not the first by far, and each rise is more, or less, than 8.

    A level that is not raised in time overflows float16; one that is raised without what was
    summed before leaves it too large.
    """
    qkv = suite.random(1, *ONE.grid, 96, dtype=dtype)
    # In the order that attention has: the depth innermost.
    by_key = qkv[0].permute(1, 2, 0, 3).reshape(392, 96)
    by_key[:, :32], by_key[:, 32:64] = 1, by_key[:, 32:64] / 64
    for number, key in enumerate(keys):
        by_key[key:, 32:64] += step if len(keys) > 6 else 0
        by_key[key, 32:64] = step * (number + 1)
    qkv[0] = by_key.view(7, 7, 8, 96).permute(2, 0, 1, 3)
    table = suite.random(15 * 169, 1, dtype=torch.float32)
    assert_both_instances(run, (qkv, table, None), ONE, 32**-0.5)


@EVERY
@LOW
@pytest.mark.trap(6)
@pytest.mark.parametrize("name", ["8x7x7, masked", "16x7x7, padded"])
def test_a_mask_of_minus_100_leaks_in_both_instances(name, dtype, run):
    case = CANONICAL[name][0]
    qkv = suite.random(1, *case.grid, 96, dtype=dtype)
    qkv[..., :64] *= 20
    table = suite.random((2 * case.window[0] - 1) * 169, 1, dtype=torch.float32)
    inputs, given = (qkv, table, None), options(case, 1, 32**-0.5)
    assert_both_instances(run, inputs, case, 32**-0.5)
    exact, closed = (
        plain.attention(*wide(inputs[:2]), masked=value, **given) for value in (-100.0, -1e4)
    )
    out = launch(run, inputs, vectors_of(run, case), 32**-0.5)[0].double()
    assert (out - exact).abs().max() < 0.02
    assert (out - closed).abs().max() > 1


@EVERY
@LOW
def test_gradients_after_the_canonical_forward(dtype, run):
    inputs = make(PADDED, 1, dtype=dtype, width=32, grad=True)
    inputs = [inputs[0][..., :96], inputs[1][:, :1], inputs[2][:96]]
    inputs = [value.detach().clone().requires_grad_() for value in inputs]
    check(run, inputs, PADDED, num_heads=1, scale=32**-0.5)


@pytest.mark.parametrize("case", [ONE, LONG], ids=["8x7x7", "16x7x7"])
def test_the_canonical_kernel_runs_where_it_can_and_nowhere_else(case, control):
    run = suite.Run("cuda", "cpu")
    vectors = vectors_of(run, case)

    def switches(dtype, width, depth):
        qkv = torch.zeros(1, *case.grid, 3 * width, dtype=dtype)
        inputs = qkv, torch.zeros((2 * case.window[0] - 1) * 169, 1), None
        before = control.switches()
        launch(run, inputs, vectors._replace(canonical_depth=depth), 1.0)
        return control.switches() - before

    for dtype, width in itertools.product((torch.float32, *suite.LOW), HEAD_WIDTHS):
        if dtype == torch.float32 and case is LONG:
            continue
        is_another = switches(dtype, width, vectors.canonical_depth) != switches(dtype, width, 0)
        assert is_another == (width == 32 and dtype != torch.float32), (dtype, width)


NUMBERS = (1, 2, 15, 16, 17, 49, 63, 64, 65, 129)


@EVERY
@DTYPES
@pytest.mark.parametrize("tokens", NUMBERS)
@pytest.mark.trap(8)
def test_every_number_of_tokens(tokens, dtype, run):
    """Around the edges of tiles: two windows, of which one has pads and is masked."""
    case = Case((1, 1, max(1, 2 * tokens - 1)), (1, 1, tokens), (0, 0, tokens // 2))
    assert case.tokens == tokens
    widths = HEAD_WIDTHS if tokens < 50 else (HEAD_WIDTHS[NUMBERS.index(tokens) % 3],)
    for width in widths:
        # Of few numbers the largest error is a matter of luck.
        draws = [differentiated(run, case, width, dtype) for _ in range(8 if tokens < 50 else 1)]
        for values in zip(*draws, strict=True):
            got, exact, own = (torch.cat(parts) for parts in zip(*values, strict=True))
            suite.assert_budget(got, exact, own, got.dtype)


@EVERY
@DTYPES
def test_a_table_gets_its_gradient_from_more_windows_than_are_one_sum(dtype, run):
    case = Case((9, 10, 10), (2, 2, 2), (1, 1, 1))
    # Each half of them is longer than two sums of 32.
    assert 2 * case.windows > 2 * 2 * 32
    check(run, make(case, batch=2, dtype=dtype, grad=True), case)


def differentiated(run, case, width, dtype):
    """Of the output and each gradient what is found, the exact one, and that of the composition."""
    inputs = make(case, 1, dtype=dtype, width=width, grad=True)
    leaves = [suite.exact_leaf(value) for value in inputs]
    up = suite.random(1, *case.grid, inputs[0].shape[-1] // 3, dtype=dtype)
    given = {"scale": width**-0.5}
    results = (
        (attend(run, inputs, case, **given), inputs),
        (exactly(leaves, case, **given), leaves),
        (naive(run, inputs, case, **given), inputs),
    )
    each = [(result.detach(), *suite.gradients(result, of, up)) for result, of in results]
    return list(zip(*each, strict=True))


def spread(run, case, reach):
    """(vectors, rows [N, N]) of the case with codes so far apart that `reach` is the largest.

    The kernels know no windows: a table too large for shared memory takes thousands of tokens
    where codes are those of a window, and few where they are not.
    """
    found = vectors_of(run, case)
    step, most = reach // int(found.code.max()), int(found.code.max())
    # A remainder, so that the largest is reached exactly.
    code = found.code * step + (found.code == most).int() * (reach - most * step)
    assert int(code.max()) == reach
    place = torch.full((reach + 1,), -1, dtype=torch.int32)
    place[code.cpu().long()] = torch.arange(len(code), dtype=torch.int32)
    # Rows of the table that no pair has lie before those that are read, and behind.
    offset = reach + 3
    # The judges have the width innermost.
    by_place = attention_order(case)
    codes = torch.empty(len(code), dtype=torch.int64)
    codes[by_place] = code.cpu().long()
    rows = codes[:, None] - codes[None, :] + offset
    found = found._replace(code=code, place=run.put(place), offset=offset)
    return found, rows.numpy()


def attention_order(case):
    """Of each place as attention has them, the place in raster order."""
    window = [min(pair) for pair in zip(case.grid, case.window, strict=True)]
    return torch.arange(prod(window)).view(window).permute(1, 2, 0).flatten()


def assert_launches(run, inputs, case, vectors, rows, scale):
    """Forward and gradients by the launchers within the budget, with these vectors and rows."""
    qkv, table, pad = inputs
    dtype, heads = qkv.dtype, table.shape[1]
    used = torch.zeros(len(table), dtype=torch.bool)
    used[torch.from_numpy(rows).unique()] = True
    given = {"rows": rows, **options(case, heads, scale)}

    def composed(values):
        leaves = [value.detach().requires_grad_() for value in values]
        result = plain.attention(*leaves[:2], pad_qkv=leaves[2], **given)
        return result.detach(), *torch.autograd.grad(result, leaves, up.to(result.dtype))

    up = suite.random(*qkv.shape[:-1], qkv.shape[-1] // 3, dtype=dtype)
    # Rows of the table that are not used may be anything.
    clean = qkv, torch.where(used[:, None], table, 0), pad
    exact, own = composed(wide(clean)), composed(clean)
    exact_sum = plain.log_sum_exp(*wide(clean[:2]), pad_qkv=pad.double(), **given)
    own_sum = plain.log_sum_exp(*clean[:2], pad_qkv=pad, **given)
    qkv, table, pad, up = map(run.put, (qkv, table, pad, up))
    out, log_sum_exp = map(run.put, launch(run, (qkv, table, pad), vectors, scale))
    grads = (
        torch.full_like(qkv, torch.nan),
        torch.full_like(table, torch.nan),
        torch.full_like(pad, torch.nan, dtype=torch.float32),
    )
    launch_window_attention_backward(
        *(*grads, up, qkv, table, pad, out, log_sum_exp),
        *(heads, scale, True, True, True, vectors),
    )
    assert not grads[1].cpu()[~used].any()
    suite.assert_budget(log_sum_exp.cpu(), exact_sum, own_sum, torch.float32)
    found = out, *grads[:2], grads[2].to(dtype)
    for got, *parts in zip(found, exact, own, strict=True):
        suite.assert_budget(got.cpu(), *parts, got.dtype)


@EVERY
@DTYPES
@pytest.mark.parametrize("width", HEAD_WIDTHS)
# Of the first all fits, of the second what else a block has decides, of the others none does.
@pytest.mark.parametrize("reach", [1000, 10500, 12288, 14001])
def test_a_table_that_does_not_fit_in_shared_memory(reach, width, dtype, run):
    vectors, rows = spread(run, TILES, reach)
    inputs = list(make(TILES, 1, dtype=dtype, width=width))
    table = torch.randn(rows.max() + 8, 2)
    held = empty_tables(table, reach)
    assert (held[0].nbytes > SHARED) == (reach >= 12288)
    table[: rows.min()] = table[rows.max() + 1 :] = torch.nan
    inputs[1] = table
    assert_launches(run, inputs, TILES, vectors, rows, width**-0.5)


@pytest.mark.slow
@EVERY
@DTYPES
def test_a_window_whose_table_does_not_fit_in_shared_memory(dtype, run):
    case = Case((16, 15, 15), (16, 15, 15), (8, 7, 7))
    qkv, table, pad = make(case, 1, dtype=dtype, width=8)
    inputs = [value.requires_grad_() for value in (qkv, table[:, :1].clone(), pad)]
    vectors = vectors_of(run, case)
    assert empty_tables(table, len(vectors.place) - 1)[0].nbytes > SHARED
    given = {"num_heads": 1}
    exact = exactly(wide(inputs), case, **given)
    own = naive(run, inputs, case, **given)
    suite.assert_budget(attend(run, inputs, case, **given), exact, own, dtype)
    check(run, inputs, case, **given)


def everything(run, dtype):
    """Outputs, log-sum-exps and gradients: one, several and filled tiles, canonical windows."""
    torch.manual_seed(7)
    found = []
    # Of two clips a block that sums over windows has four: more than there are stages.
    for clips, width, reach in ((2, 16, None), (1, 32, None), (1, 32, 12288)):
        vectors = spread(run, TILES, reach)[0] if reach else vectors_of(run, TILES)
        rows = vectors.offset + len(vectors.place)
        qkv, _, pad = make(TILES, clips, dtype=dtype, width=width)
        inputs = qkv, torch.randn(rows, 2), pad
        out, log_sum_exp = launch(run, inputs, vectors, 0.3)
        grads = (torch.full_like(qkv, torch.nan), torch.full((rows, 2), torch.nan))
        grads += (torch.full((len(pad),), torch.nan),)
        launch_window_attention_backward(
            *(*grads, torch.randn_like(out), *inputs, out, log_sum_exp),
            *(2, 0.3, True, True, True, vectors),
        )
        found += [out, log_sum_exp, *grads]
    for case in (PADDED, LONG) if dtype != torch.float32 else ():
        qkv = suite.random(1, *case.grid, 96, dtype=dtype, std=2)
        inputs = qkv, torch.randn((2 * case.window[0] - 1) * 169, 1), torch.randn(96).to(dtype)
        found += launch(run, inputs, vectors_of(run, case), -0.3)
    return found


# The order, its seed, and whether shared memory is NaN first.
ORDERS = [
    ("forward", 0, True),
    ("forward", 0, False),
    ("backward", 0, True),
    ("newest", 0, False),
    ("random", 1, True),
    ("random", 2, False),
]


@DTYPES
def test_no_bit_depends_on_the_order_of_threads_and_blocks(dtype, control):
    run = suite.Run("cuda", "cpu")
    expected = None
    for order, seed, poison in ORDERS:
        control.set_settings(order=order, seed=seed, poison=poison, late_copies=poison)
        found = everything(run, dtype)
        assert all(torch.isfinite(value).all() for value in found)
        expected = expected or found
        assert all(map(torch.equal, found, expected)), (order, seed, poison)


@EVERY
def test_the_library_refuses_what_the_launchers_would_not_bring(run):
    vectors = vectors_of(run, TILES)
    qkv, table, pad = map(run.put, make(TILES, 1, dtype=torch.float16))
    with pytest.raises(RuntimeError, match="heads of 16, 32 and 64 channels alone"):
        launch(run, (qkv[..., :72].contiguous(), table, pad), vectors, 1.0)
    with pytest.raises(RuntimeError, match="pad_qkv is of another type than qkv"):
        launch(run, (qkv, table, pad.float()), vectors, 1.0)
