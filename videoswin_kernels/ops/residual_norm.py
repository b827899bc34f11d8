"""Contract of `residual_norm`: add a branch to the residual stream and normalise the sum."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor

from videoswin_kernels import reference
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
from videoswin_kernels.selection import is_too_wide, resolve


@no_script
def residual_norm(
    x: Tensor,
    branch: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float = 1e-5,
    branch_scale: Tensor | None = None,
    kernels: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The residual stream with a branch added, and the LayerNorm of it.

    Equivalent to:
        total = x + branch_scale.view(-1, 1, 1, 1, 1) * branch
        total, F.layer_norm(total, (C,), weight, bias, eps)

    The sum is taken in float32 (float64 for float64) and rounded once to the dtype of x; the norm
    is that of the rounded sum, its statistics in float32 (float64), rounded once.

    Args:
        x: [B, D, H, W, C] float64, float32, float16 or bfloat16, any strides.
        branch: the same shape, any of these dtypes.
        weight, bias: [C], floating point.
        eps: added to the variance, at least 0.
        branch_scale: [B], factor of the branch of each clip (stochastic depth: mask / keep), taken
            as a constant: it gets no gradient. None = 1.
        kernels: which implementation runs (`videoswin_kernels.selection`).

    Returns:
        The sum [B, D, H, W, C] in the dtype of x (a float32 stream stays float32 under autocast)
        and its norm in the same dtype, under autocast in that of autocast.

    Raises:
        TypeError: no tensor, not floating point, or an eps that is no number.
        ValueError: a wrong shape or device, a negative eps, a branch_scale that requires grad, or
            an unknown `kernels`.
        UnavailableError (a RuntimeError): the kernels asked for cannot run here.

    Source: paper section 3.1 (pre-norm block); stochastic depth as timm 0.3.2 `DropPath`.
    """
    where = "residual_norm"
    check_grid(where, "x", x)
    check_floating(where, "x", x)
    check_tensor(where, "branch", branch)
    if branch.shape != x.shape:
        raise ValueError(
            f"{where}: branch must have the shape of x {list(x.shape)}, got {list(branch.shape)}"
        )
    check_floating(where, "branch", branch)
    check_device(where, "branch", branch, x)
    check_vector(where, "weight", weight, x.shape[-1], x)
    check_vector(where, "bias", bias, x.shape[-1], x)
    if branch_scale is not None:
        check_vector(where, "branch_scale", branch_scale, x.shape[0], x)
        if branch_scale.requires_grad:
            raise ValueError(
                f"{where}: branch_scale must not require grad, got one that does; detach it"
            )
    check_number(where, "eps", eps, 0)
    dtype = autocast_dtype(x) or x.dtype
    tensors = (x, branch, weight, bias, *([] if branch_scale is None else [branch_scale]))
    dtypes = (*(each.dtype for each in tensors), dtype)
    too_wide = is_too_wide(x.shape[-1], x.shape[-1])
    transformed = is_transformed(*tensors)
    chosen = resolve(
        where, kernels, x.device, dtypes, is_too_wide=too_wide, is_transformed=transformed
    )
    if chosen == "reference":
        with without_autocast(x):
            return reference.residual_norm(x, branch, weight, bias, eps, branch_scale, dtype)
    operator = NAMESPACES[chosen].residual_norm
    return operator(x, branch, weight, bias, branch_scale, float(eps), dtype)[:2]


def _outputs(
    x: Tensor,
    branch: Tensor,
    weight: Tensor,
    bias: Tensor,
    branch_scale: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> tuple:
    """The results and, for the gradient, mean and 1 / deviation of each row."""
    wide, rows = torch.promote_types(x.dtype, torch.float32), prod(x.shape[:4])
    mean, rstd = (x.new_empty(rows, dtype=wide) for _ in range(2))
    return x.new_empty(x.shape), x.new_empty(x.shape, dtype=dtype), mean, rstd


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    _, branch, weight, bias, branch_scale, _, _ = inputs
    total, _, mean, rstd = output
    ctx.save_for_backward(total, weight, mean, rstd, branch_scale)
    ctx.branch_dtype, ctx.bias_dtype = branch.dtype, bias.dtype
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)


def _gradient(
    operators: Any, ctx: Any, grad_total: Tensor | None, grad_norm: Tensor | None, *_: None
) -> tuple:
    if grad_total is None and grad_norm is None:
        return (None,) * 7
    total, weight, mean, rstd, branch_scale = ctx.saved_tensors
    needs_x, needs_branch, needs_weight, needs_bias = ctx.needs_input_grad[:4]
    if grad_norm is None:
        # Only the sum was used, which knows nothing of weight and bias.
        needs_weight = needs_bias = False
    # Without a factor, and in one dtype, both halves of a sum have one gradient: written once.
    is_shared = needs_branch and branch_scale is None and ctx.branch_dtype == total.dtype
    grad_x, grad_branch, grad_weight, grad_bias = operators.residual_norm_backward(
        grad_total,
        grad_norm,
        total,
        weight,
        mean,
        rstd,
        branch_scale,
        ctx.branch_dtype,
        needs_x or is_shared,
        needs_branch and not is_shared,
        needs_weight or needs_bias,
    )
    if is_shared:
        grad_branch = grad_x
    return (
        grad_x if needs_x else None,
        grad_branch if needs_branch else None,
        grad_weight.to(weight.dtype) if needs_weight else None,
        grad_bias.to(ctx.bias_dtype) if needs_bias else None,
        None,
        None,
        None,
    )


def _grads(
    grad_total: Tensor | None,
    grad_norm: Tensor | None,
    total: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    branch_scale: Tensor | None,
    branch_dtype: torch.dtype,
    needs_x: bool,
    needs_branch: bool,
    needs_affine: bool,
) -> tuple:
    """The gradients of x, branch, weight and bias, of size 0 where they are not needed."""
    affine = weight.shape if needs_affine else (0,)
    grad_weight, grad_bias = (weight.new_empty(affine, dtype=mean.dtype) for _ in range(2))
    return (
        total.new_empty(total.shape if needs_x else (0,)),
        total.new_empty(total.shape if needs_branch else (0,), dtype=branch_dtype),
        grad_weight,
        grad_bias,
    )


declare(
    Operator(
        "residual_norm(Tensor x, Tensor branch, Tensor weight, Tensor bias, Tensor? branch_scale, "
        "float eps, ScalarType dtype) "
        "-> (Tensor total, Tensor norm, Tensor mean, Tensor rstd)",
        file="residual_norm",
        outputs=_outputs,
        save=_save,
        gradient=_gradient,
    )
)
declare(
    Operator(
        "residual_norm_backward(Tensor? grad_total, Tensor? grad_norm, Tensor total, "
        "Tensor weight, Tensor mean, Tensor rstd, Tensor? branch_scale, ScalarType branch_dtype, "
        "bool needs_x, bool needs_branch, bool needs_affine) "
        "-> (Tensor grad_x, Tensor grad_branch, Tensor grad_weight, Tensor grad_bias)",
        file="residual_norm",
        outputs=_grads,
    )
)
