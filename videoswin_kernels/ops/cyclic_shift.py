"""Contract of `cyclic_shift`: the roll of a token grid."""

from __future__ import annotations

from torch import Tensor

from videoswin_kernels import reference
from videoswin_kernels.geometry import Triple, check_triple
from videoswin_kernels.ops._checks import check_grid
from videoswin_kernels.selection import resolve


def cyclic_shift(x: Tensor, shift: Triple, *, kernels: str = "auto") -> Tensor:
    """`x` rolled along depth, height and width.

    Equivalent to:
        torch.roll(x, shift, (1, 2, 3))

    Args:
        x: [B, D, H, W, C], any dtype, any strides.
        shift: tokens to roll by on each axis, any three integers; a window shift is negative here.
        kernels: which implementation runs (`videoswin_kernels.selection`).

    Returns:
        [B, D, H, W, C], dtype of x. Autocast changes nothing.

    Raises:
        TypeError: x is no tensor, or shift no sequence of integers.
        ValueError: x is not of rank 5, shift is not three integers, or an unknown `kernels`.
        UnavailableError (a RuntimeError): the kernels asked for cannot run here.

    Source: paper section 3.2; upstream `SwinTransformerBlock3D.forward_part1` at db018fb.
    """
    check_grid("cyclic_shift", "x", x)
    shift = check_triple("cyclic_shift", "shift", shift, None)
    resolve("cyclic_shift", kernels, x)
    return reference.cyclic_shift(x, shift)
