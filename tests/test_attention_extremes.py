"""window_attention where values are infinite, huge or tiny, and under torch's switches for TF32."""

import loops
import numpy as np
import operator_suite as suite
import plain
import pytest
import torch
from test_attention import make, naive
from test_attention_backward import SEEN, TILES

from videoswin_kernels import window_attention
from videoswin_kernels.testing import ATTENTION, Case

EVERY = suite.every("window_attention")
WINDOW = (2, 7, 7)


def inputs(grid, heads=1, width=16):
    qkv = suite.random(1, *grid, 3 * heads * width, dtype=torch.float32)
    return qkv, suite.random(loops.table_rows(WINDOW), heads, dtype=torch.float32)


@EVERY
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_causal_table_hides_whole_tiles_of_keys(axis, run):
    # Rows of the table for keys before the query along an axis: the last queries see their own
    # place there alone, which along the outermost axis is in other tiles than the first.
    grid = (2, 7, 7)
    qkv, table = inputs(grid)
    place = np.indices(grid)[axis].reshape(-1)
    is_hidden = place[:, None] > place[None, :]
    table[torch.from_numpy(np.unique(loops.relative_rows(grid, WINDOW)[is_hidden]))] = -torch.inf
    result = run(window_attention, qkv, table, window=WINDOW, num_heads=1)
    exact = window_attention(
        qkv.double(), table.double(), window=WINDOW, num_heads=1, kernels="reference"
    )
    assert torch.isfinite(result).all()
    torch.testing.assert_close(result.double(), exact, rtol=1e-5, atol=1e-5)
    changed = qkv.clone()
    changed.select(axis + 1, 0).add_(1)
    again = run(window_attention, changed, table, window=WINDOW, num_heads=1)
    last, last_again = (x.select(axis + 1, grid[axis] - 1) for x in (result, again))
    assert torch.equal(last, last_again), "the last ones saw the first"


@EVERY
def test_infinite_values_of_padding_reach_the_windows_that_are_padded_alone(run):
    qkv, table = inputs((2, 7, 9))
    pad = torch.zeros(48)
    pad[32:] = torch.inf
    options = {"window": WINDOW, "num_heads": 1, "pad_qkv": pad}
    result = run(window_attention, qkv, table, **options)
    expected = window_attention(qkv, table, kernels="reference", **options)
    assert torch.equal(torch.isfinite(result), torch.isfinite(expected))
    assert torch.isfinite(result[..., :7, :]).all()


@EVERY
@pytest.mark.parametrize("value", ["tf32", "ieee"])
def test_the_newer_switch_for_tf32_breaks_nothing(value, run):
    qkv, table = inputs((2, 5, 4))
    try:
        torch.backends.cuda.matmul.fp32_precision = value
        result = run(window_attention, qkv, table, window=WINDOW, num_heads=1)
    finally:
        torch.backends.cuda.matmul.fp32_precision = "none"
    exact = window_attention(qkv.double(), table.double(), window=WINDOW, num_heads=1)
    # TF32 keeps 10 bits of the products' operands.
    torch.testing.assert_close(result.double(), exact, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("value", ["highest", "high", "medium"])
def test_float32_products_are_exact_unless_torch_allows_tf32(value):
    compiler = pytest.importorskip("videoswin_kernels.triton._compiler")
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(value)
        assert compiler.dot_precision() == ("ieee" if value == "highest" else "tf32")
    finally:
        torch.set_float32_matmul_precision(before)


def gradients(run, given, up, case, is_exact=False):
    """Gradients of (qkv, table, pad_qkv) by a kernel set, or of the float64 composition."""
    leaves = [suite.exact_leaf(v) if is_exact else v.detach().requires_grad_() for v in given]
    options = {"window": case.window, "shift": case.shift, "num_heads": given[1].shape[1]}
    if is_exact:
        result = plain.attention(*leaves[:2], pad_qkv=leaves[2], **options)
    else:
        result = run(window_attention, *leaves[:2], pad_qkv=leaves[2], **options)
    return suite.gradients(result, leaves, up)


def assert_near(got, exact, share):
    """Finite, and off by no more than a share of the largest value."""
    for grad, other in zip(got, exact, strict=True):
        assert torch.isfinite(grad).all()
        limit = share * other.abs().max().item() + 1e-30
        torch.testing.assert_close(grad.double(), other, rtol=0, atol=limit)


@suite.every("window_attention", [torch.float16], compiled=True)
def test_large_gradients_in_float16_pass_where_products_of_them_do_not_fit(run, dtype):
    given = make(SEEN, batch=1, dtype=dtype)
    for value in (given[0], given[2]):
        value[..., :64] /= 4
        value[..., 64:] *= 8
    up = suite.random(1, *SEEN.grid, 32, dtype=dtype, std=2000)
    exact = gradients(run, given, up, SEEN, is_exact=True)
    values = given[0][..., 64:].double().view(-1, 2, 16)
    products = torch.einsum("ihe,jhe->hij", up.double().view(-1, 2, 16), values)
    assert products.abs().max() > 2 * torch.finfo(dtype).max
    assert all(grad.abs().max() < torch.finfo(dtype).max / 2 for grad in (exact[0], exact[2]))
    # The reference rounds the products to float16, as upstream does: infinite.
    assert_near(gradients(run, given, up, SEEN), exact, 4e-3)


@suite.every("window_attention", suite.LOW)
def test_small_gradients_in_a_half_precision_are_not_lost(run, dtype):
    given = make(SEEN, batch=1, dtype=dtype)
    # Below the normal numbers of float16.
    up = suite.random(1, *SEEN.grid, 32, dtype=dtype, std=2.0**-17)
    exact = gradients(run, given, up, SEEN, is_exact=True)
    leaves = [value.detach().requires_grad_() for value in given]
    own = suite.gradients(naive(run, leaves, SEEN), leaves, up)
    for value, *parts in zip(given, gradients(run, given, up, SEEN), exact, own, strict=True):
        assert parts[0].any()
        suite.assert_budget(*parts, value.dtype)


@EVERY
@pytest.mark.trap(6)
def test_gradients_where_the_mask_leaks(run):
    case = ATTENTION["exact"]
    qkv, *rest = make(case, batch=1, dtype=torch.float32)
    given = [qkv * 20, *rest]
    up = suite.random(1, *case.grid, 32, dtype=torch.float32)
    exact = gradients(run, given, up, case, is_exact=True)
    leaves = [value.detach().requires_grad_() for value in given]
    own = suite.gradients(naive(run, leaves, case), leaves, up)
    for *parts, _ in zip(gradients(run, given, up, case), exact, own, given, strict=True):
        suite.assert_budget(*parts, torch.float32)
    hidden = [suite.exact_leaf(value) for value in given]
    hidden = suite.gradients(naive(run, hidden, case, masked=-1e4), hidden, up)
    assert (hidden[0] - exact[0]).abs().max() > 0.1


@suite.every("window_attention", [torch.float32, torch.float16])
@pytest.mark.parametrize("case", [SEEN, TILES], ids=["one tile", "tiles"])
def test_gradients_of_one_dominant_score(case, run, dtype):
    """Each token sees itself alone: its value gets what came, and nothing else gets anything."""
    qkv, table, pad = make(case, batch=1, dtype=dtype)
    table[:] = 0
    # That of the diagonal, in a clamped window, too.
    table[(loops.table_rows(case.window) - 1) // 2] = 500
    up = suite.random(1, *case.grid, 32, dtype=dtype)
    grad_qkv, *others = gradients(run, (qkv, table, pad), up, case)
    assert torch.equal(grad_qkv[..., 64:], up)
    small = torch.finfo(dtype).eps * 100
    assert grad_qkv[..., :64].abs().max() < small
    assert all(value.abs().max() < small for value in others)


@EVERY
@pytest.mark.trap(8)
@pytest.mark.parametrize("bias", ["300", "-300", "both", "rows apart"])
def test_gradients_under_large_biases(bias, run):
    """All alike they cancel; what a tile has beyond the window's places must not see them."""
    qkv, table, pad = make(TILES, batch=1, dtype=torch.float32)
    table = {
        "300": torch.full_like(table, 300),
        "-300": torch.full_like(table, -300),
        "both": table.sign() * 300,
        "rows apart": table + 300 * torch.linspace(-1, 1, len(table))[:, None],
    }[bias]
    up = suite.random(1, *TILES.grid, 32, dtype=torch.float32)
    exact = gradients(run, (qkv, table, pad), up, TILES, is_exact=True)
    # A float32 of 300 is 1.5e-5 from the next.
    assert_near(gradients(run, (qkv, table, pad), up, TILES), exact, 1e-4)


@EVERY
def test_gradients_under_a_causal_table(run):
    grid, case = (2, 7, 7), Case((2, 7, 7), WINDOW, (0, 0, 0))
    qkv, table = inputs(grid)
    hidden = torch.from_numpy(np.unique(loops.relative_rows(grid, WINDOW)[49:, :49]))
    table[hidden] = -torch.inf
    up = suite.random(1, *grid, 16, dtype=torch.float32)
    got = gradients(run, (qkv, table, torch.zeros(48)), up, case)
    exact = gradients(run, (qkv, table, torch.zeros(48)), up, case, is_exact=True)
    assert not got[1][hidden].any()
    assert_near(got, exact, 1e-5)


# Of one head of 32 channels: a small window, and one that kernels are specialised for.
SIZES = {
    "small": Case((3, 5, 7), (2, 3, 4), (1, 1, 2)),
    "8x7x7": Case((8, 7, 7), (8, 7, 7), (0,) * 3),
}


def of_one_head(case, dtype):
    qkv, table, pad = make(case, batch=1, dtype=dtype)
    return qkv, table[:, :1].clone(), pad


def assert_as_near_as_plain(run, given, case, dtype):
    """Within the budget, which an output that is not a number is not."""
    if run.is_interpreted and case.tokens > 100:
        pytest.skip("the interpreter takes a second, and its kernels are those of a small window")
    exact = naive(suite.Run("reference", "cpu"), [v.double() for v in given], case, num_heads=1)
    own = naive(run, given, case, num_heads=1)
    result = run(
        window_attention, *given[:2], window=case[1], shift=case[2], num_heads=1, pad_qkv=given[2]
    )
    suite.assert_budget(result, exact, own, dtype)


@suite.every("window_attention", suite.DTYPES)
@pytest.mark.parametrize("value", [-1e5, -1e9, -1e30, torch.finfo(torch.float32).min])
@pytest.mark.parametrize("name", SIZES)
def test_keys_hidden_by_a_large_number_are_hidden(name, value, run, dtype):
    """Where the first keys of a row are, a level of their own is far from that of the others."""
    case = SIZES[name]
    given = of_one_head(case, dtype)
    rows = loops.relative_rows(case.grid, case.window)
    # Keys before the query in the raster, itself left out.
    hidden = torch.from_numpy(rows).tril(-1).unique()
    given[1][hidden[hidden != rows[0, 0]]] = value
    assert_as_near_as_plain(run, given, case, dtype)


@suite.every("window_attention", suite.DTYPES)
@pytest.mark.parametrize("value", [-1e5, 1e5, -1e30, torch.finfo(torch.float32).min])
@pytest.mark.parametrize("name", SIZES)
def test_one_large_number_added_to_all_scores_hides_none(name, value, run, dtype):
    case = SIZES[name]
    qkv, table, pad = of_one_head(case, dtype)
    qkv[..., :32] = 0
    table[:] = value
    # The mask, of which so large a number leaves nothing or all.
    case = case._replace(shift=(0, 0, 0))
    assert_as_near_as_plain(run, (qkv, table, pad), case, dtype)


@suite.every("window_attention", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1e3, 3e4, 1e7])
@pytest.mark.parametrize("name", SIZES)
def test_scores_of_any_size_give_numbers(name, size, run, dtype):
    """With one key ahead of all others by far, an output is that key's value."""
    case = SIZES[name]._replace(shift=(0, 0, 0))
    qkv, table, pad = of_one_head(case, dtype)
    direction = torch.randn(32).sign()
    # Queries agree with the sign of every key's own factor; the last token's is the largest.
    factors = torch.linspace(-1, 1, qkv[..., 0].numel()).view(qkv.shape[:-1])
    qkv[..., :32] = (direction * size).to(dtype)
    qkv[..., 32:64] = (factors[..., None] * direction * size).to(dtype)
    pad[32:64] = (-direction * size).to(dtype)
    assert_as_near_as_plain(run, (qkv, table, pad), case, dtype)
