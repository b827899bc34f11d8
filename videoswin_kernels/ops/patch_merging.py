"""Contract of `patch_merging`: four neighbours side by side, normalised."""

from __future__ import annotations

from torch import Tensor

from videoswin_kernels import reference
from videoswin_kernels.ops._checks import (
    autocast_dtype,
    check_floating,
    check_grid,
    check_number,
    check_vector,
    without_autocast,
)
from videoswin_kernels.selection import resolve


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
    resolve(where, kernels, x)
    dtype = autocast_dtype(x) or x.dtype
    with without_autocast(x):
        return reference.patch_merging(x, weight, bias, eps, dtype)
