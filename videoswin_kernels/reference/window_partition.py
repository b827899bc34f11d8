"""Pad, roll, rearrange; and the way back."""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from videoswin_kernels.geometry import Triple, clamp_window


def pad_grid(x: Tensor, padded: Triple) -> Tensor:
    """x [B, D, H, W, C] with zeros at the far end of each axis up to the padded grid."""
    depth, height, width = (p - size for p, size in zip(padded, x.shape[1:4], strict=True))
    if depth or height or width:
        return F.pad(x, (0, 0, 0, width, 0, height, 0, depth))
    return x


def roll_grid(x: Tensor, shift: Triple, sign: int) -> Tensor:
    """x rolled by sign * shift; untouched without shift."""
    return torch.roll(x, [sign * s for s in shift], (1, 2, 3)) if any(shift) else x


def split_windows(x: Tensor, window: Triple) -> Tensor:
    """[B, D, H, W, C] in whole windows -> [B*M, N, C]."""
    wd, wh, ww = window
    pattern = "b (md wd) (mh wh) (mw ww) c -> (b md mh mw) (wd wh ww) c"
    return rearrange(x, pattern, wd=wd, wh=wh, ww=ww)


def window_partition(x: Tensor, window: Triple, shift: Triple) -> Tensor:
    window, shift, padded = clamp_window(tuple(x.shape[1:4]), window, shift)
    return split_windows(roll_grid(pad_grid(x, padded), shift, -1), window)


def window_reverse(windows: Tensor, grid: Triple, window: Triple, shift: Triple) -> Tensor:
    window, shift, padded = clamp_window(grid, window, shift)
    md, mh, mw = (p // w for p, w in zip(padded, window, strict=True))
    wd, wh, ww = window
    pattern = "(b md mh mw) (wd wh ww) c -> b (md wd) (mh wh) (mw ww) c"
    x = rearrange(windows, pattern, md=md, mh=mh, mw=mw, wd=wd, wh=wh, ww=ww)
    x = roll_grid(x, shift, 1)
    depth, height, width = grid
    return x[:, :depth, :height, :width].contiguous()
