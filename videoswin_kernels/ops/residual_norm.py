"""Contract of `residual_norm`: add a branch to the residual stream and normalise the sum."""

from __future__ import annotations

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
    without_autocast,
)
from videoswin_kernels.selection import resolve


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
    resolve(where, kernels, x)
    dtype = autocast_dtype(x) or x.dtype
    with without_autocast(x):
        return reference.residual_norm(x, branch, weight, bias, eps, branch_scale, dtype)
