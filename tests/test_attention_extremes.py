"""window_attention where values are infinite, and under torch's switches for TF32."""

import loops
import numpy as np
import operator_suite as suite
import pytest
import torch

from videoswin_kernels import window_attention

EVERY = suite.every("window_attention")
WINDOW = (2, 7, 7)


def inputs(grid, heads=1, width=16):
    qkv = suite.random(1, *grid, 3 * heads * width, dtype=torch.float32)
    return qkv, suite.random(loops.table_rows(WINDOW), heads, dtype=torch.float32)


@EVERY
def test_a_causal_table_hides_whole_tiles_of_keys(run):
    # Rows of the table for keys in an earlier frame: queries of the later one see only its own,
    # which for large windows lie in other tiles than the first.
    grid = (2, 7, 7)
    qkv, table = inputs(grid)
    rows = loops.relative_rows(grid, WINDOW)
    hidden = np.unique(rows[49:, :49])
    table[torch.from_numpy(hidden)] = -torch.inf
    result = run(window_attention, qkv, table, window=WINDOW, num_heads=1)
    exact = window_attention(
        qkv.double(), table.double(), window=WINDOW, num_heads=1, kernels="reference"
    )
    assert torch.isfinite(result).all()
    torch.testing.assert_close(result.double(), exact, rtol=1e-5, atol=1e-5)
    changed = qkv.clone()
    changed[:, 0] += 1
    again = run(window_attention, changed, table, window=WINDOW, num_heads=1)
    assert torch.equal(result[:, 1], again[:, 1]), "the later frame saw the earlier one"


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
