"""Contract of `window_partition` and `window_reverse`: token grid to windows and back."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

from torch import Tensor

from videoswin_kernels import reference
from videoswin_kernels.geometry import check_triple, check_window, clamp_window
from videoswin_kernels.ops._checks import check_grid, check_tensor, is_transformed, no_script
from videoswin_kernels.ops._declare import NAMESPACES, Operator, declare
from videoswin_kernels.ops._vectors import window_vectors
from videoswin_kernels.selection import resolve


@no_script
def window_partition(
    x: Tensor,
    *,
    window: Sequence[int],
    shift: Sequence[int] = (0, 0, 0),
    kernels: str = "auto",
) -> Tensor:
    """The windows of a token grid: padded with zeros, rolled by -shift, cut.

    Args:
        x: [B, D, H, W, C], any dtype, any strides.
        window: configured window in tokens; an axis no longer than it is one window without shift.
        shift: configured shift in tokens, 0 <= shift < window.
        kernels: which implementation runs (`videoswin_kernels.selection`).

    Returns:
        [B*M, N, C], dtype of x: batch outermost, then windows and the tokens in each, both in
        row-major order of (depth, height, width). Autocast changes nothing.

    Raises:
        TypeError: x is no tensor, window or shift no sequence of integers.
        ValueError: a wrong rank, a window below 1, a shift outside its range, unknown `kernels`.
        UnavailableError (a RuntimeError): the kernels asked for cannot run here.

    Source: paper section 3.2; upstream `window_partition` and `get_window_size` at db018fb.
    """
    check_grid("window_partition", "x", x)
    window, shift = check_window("window_partition", window, shift)
    transformed = is_transformed(x)
    chosen = resolve("window_partition", kernels, x.device, (x.dtype,), is_transformed=transformed)
    if chosen == "reference":
        return reference.window_partition(x, window, shift)
    return NAMESPACES[chosen].window_partition(x, window, shift)


@no_script
def window_reverse(
    windows: Tensor,
    *,
    grid: Sequence[int],
    window: Sequence[int],
    shift: Sequence[int] = (0, 0, 0),
    kernels: str = "auto",
) -> Tensor:
    """The token grid that `window_partition` cut into `windows`; what stood in padding is dropped.

    Args:
        windows: [B*M, N, C], any dtype, any strides.
        grid: token grid (D, H, W) to return to.
        window, shift: as configured for `window_partition`.
        kernels: which implementation runs (`videoswin_kernels.selection`).

    Returns:
        [B, D, H, W, C], dtype of windows. Autocast changes nothing.

    Raises:
        TypeError: windows is no tensor; grid, window or shift no sequence of integers.
        ValueError: windows does not fit the grid, a bad grid, window or shift, unknown `kernels`.
        UnavailableError (a RuntimeError): the kernels asked for cannot run here.

    Source: upstream `window_reverse` at db018fb.
    """
    where = "window_reverse"
    check_tensor(where, "windows", windows)
    grid = check_triple(where, "grid", grid, 1)
    window, shift = check_window(where, window, shift)
    clamped, _, padded = clamp_window(grid, window, shift)
    tokens, count = prod(clamped), prod(padded) // prod(clamped)
    if windows.dim() != 3 or windows.shape[1] != tokens or windows.shape[0] % count:
        raise ValueError(
            f"{where}: windows must be [B * {count}, {tokens}, C] for grid {grid} and window "
            f"{window}, got {list(windows.shape)}"
        )
    transformed = is_transformed(windows)
    chosen = resolve(where, kernels, windows.device, (windows.dtype,), is_transformed=transformed)
    if chosen == "reference":
        return reference.window_reverse(windows, grid, window, shift)
    return NAMESPACES[chosen].window_reverse(windows, grid, window, shift)


def _partitioned(x: Tensor, window: Sequence[int], shift: Sequence[int]) -> Tensor:
    batch, *grid, channels = x.shape
    clamped, _, padded = clamp_window(grid, window, shift)
    tokens = prod(clamped)
    return x.new_empty((batch * (prod(padded) // tokens), tokens, channels))


def _save_partition(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, ctx.window, ctx.shift = inputs
    ctx.grid = x.shape[1:4]


def _partition_gradient(operators: Any, ctx: Any, grad: Tensor) -> tuple:
    return operators.window_reverse(grad, ctx.grid, ctx.window, ctx.shift), None, None


declare(
    Operator(
        "window_partition(Tensor x, SymInt[] window, SymInt[] shift) -> Tensor",
        file="window_partition",
        outputs=_partitioned,
        vectors=lambda x, window, shift: (window_vectors, x.shape[1:4], window, shift),
        save=_save_partition,
        gradient=_partition_gradient,
    )
)


def _reversed(
    windows: Tensor, grid: Sequence[int], window: Sequence[int], shift: Sequence[int]
) -> Tensor:
    _, _, padded = clamp_window(grid, window, shift)
    count, tokens, channels = windows.shape
    return windows.new_empty((count * tokens // prod(padded), *grid, channels))


def _save_reverse(ctx: Any, inputs: tuple, output: Tensor) -> None:
    _, _, ctx.window, ctx.shift = inputs


def _reverse_gradient(operators: Any, ctx: Any, grad: Tensor) -> tuple:
    return operators.window_partition(grad, ctx.window, ctx.shift), None, None, None


declare(
    Operator(
        "window_reverse(Tensor windows, SymInt[] grid, SymInt[] window, SymInt[] shift) -> Tensor",
        file="window_partition",
        outputs=_reversed,
        vectors=lambda windows, grid, window, shift: (window_vectors, grid, window, shift),
        save=_save_reverse,
        gradient=_reverse_gradient,
    )
)
