"""Pad, roll, split, softmax(q k^T + bias + mask) v, and back.

Letters: B clips, D H W token grid, M windows, N tokens per window, E head width.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from videoswin_kernels.geometry import Triple, clamp_window
from videoswin_kernels.reference.window_partition import (
    pad_grid,
    roll_grid,
    split_windows,
    window_reverse,
)

MASKED = -100.0


def window_attention(
    qkv: Tensor,
    bias_table: Tensor,
    pad_qkv: Tensor | None,
    *,
    window: Triple,
    shift: Triple,
    num_heads: int,
    scale: float,
    dropout: float,
) -> Tensor:
    grid, configured = tuple(qkv.shape[1:4]), window
    window, shift, padded = clamp_window(grid, window, shift)
    tokens = window[0] * window[1] * window[2]
    wide = torch.promote_types(qkv.dtype, torch.float32)

    x = pad_grid(qkv, padded)
    if pad_qkv is not None and padded != grid:
        is_token = pad_grid(qkv.new_ones((1, *grid, 1), dtype=torch.bool), padded)
        x = torch.where(is_token, x, pad_qkv)
    x = split_windows(roll_grid(x, shift, -1), window)
    q, k, v = rearrange(x, "bm n (qkv heads e) -> qkv bm heads n e", qkv=3, heads=num_heads)

    index = relative_position_index(configured, tokens, qkv.device)
    # index_select: the backward of bias_table[index] adds in an order that varies with the threads.
    bias = bias_table.index_select(0, index.flatten()).to(wide)
    bias = rearrange(bias, "(i j) heads -> heads i j", i=tokens)
    if pad_qkv is not None:
        # An empty sum: it adds nothing, and ties pad_qkv to the output so that its gradient is
        # zeros, not None, on a grid without padding.
        bias = bias + pad_qkv[:0].sum()

    scores = ((q * scale) @ k.transpose(-2, -1)).to(wide) + bias
    if any(shift):
        mask = shift_mask(padded, window, shift, qkv.device)
        scores = rearrange(scores, "(b m) heads i j -> b m heads i j", m=len(mask))
        scores = (scores + mask[:, None].to(wide)).flatten(0, 1)
    weights = F.dropout(scores.softmax(dim=-1), dropout)
    out = rearrange(weights.to(v.dtype) @ v, "bm heads n e -> bm n (heads e)")
    return window_reverse(out, grid, configured, shift)


def relative_position_index(configured: Triple, tokens: int, device: torch.device) -> Tensor:
    """int64 [N, N]: bias table row of each (query, key), for the first N tokens of the window."""
    depth, height, width = configured
    axes = (torch.arange(extent, device=device) for extent in configured)
    d, h, w = (axis.flatten()[:tokens] for axis in torch.meshgrid(*axes, indexing="ij"))
    d, h, w = (axis[:, None] - axis[None, :] for axis in (d, h, w))
    rows = (d + depth - 1) * (2 * height - 1) + h + height - 1
    return rows * (2 * width - 1) + w + width - 1


def shift_mask(padded: Triple, window: Triple, shift: Triple, device: torch.device) -> Tensor:
    """float32 [M, N, N]: -100 where two tokens of a window come from different regions, else 0.

    Along a shifted axis the padded grid falls into three regions: up to the last window, and the
    two parts of the last window that the roll brought together. Padding has no region of its own.
    """
    region = torch.zeros(1, *padded, 1, dtype=torch.int32, device=device)
    for axis, (extent, w, s) in enumerate(zip(padded, window, shift, strict=True)):
        if s:
            position = torch.arange(extent, device=device)
            part = (position >= extent - w).int() + (position >= extent - s).int()
            region = 3 * region + part.view([-1 if a == axis + 1 else 1 for a in range(5)])
    region = split_windows(region, window).squeeze(-1)
    return (region[:, :, None] != region[:, None, :]) * MASKED
