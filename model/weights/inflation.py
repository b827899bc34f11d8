"""Weights made to fit: 2-D Swin to 3-D, and bias tables to a window of another depth.

Source: upstream `SwinTransformer3D.inflate_weights` at db018fb, followed to the last bit.
"""

from __future__ import annotations

from math import isqrt

import torch
import torch.nn.functional as F
from torch import Tensor

from videoswin_kernels.geometry import Triple


def inflate_patches(weight: Tensor, frames: int) -> Tensor:
    """A patch convolution [E, 3, h, w] repeated over time, [E, 3, frames, h, w], and divided.

    On a clip whose frames are alike it gives what the 2-D one gives on a frame.
    """
    return _wide(weight).unsqueeze(2).repeat(1, 1, frames, 1, 1) / frames


def square_window(table: Tensor) -> int | None:
    """The extent w of the square 2-D window whose table has (2w - 1)^2 rows; None if none has."""
    side = isqrt(len(table))
    return (side + 1) // 2 if side * side == len(table) and side % 2 else None


def inflate_table(table: Tensor, window_size: Triple) -> Tensor:
    """A 2-D bias table [(2w - 1)^2, heads] as the table [rows, heads] of a 3-D window.

    Resized, where height or width differ, by bicubic interpolation without aligned corners or
    antialiasing; then the same for each relative time, not divided: a bias is added, not summed.
    """
    depth, height, width = (2 * extent - 1 for extent in window_size)
    rows, heads = table.shape
    side = isqrt(rows)
    if (side, side) != (height, width):
        image = _wide(table).T.reshape(1, heads, side, side)
        image = F.interpolate(image, size=(height, width), mode="bicubic", align_corners=False)
        table = image.reshape(heads, height * width).T
    return table.repeat(depth, 1)


def stretch_table(table: Tensor, window_size: Triple, depth: int) -> Tensor:
    """The bias table of `window_size` for the same window with `depth` tokens in time.

    Each spatial offset and head is a line over relative time, resized linearly without aligned
    corners: the window's whole time stays the window's whole time, and offset 0 stays offset 0.
    """
    _, heads = table.shape
    old, height, width = (2 * extent - 1 for extent in window_size)
    lines = _wide(table).reshape(old, height * width * heads).T.unsqueeze(1)
    lines = F.interpolate(lines, size=2 * depth - 1, mode="linear", align_corners=False)
    return lines.squeeze(1).T.reshape((2 * depth - 1) * height * width, heads)


def _wide(values: Tensor) -> Tensor:
    """In float32, in which upstream computes, or in float64."""
    return values if values.dtype == torch.float64 else values.float()
