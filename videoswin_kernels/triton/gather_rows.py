"""One gather moves all rows: shift, partition and reverse differ in their index vector alone."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from videoswin_kernels.triton._compiler import blocks, launch, power_of_2

# Rows are moved as integers: any dtype, NaN payloads and signed zeros kept.
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# Bytes that a program moves: 16 for each of 128 threads, four times.
TILE_BYTES = 8192


@triton.jit(do_not_specialize=["num_x", "num_out", "blocks"])
def gather_rows_kernel(
    x,
    index,
    out,
    num_x,
    num_out,
    blocks,
    width,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    """out[b, i] = x[b, index[i]], zeros where index[i] is -1; rows of `width` integers."""
    clip = (tl.program_id(0) // blocks).to(tl.int64)
    rows = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = tl.program_id(1) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    is_row = rows < num_out
    is_column = columns < width
    sources = tl.load(index + rows, mask=is_row, other=-1).to(tl.int64)

    at = (clip * num_x + sources)[:, None] * width + columns[None, :]
    values = tl.load(x + at, mask=(sources >= 0)[:, None] & is_column[None, :], other=0)

    at = (clip * num_out + rows)[:, None] * width + columns[None, :]
    tl.store(out + at, values, mask=is_row[:, None] & is_column[None, :])


def gather_rows(out: Tensor, x: Tensor, index: Tensor, num_x: int) -> None:
    """Fills `out` from rows of `x`, both contiguous with channels last, clip by clip.

    `num_x` rows of x belong to a clip, and as many rows of out as the index is long.
    """
    row_bytes = out.shape[-1] * out.element_size()
    # Bytes, where whole vectors of 16 make a row: Triton joins them, if 16 divides their number.
    integer = INTEGERS[1 if row_bytes % 16 == 0 else row_bytes & -row_bytes]
    x, out = x.view(integer), out.view(integer)
    width = out.shape[-1]
    block_width = min(power_of_2(width), TILE_BYTES // integer.itemsize)
    block_rows = TILE_BYTES // integer.itemsize // block_width
    clips, row_blocks = out.numel() // (len(index) * width), blocks(len(index), block_rows)
    launch(
        gather_rows_kernel,
        (clips * row_blocks, blocks(width, block_width)),
        x,
        index,
        out,
        num_x,
        len(index),
        row_blocks,
        width,
        BLOCK_ROWS=block_rows,
        BLOCK_WIDTH=block_width,
    )
