"""Contract of `cyclic_shift`: the roll of a token grid."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from videoswin_kernels import reference
from videoswin_kernels.geometry import check_triple
from videoswin_kernels.ops._checks import check_grid, is_transformed, no_script
from videoswin_kernels.ops._declare import NAMESPACES, Operator, declare
from videoswin_kernels.ops._vectors import shift_vector
from videoswin_kernels.selection import resolve


@no_script
def cyclic_shift(x: Tensor, shift: Sequence[int], *, kernels: str = "auto") -> Tensor:
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
    grid = check_grid("cyclic_shift", "x", x)
    shift = check_triple("cyclic_shift", "shift", shift, None)
    transformed = is_transformed(x)
    chosen = resolve("cyclic_shift", kernels, x.device, (x.dtype,), is_transformed=transformed)
    if chosen == "reference":
        return reference.cyclic_shift(x, shift)
    # Within the grid first: a schema takes no integer beyond 64 bits, and a shift may be any.
    shift = [s % size for s, size in zip(shift, grid, strict=True)]
    return NAMESPACES[chosen].cyclic_shift(x, shift)


def _outputs(x: Tensor, shift: Sequence[int]) -> Tensor:
    return x.new_empty(x.shape)


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, ctx.shift = inputs
    ctx.grid = x.shape[1:4]


def _gradient(operators: Any, ctx: Any, grad: Tensor) -> tuple:
    back = [-s % size for s, size in zip(ctx.shift, ctx.grid, strict=True)]
    return operators.cyclic_shift(grad, back), None


declare(
    Operator(
        "cyclic_shift(Tensor x, SymInt[] shift) -> Tensor",
        file="cyclic_shift",
        outputs=_outputs,
        vectors=lambda x, shift: (shift_vector, x.shape[1:4], shift),
        save=_save,
        gradient=_gradient,
    )
)
