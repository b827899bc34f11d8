"""The shapes every kernel set is judged with, for its tests, its benches and its authors.

Sizes are odd, not square and below the window where they can be; the last ones are those of a real
model. A case that only one branch of a kernel sees stands here under the name of that branch.
"""

from __future__ import annotations

from math import prod
from typing import NamedTuple

Triple = tuple[int, int, int]

HEAD_WIDTHS = (16, 32, 64)


class Case(NamedTuple):
    """A token grid (D, H, W) with the configured window and shift, before they are clamped."""

    grid: Triple
    window: Triple
    shift: Triple

    @property
    def tokens(self) -> int:
        """N, tokens per window after clamping."""
        return prod(map(min, self.grid, self.window))

    @property
    def windows(self) -> int:
        """M, windows of a clip after clamping and padding."""
        return prod(
            -(-size // min(size, w)) for size, w in zip(self.grid, self.window, strict=True)
        )


class Stage(NamedTuple):
    """One stage of a model: its case, channels C and heads."""

    case: Case
    channels: int
    heads: int


ATTENTION = {
    "exact": Case((4, 6, 6), (2, 3, 3), (1, 1, 1)),
    "unshifted": Case((4, 6, 6), (2, 3, 3), (0, 0, 0)),
    "padded": Case((5, 4, 7), (2, 3, 3), (1, 1, 1)),
    "padded, unshifted": Case((3, 4, 5), (2, 3, 3), (0, 0, 0)),
    "padded, one axis shifted": Case((3, 5, 4), (2, 3, 3), (0, 2, 0)),
    "D clamped": Case((2, 4, 5), (4, 3, 2), (2, 1, 1)),
    "H clamped": Case((5, 2, 5), (2, 4, 3), (1, 2, 1)),
    "W clamped": Case((3, 5, 3), (2, 3, 5), (1, 1, 2)),
    "H and W clamped": Case((5, 2, 3), (2, 3, 4), (1, 1, 2)),
    "all clamped": Case((2, 2, 2), (2, 3, 3), (1, 1, 1)),
    "one token": Case((1, 1, 1), (2, 3, 3), (1, 1, 1)),
    "one token a window": Case((3, 2, 4), (1, 1, 1), (0, 0, 0)),
    "odd everything": Case((5, 7, 9), (3, 5, 3), (1, 2, 1)),
}
# Windows of a real model on grids of one or two of them: an interpreted kernel takes 0.2 s for each
# window and head at N = 392, 0.8 s at N = 784.
LARGE = {
    "8x7x7, padded": Case((9, 7, 7), (8, 7, 7), (4, 3, 3)),
    "16x7x7, D clamped": Case((9, 7, 7), (16, 7, 7), (8, 3, 3)),
    "16x7x7": Case((16, 7, 7), (16, 7, 7), (8, 3, 3)),
    "beyond 784": Case((8, 11, 10), (8, 12, 12), (4, 6, 6)),
}

MOVEMENT = {
    **{name: ATTENTION[name] for name in ("exact", "unshifted", "padded", "D clamped")},
    "padded, one axis shifted": Case((5, 4, 7), (2, 3, 3), (0, 2, 0)),
    "H and W clamped": Case((5, 2, 3), (2, 3, 3), (1, 2, 2)),
    "all clamped": Case((2, 3, 2), (4, 4, 4), (3, 3, 3)),
    "one token": ATTENTION["one token"],
    "one token a window": ATTENTION["one token a window"],
    "8x7x7, D clamped": Case((4, 14, 14), (8, 7, 7), (4, 3, 3)),
}

# Rolls that stay, go forward, go back, and go more than once around an axis of this grid.
SHIFT_GRID = (3, 5, 4)
SHIFTS = [(0, 0, 0), (1, 2, 3), (-1, -2, -3), (0, 2, 0), (7, -11, 4), (-300, 0, 1)]

# Grids of even and odd height and width, and of one row, column or token.
MERGING = [(2, 4, 6), (3, 5, 4), (2, 4, 7), (2, 7, 7), (1, 1, 1), (3, 1, 2)]

# Shapes [B, D, H, W, C]: widths below, at and beside a power of two, batches of one and more.
NORM = [(2, 3, 5, 4, 7), (3, 1, 1, 1, 8), (1, 2, 3, 1, 96), (4, 1, 5, 1, 6)]

# Stages 1 to 4 of swin_t on a clip of 32 x 224 x 224, for a GPU.
PRODUCTION = {
    f"swin_t stage {number + 1}": Stage(
        Case((16, 56 >> number, 56 >> number), (8, 7, 7), (4, 3, 3)), 96 << number, 3 << number
    )
    for number in range(4)
}
