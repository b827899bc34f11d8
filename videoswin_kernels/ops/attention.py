"""Contract of `window_attention`: masked relative-position attention in shifted windows."""

from __future__ import annotations

from math import inf
from numbers import Integral

import torch
from torch import Tensor

from videoswin_kernels import reference
from videoswin_kernels.geometry import Triple, check_window, table_rows
from videoswin_kernels.ops._checks import (
    autocast_dtype,
    check_device,
    check_floating,
    check_grid,
    check_number,
    check_tensor,
    check_vector,
    without_autocast,
)
from videoswin_kernels.selection import resolve


def window_attention(
    qkv: Tensor,
    bias_table: Tensor,
    *,
    window: Triple,
    shift: Triple = (0, 0, 0),
    num_heads: int,
    pad_qkv: Tensor | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
    kernels: str = "auto",
) -> Tensor:
    """The attention output of every token of a grid, each within its shifted window.

    For each window (see `window_partition`) and head, with places i, j of the window:

        score[i, j] = scale * q[i] . k[j] + bias_table[row(i, j), head] + mask[i, j]
        out[i] = sum over j of softmax(score[i])[j] * v[j]

    `row(i, j)` is the relative position in the configured window, read off the first N tokens of
    its raster: exact where only the depth is clamped, and scrambled, as upstream, where height or
    width are. `mask[i, j]` is -100 where the shift brought i and j together from different ends of
    the grid, else 0: finite, so large enough scores pass it, as they do upstream.

    Padded places are keys like any other, with the values of `pad_qkv`; what they would output is
    dropped.

    Precision follows upstream under mixed precision: q * scale, the scores and the probabilities
    are rounded to the dtype of qkv; bias, mask and softmax are float32 (float64 for float64).

    Args:
        qkv: [B, D, H, W, 3C], channels packed (3, heads, E), as one Linear writes them; float64,
            float32, float16 or bfloat16, any strides.
        bias_table: [(2wd-1)(2wh-1)(2ww-1), heads] for the configured window (wd, wh, ww), float32
            or the dtype of qkv.
        window: configured window in tokens; an axis no longer than it is one window without shift.
        shift: configured shift in tokens, 0 <= shift < window.
        num_heads: heads; divides C.
        pad_qkv: [3C], q, k, v at padded places (the bias of the qkv Linear), cast to the dtype of
            qkv; None = zeros. Its gradient is zeros, never None, where nothing is padded, and its
            q part is always zero.
        scale: factor of the scores; None or 0 = E ** -0.5.
        dropout: probability of dropping an attention weight, 0 to 1; fused kernels refuse all but
            0.
        kernels: which implementation runs (`videoswin_kernels.selection`).

    Returns:
        [B, D, H, W, C] contiguous, dtype of qkv. Under autocast qkv and pad_qkv are cast to its
        dtype first; the table stays as it is.

    Raises:
        TypeError: no tensor, a dtype outside the above, window or shift no sequence of integers,
            scale or dropout no number.
        ValueError: a wrong shape or device, a bad window or shift, heads that do not divide C, a
            dropout outside 0 to 1, or an unknown `kernels`.
        UnavailableError (a RuntimeError): the kernels asked for cannot run here.

    Source: paper section 3.2; upstream `WindowAttention3D`, `compute_mask` and
    `SwinTransformerBlock3D.forward_part1` at db018fb.
    """
    where = "window_attention"
    check_grid(where, "qkv", qkv, "3C")
    check_floating(where, "qkv", qkv)
    window, shift = check_window(where, window, shift)
    channels = _check_heads(qkv.shape[-1], num_heads)
    check_tensor(where, "bias_table", bias_table)
    if bias_table.shape != (table_rows(window), num_heads):
        raise ValueError(
            f"{where}: bias_table must be [{table_rows(window)}, {num_heads}] for window {window}, "
            f"got {list(bias_table.shape)}"
        )
    check_device(where, "bias_table", bias_table, qkv)
    dtype = autocast_dtype(qkv) or qkv.dtype
    if bias_table.dtype not in (torch.float32, qkv.dtype, dtype):
        raise TypeError(
            f"{where}: bias_table must be float32 or the dtype of qkv {dtype}, "
            f"got {bias_table.dtype}"
        )
    if pad_qkv is not None:
        check_vector(where, "pad_qkv", pad_qkv, 3 * channels, qkv)
        pad_qkv = pad_qkv.to(dtype)
    check_number(where, "scale", 0.0 if scale is None else scale, -inf)
    check_number(where, "dropout", dropout, 0, 1)
    resolve(where, kernels, qkv)
    with without_autocast(qkv):
        return reference.window_attention(
            qkv.to(dtype),
            bias_table,
            pad_qkv,
            window=window,
            shift=shift,
            num_heads=num_heads,
            scale=scale or (channels // num_heads) ** -0.5,
            dropout=dropout,
        )


def _check_heads(packed: int, num_heads: object) -> int:
    """C of a packed axis of 3C channels that `num_heads` divides."""
    where = "window_attention"
    if isinstance(num_heads, bool) or not isinstance(num_heads, Integral):
        raise TypeError(f"{where}: num_heads must be an integer >= 1, got {num_heads!r}")
    if num_heads < 1:
        raise ValueError(f"{where}: num_heads must be an integer >= 1, got {num_heads}")
    if packed % (3 * num_heads):
        raise ValueError(
            f"{where}: the channels of qkv must be 3 * num_heads * E with {num_heads} heads, "
            f"got {packed}"
        )
    return packed // 3
