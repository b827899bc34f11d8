"""Second stage of the gradients of LayerNorm weights: partial sums added in a fixed order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from videoswin_kernels.triton._compiler import blocks, launch

# Programs of a first stage, about, or one a clip where clips are more: several for each
# multiprocessor of a large card, yet few enough that their partial sums are small beside the
# tokens. Not taken from the card: a gradient is to be the same bits on every one.
PARTS = 1024


def split(count: int, clips: int = 1) -> tuple[int, int]:
    """How a first stage divides the blocks of a clip: (blocks a program, programs a clip)."""
    steps = min(count, blocks(clips * count, PARTS))
    return steps, blocks(count, steps)


@triton.jit(do_not_specialize=["parts"])
def column_sums_kernel(
    partial, first, second, parts, channels, BLOCK_PARTS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr
):
    """first[c] = sum over p of partial[p, 0, c], second[c] that of partial[p, 1, c]."""
    which = tl.program_id(1)
    columns = tl.program_id(0) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    is_column = columns < channels
    total = tl.zeros((BLOCK_PARTS, BLOCK_CHANNELS), dtype=tl.float32)
    for start in range(0, parts, BLOCK_PARTS):
        rows = (start + tl.arange(0, BLOCK_PARTS)).to(tl.int64)
        at = (2 * rows[:, None] + which) * channels + columns[None, :]
        total += tl.load(partial + at, mask=(rows < parts)[:, None] & is_column[None, :], other=0)
    total = tl.sum(total, axis=0)

    if which == 0:
        tl.store(first + columns, total, mask=is_column)
    else:
        tl.store(second + columns, total, mask=is_column)


def column_sums(first: Tensor, second: Tensor, partial: Tensor) -> None:
    """Fills two float32 vectors [C] with the sums of partial [P, 2, C] over P."""
    parts, _, channels = partial.shape
    grid = (blocks(channels, 16), 2)
    launch(
        column_sums_kernel,
        grid,
        partial,
        first,
        second,
        parts,
        channels,
        BLOCK_PARTS=128,
        BLOCK_CHANNELS=16,
    )


def empty_partial(like: Tensor, parts: int, channels: int) -> Tensor:
    """Memory for the first stage: float32 [parts, 2, channels]."""
    return torch.empty((parts, 2, channels), dtype=torch.float32, device=like.device)
