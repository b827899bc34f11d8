"""Contract of `patch_merging`: four neighbours side by side, normalised."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor

from videoswin_kernels import reference
from videoswin_kernels.ops._checks import (
    autocast_dtype,
    check_floating,
    check_grid,
    check_number,
    check_vector,
    is_transformed,
    no_script,
    without_autocast,
)
from videoswin_kernels.ops._declare import NAMESPACES, Operator, declare
from videoswin_kernels.ops._vectors import merge_vector
from videoswin_kernels.selection import is_too_wide, resolve


@no_script
def patch_merging(
    x: Tensor, weight: Tensor, bias: Tensor, *, eps: float = 1e-5, kernels: str = "auto"
) -> Tensor:
    """LayerNorm of each 2x2 block of tokens, its four tokens laid side by side in the channels.

    Equivalent to:
        x = F.pad(x, (0, 0, 0, W % 2, 0, H % 2))
        x = torch.cat([x[:, :, h::2, w::2] for h, w in ((0,0), (1,0), (0,1), (1,1))], -1)
        F.layer_norm(x, (4 * C,), weight, bias, eps)

    Padding zeros take part in the statistics. The depth is never merged.

    Args:
        x: [B, D, H, W, C] float64, float32, float16 or bfloat16, any strides.
        weight, bias: [4C], floating point.
        eps: added to the variance, at least 0.
        kernels: which implementation runs (`videoswin_kernels.selection`).

    Returns:
        [B, D, ceil(H/2), ceil(W/2), 4C], dtype of x; under autocast its dtype (x is read as it is).
        Statistics and arithmetic are float32 (float64 for float64), rounded once.

    Raises:
        TypeError: no tensor, not floating point, or an eps that is no number.
        ValueError: a wrong shape or device, a negative eps, or an unknown `kernels`.
        UnavailableError (a RuntimeError): the kernels asked for cannot run here.

    Source: upstream `PatchMerging` at db018fb, up to its Linear.
    """
    where = "patch_merging"
    check_grid(where, "x", x)
    check_floating(where, "x", x)
    check_vector(where, "weight", weight, 4 * x.shape[-1], x)
    check_vector(where, "bias", bias, 4 * x.shape[-1], x)
    check_number(where, "eps", eps, 0)
    dtype = autocast_dtype(x) or x.dtype
    dtypes = (x.dtype, weight.dtype, bias.dtype, dtype)
    too_wide = is_too_wide(4 * x.shape[-1], x.shape[-1])
    transformed = is_transformed(x, weight, bias)
    chosen = resolve(
        where, kernels, x.device, dtypes, is_too_wide=too_wide, is_transformed=transformed
    )
    if chosen == "reference":
        with without_autocast(x):
            return reference.patch_merging(x, weight, bias, eps, dtype)
    return NAMESPACES[chosen].patch_merging(x, weight, bias, float(eps), dtype)[0]


def _outputs(x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype) -> tuple:
    """The result and, for the gradient, mean and 1 / deviation of each of its rows."""
    batch, depth, height, width, channels = x.shape
    merged = (batch, depth, (height + 1) // 2, (width + 1) // 2)
    wide = torch.promote_types(x.dtype, torch.float32)
    mean, rstd = (x.new_empty(prod(merged), dtype=wide) for _ in range(2))
    return x.new_empty((*merged, 4 * channels), dtype=dtype), mean, rstd


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, weight, bias, _, _ = inputs
    _, mean, rstd = output
    ctx.save_for_backward(x, weight, mean, rstd)
    ctx.bias_dtype = bias.dtype
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)


def _gradient(operators: Any, ctx: Any, grad: Tensor | None, *_: None) -> tuple:
    if grad is None:
        return (None,) * 5
    x, weight, mean, rstd = ctx.saved_tensors
    needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
    grad_x, grad_weight, grad_bias = operators.patch_merging_backward(
        grad, x, weight, mean, rstd, needs_x, needs_weight or needs_bias
    )
    return (
        grad_x if needs_x else None,
        grad_weight.to(weight.dtype) if needs_weight else None,
        grad_bias.to(ctx.bias_dtype) if needs_bias else None,
        None,
        None,
    )


def _grads(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    needs_x: bool,
    needs_affine: bool,
) -> tuple:
    """The gradients of x, weight and bias, of size 0 where they are not needed."""
    affine = weight.shape if needs_affine else (0,)
    grad_weight, grad_bias = (weight.new_empty(affine, dtype=mean.dtype) for _ in range(2))
    return x.new_empty(x.shape if needs_x else (0,)), grad_weight, grad_bias


declare(
    Operator(
        "patch_merging(Tensor x, Tensor weight, Tensor bias, float eps, ScalarType dtype) "
        "-> (Tensor out, Tensor mean, Tensor rstd)",
        file="patch_merging",
        outputs=_outputs,
        vectors=lambda x, *_: (merge_vector, x.shape[1:4]),
        save=_save,
        gradient=_gradient,
    )
)
declare(
    Operator(
        "patch_merging_backward(Tensor grad, Tensor x, Tensor weight, Tensor mean, Tensor rstd, "
        "bool needs_x, bool needs_affine) "
        "-> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias)",
        file="patch_merging",
        outputs=_grads,
        vectors=lambda grad, x, *_: (merge_vector, x.shape[1:4]),
    )
)
