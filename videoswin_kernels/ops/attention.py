"""Contract of `window_attention`: masked relative-position attention in shifted windows."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf, prod
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from videoswin_kernels import reference
from videoswin_kernels.geometry import check_window, clamp_window, table_rows
from videoswin_kernels.ops._checks import (
    autocast_dtype,
    check_device,
    check_floating,
    check_grid,
    check_number,
    check_tensor,
    check_vector,
    is_transformed,
    no_script,
    without_autocast,
)
from videoswin_kernels.ops._declare import NAMESPACES, Operator, declare
from videoswin_kernels.ops._vectors import attention_vectors
from videoswin_kernels.selection import known_width, resolve


@no_script
def window_attention(
    qkv: Tensor,
    bias_table: Tensor,
    *,
    window: Sequence[int],
    shift: Sequence[int] = (0, 0, 0),
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

    Bias, mask and softmax are float32 (float64 for float64). The reference rounds as upstream does
    under mixed precision: q * scale, the scores and the probabilities to the dtype of qkv. Fused
    kernels round the weights of the values alone, before they are divided by their sum.

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
    width = channels // num_heads
    # As Python's own float: of NumPy's, tracing would make a tensor.
    scale = float(scale or width**-0.5)
    # Spelt out: where it is traced, only a branch makes a number's comparison a constant.
    has_dropout = False
    if dropout > 0:
        has_dropout = True
    chosen = resolve(
        where,
        kernels,
        qkv.device,
        (dtype, bias_table.dtype),
        known_width(width),
        has_dropout=has_dropout,
        is_transformed=is_transformed(qkv, bias_table, pad_qkv),
    )
    if chosen != "reference":
        operator = NAMESPACES[chosen].window_attention
        options = (window, shift, int(num_heads), scale)
        return operator(qkv.to(dtype), bias_table, pad_qkv, *options)[0]
    with without_autocast(qkv):
        return reference.window_attention(
            qkv.to(dtype),
            bias_table,
            pad_qkv,
            window=window,
            shift=shift,
            num_heads=num_heads,
            scale=scale,
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


def _outputs(
    qkv: Tensor,
    bias_table: Tensor,
    pad_qkv: Tensor | None,
    window: Sequence[int],
    shift: Sequence[int],
    num_heads: int,
    scale: float,
) -> tuple:
    """The result and, for the gradient, the log-sum-exp of each token's scores."""
    batch, *grid, packed = qkv.shape
    wide = torch.promote_types(qkv.dtype, torch.float32)
    log_sum_exp = qkv.new_empty((batch, num_heads, prod(grid)), dtype=wide)
    return qkv.new_empty((batch, *grid, packed // 3)), log_sum_exp


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    qkv, bias_table, pad_qkv, *ctx.options = inputs
    out, log_sum_exp = output
    ctx.save_for_backward(qkv, bias_table, pad_qkv, out, log_sum_exp)
    ctx.mark_non_differentiable(log_sum_exp)
    ctx.set_materialize_grads(False)


def _gradient(operators: Any, ctx: Any, grad: Tensor | None, _: None) -> tuple:
    if grad is None:
        return (None,) * 7
    saved, needs = ctx.saved_tensors, ctx.needs_input_grad[:3]
    grads = operators.window_attention_backward(grad, *saved, *ctx.options, *needs)
    wanted = zip(grads, saved[:3], needs, strict=True)
    return (*(g.to(x.dtype) if need else None for g, x, need in wanted), *(None,) * 4)


def _grads(
    grad_out: Tensor,
    qkv: Tensor,
    bias_table: Tensor,
    pad_qkv: Tensor | None,
    out: Tensor,
    log_sum_exp: Tensor,
    window: Sequence[int],
    shift: Sequence[int],
    num_heads: int,
    scale: float,
    needs_qkv: bool,
    needs_table: bool,
    needs_pad: bool,
) -> tuple:
    """The gradients of qkv, bias_table and pad_qkv, of size 0 where they are not needed."""
    wide = log_sum_exp.dtype
    return (
        qkv.new_empty(qkv.shape if needs_qkv else (0,)),
        bias_table.new_empty(bias_table.shape if needs_table else (0,), dtype=wide),
        qkv.new_empty(qkv.shape[-1:] if needs_pad else (0,), dtype=wide),
    )


def give_to_values(
    grad_qkv: Tensor, grad_table: Tensor, grad_pad: Tensor, grad_out: Tensor
) -> None:
    """The gradients where a token is alone in its window: its weight is 1, whatever its score."""
    for grad in (grad_qkv, grad_table, grad_pad):
        grad.zero_()
    if grad_qkv.numel():
        grad_qkv[..., -grad_out.shape[-1] :] = grad_out


def _score_products(qkv: Sequence[int], window: Sequence[int], shift: Sequence[int]) -> int:
    """Multiply-adds of a product such as q k^T for qkv of this shape: B * M * heads * N * N * E."""
    batch, *grid, packed = qkv
    clamped, _, padded = clamp_window(grid, window, shift)
    return batch * prod(padded) * prod(clamped) * (packed // 3)


declare(
    Operator(
        "window_attention(Tensor qkv, Tensor bias_table, Tensor? pad_qkv, SymInt[] window, "
        "SymInt[] shift, SymInt num_heads, float scale) -> (Tensor out, Tensor log_sum_exp)",
        file="attention",
        outputs=_outputs,
        vectors=lambda qkv, _table, _pad, window, shift, *_: (
            attention_vectors,
            qkv.shape[1:4],
            window,
            shift,
        ),
        save=_save,
        gradient=_gradient,
        # q k^T and p v.
        flops=lambda qkv, _table, _pad, window, shift, *_: 4 * _score_products(qkv, window, shift),
    )
)
declare(
    Operator(
        "window_attention_backward(Tensor grad_out, Tensor qkv, Tensor bias_table, "
        "Tensor? pad_qkv, Tensor out, Tensor log_sum_exp, SymInt[] window, SymInt[] shift, "
        "SymInt num_heads, float scale, bool needs_qkv, bool needs_table, bool needs_pad) "
        "-> (Tensor grad_qkv, Tensor grad_table, Tensor grad_pad)",
        file="attention_backward",
        outputs=_grads,
        vectors=lambda _grad, qkv, _table, _pad, _out, _lse, window, shift, *_: (
            attention_vectors,
            qkv.shape[1:4],
            window,
            shift,
        ),
        # q k^T again, and the gradients of v, p, q and k.
        flops=lambda _grad, qkv, _table, _pad, _out, _lse, window, shift, *_: (
            10 * _score_products(qkv, window, shift)
        ),
    )
)
