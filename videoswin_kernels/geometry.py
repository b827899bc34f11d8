"""Window geometry as data: pad, shift, partition, mask and relative position as integer vectors.

The only place with window arithmetic: kernels receive the vectors and know nothing of windows.
All vectors are one-dimensional NumPy int32. Letters: D H W token grid, M windows, N tokens per
window.

Sources: Video Swin Transformer (Liu et al., CVPR 2022), section 3.2; upstream
`mmaction/models/backbones/swin_transformer.py` at db018fb (`get_window_size`, `compute_mask`,
`WindowAttention3D`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import numpy as np

Triple = tuple[int, int, int]
INT32_MAX = 2**31 - 1


def check_triple(where: str, name: str, value: object, minimum: int | None) -> Triple:
    """`value` as a tuple of three ints, none below `minimum` (None: any).

    Raises:
        TypeError: not a sequence of integers.
        ValueError: not three of them, or one below the minimum.
    """

    def expected() -> str:
        # Made where it is raised: a traced size has no repr.
        bound = "" if minimum is None else f" >= {minimum}"
        return (
            f"{where}: {name} must be three integers{bound} (depth, height, width), got {value!r}"
        )

    if not isinstance(value, (list, tuple, np.ndarray)):
        raise TypeError(expected())
    items = tuple(value)
    for item in items:
        # SymInt (a traced size) is no int and no numpy integer, but has __index__ as they do; the
        # compiler takes it for an int, and older ones cannot ask it for an attribute.
        is_integer = isinstance(item, int) or hasattr(item, "__index__")
        if isinstance(item, bool) or not is_integer:
            raise TypeError(expected())
    # NumPy's integers become Python's: only those can be arguments of a registered operator.
    items = tuple(int(item) if isinstance(item, np.integer) else item for item in items)
    if len(items) != 3 or (minimum is not None and any(item < minimum for item in items)):
        raise ValueError(expected())
    return items


def check_window(where: str, window: object, shift: object) -> tuple[Triple, Triple]:
    """The configured window and shift, checked: on each axis 0 <= shift < window."""
    window = check_triple(where, "window", window, 1)
    shift = check_triple(where, "shift", shift, 0)
    if any(s >= w for s, w in zip(shift, window, strict=True)):
        raise ValueError(
            f"{where}: shift must be below window on every axis, got {shift} with window {window}"
        )
    return window, shift


def clamp_window(grid: Triple, window: Triple, shift: Triple) -> tuple[Triple, Triple, Triple]:
    """The window and shift a grid really gets, and the padded grid: `(window, shift, padded)`.

    Per axis: where `size <= window` (equality included) the window becomes the size and the shift
    becomes 0. The padded extent is the size rounded up to a multiple of that window. The arguments
    are taken as checked.

    Source: upstream `get_window_size`.
    """
    axes = tuple(zip(grid, window, shift, strict=True))
    clamped_window = tuple(size if size <= w else w for size, w, _ in axes)
    clamped_shift = tuple(0 if size <= w else s for size, w, s in axes)
    padded = tuple(-(-size // w) * w for size, w in zip(grid, clamped_window, strict=True))
    return clamped_window, clamped_shift, padded


def table_rows(window: Triple) -> int:
    """Rows of the bias table of a configured window: one for each relative position."""
    depth, height, width = window
    return (2 * depth - 1) * (2 * height - 1) * (2 * width - 1)


def _frozen(vector: np.ndarray) -> np.ndarray:
    vector = np.ascontiguousarray(vector.reshape(-1), dtype=np.int32)
    vector.setflags(write=False)
    return vector


def _windows(volume: np.ndarray, window: Triple, order: str) -> np.ndarray:
    """A padded volume `[D, H, W]` cut into windows `[M, N]`, the places of each in `order`."""
    (depth, height, width), (wd, wh, ww) = volume.shape, window
    cut = volume.reshape(depth // wd, wd, height // wh, wh, width // ww, ww)
    places = (1, 3, 5) if order == "dhw" else (3, 5, 1)
    return cut.transpose(0, 2, 4, *places).reshape(-1, wd * wh * ww)


def _axis_region(extent: int, window: int, shift: int) -> np.ndarray:
    """Region (0, 1, 2) along one padded, shifted axis; without shift it is all one."""
    region = np.full(extent, 2)
    if shift:
        region[: extent - window] = 0
        region[extent - window : extent - shift] = 1
    return region


@dataclass(frozen=True, eq=False)
class WindowGeometry:
    """All integer vectors of one (grid, window, shift); build it with `WindowGeometry.build`.

    Attributes:
        grid: token grid (D, H, W) as given.
        window, shift: the clamped ones (`clamp_window`).
        padded: the grid rounded up to whole windows.
        order: order of the tokens inside a window, "dhw" (row-major) or "hwd" (depth fastest).
        num_windows: M.
        tokens_per_window: N.
        source: int32 [M*N], flat index of the input token at window m, place n; -1 for padding.
        target: int32 [D*H*W], inverse of `source`: where a token lies among the M*N places.
        region: int32 [M*N], region number after the shift; a pair of one window is masked iff its
            regions differ.
        mixed: int32 [M], 1 where a window holds more than one region.
        code: int32 [N], position of a place in the bias table's own coordinates.
        offset: bias table row of a pair (query i, key j) is `code[i] - code[j] + offset`.
        place: int32 [max(code) + 1], inverse of `code`; -1 where no place has that code.
    """

    grid: Triple
    window: Triple
    shift: Triple
    padded: Triple
    order: str
    num_windows: int
    tokens_per_window: int
    source: np.ndarray
    target: np.ndarray
    region: np.ndarray
    mixed: np.ndarray
    code: np.ndarray
    offset: int
    place: np.ndarray

    @property
    def canonical_depth(self) -> int:
        """Frames of a window that kernels are specialised for, 0 where it is none.

        It has 8 or 16 frames of 7 x 7 tokens, the depth innermost, in a table for 7 x 7.
        """
        return next((d for d in (8, 16) if np.array_equal(self.code, _canonical_code(d))), 0)

    @classmethod
    def build(
        cls,
        grid: Sequence[int],
        window: Sequence[int],
        shift: Sequence[int],
        order: str = "dhw",
    ) -> WindowGeometry:
        """The geometry of a token grid under a configured window and shift, clamped as upstream.

        Raises:
            TypeError: grid, window or shift is not a sequence of integers.
            ValueError: wrong arity, an extent below 1, a shift outside 0 <= shift < window, an
                unknown order, or a padded grid of more than 2^31 - 1 tokens (vectors are int32).
        """
        where = "WindowGeometry.build"
        grid = check_triple(where, "grid", grid, 1)
        configured, shift = check_window(where, window, shift)
        grid, configured, shift = (tuple(map(int, axes)) for axes in (grid, configured, shift))
        if order not in ("dhw", "hwd"):
            raise ValueError(f"{where}: order must be 'dhw' or 'hwd', got {order!r}")
        window, shift, padded = clamp_window(grid, configured, shift)
        if prod(padded) > INT32_MAX:
            raise ValueError(
                f"{where}: grid must pad to at most {INT32_MAX} tokens, got {padded} from {grid}"
            )

        tokens = np.full(padded, -1, dtype=np.int64)
        tokens[: grid[0], : grid[1], : grid[2]] = np.arange(prod(grid)).reshape(grid)
        tokens = np.roll(tokens, [-s for s in shift], axis=(0, 1, 2))
        source = _windows(tokens, window, order)
        target = np.empty(prod(grid), dtype=np.int64)
        places = np.flatnonzero(source >= 0)
        target[source.reshape(-1)[places]] = places

        axes = [_axis_region(*axis) for axis in zip(padded, window, shift, strict=True)]
        volume = axes[0][:, None, None] * 9 + axes[1][None, :, None] * 3 + axes[2][None, None, :]
        region = _windows(volume, window, order)

        code, offset = _bias_code(window, configured, order)
        place = np.full(code.max() + 1, -1, dtype=np.int64)
        place[code] = np.arange(len(code))
        return cls(
            grid=grid,
            window=window,
            shift=shift,
            padded=padded,
            order=order,
            num_windows=source.shape[0],
            tokens_per_window=source.shape[1],
            source=_frozen(source),
            target=_frozen(target),
            region=_frozen(region),
            mixed=_frozen(region.min(axis=1) != region.max(axis=1)),
            code=_frozen(code),
            offset=offset,
            place=_frozen(place),
        )


def _canonical_code(depth: int) -> np.ndarray:
    """`code` of a window of `depth` frames of 7 x 7 tokens, the depth innermost."""
    h, w, d = np.ogrid[:7, :7, :depth]
    return (d * 169 + h * 13 + w).reshape(-1)


def _bias_code(window: Triple, configured: Triple, order: str) -> tuple[np.ndarray, int]:
    """`code` and `offset` of a clamped window inside the table of the configured one.

    Upstream cuts the first N rows and columns out of the full window's index. So the raster number
    of a place in the *clamped* window is read as if it were one of the *full* window: exact where
    only the depth is clamped, and no true relative position where height or width are.
    """
    _, height, width = configured
    raster = _windows(np.arange(prod(window)).reshape(window), window, order)[0]
    plane, row = (2 * height - 1) * (2 * width - 1), 2 * width - 1

    def code_of(number: np.ndarray | int) -> np.ndarray | int:
        return number // (height * width) * plane + number // width % height * row + number % width

    return code_of(raster), int(code_of(prod(configured) - 1))


def relative_position_index(window: Triple) -> np.ndarray:
    """int64 [N, N]: the bias table row of query i (row) and key j (column) of a full window.

    The buffer that official checkpoints store with each table, made here to check it and to write
    it; no operator reads it. Raises TypeError or ValueError where `window` is none.

    Source: upstream `WindowAttention3D.__init__`.
    """
    window = check_triple("relative_position_index", "window", window, 1)
    code, offset = _bias_code(window, window, "dhw")
    return code[:, None] - code[None, :] + offset


def shift_index(grid: Triple, shift: Triple) -> np.ndarray:
    """int32 [D*H*W]: which flat token of x lands at each flat place of x rolled by `shift`.

    `shift` may be any three integers. Raises TypeError or ValueError for anything else, as for a
    grid extent below 1 or a grid of more than 2^31 - 1 tokens. The roll is that of `torch.roll`.
    """
    grid = _check_grid("shift_index", grid)
    shift = check_triple("shift_index", "shift", shift, None)
    # Within the grid first: NumPy takes no integer beyond 64 bits.
    shift = [s % size for s, size in zip(shift, grid, strict=True)]
    tokens = np.arange(prod(grid)).reshape(grid)
    return _frozen(np.roll(tokens, shift, axis=(0, 1, 2)))


def merge_index(grid: Triple) -> np.ndarray:
    """int32 [4*D*ceil(H/2)*ceil(W/2)]: the four tokens of each merged token, -1 for padding.

    The four stand in upstream's order (h, w) = (0,0), (1,0), (0,1), (1,1): the row below comes
    before the column to the right. Source: upstream `PatchMerging.forward`.
    """
    grid = _check_grid("merge_index", grid)
    depth, height, width = grid
    tokens = np.full((depth, height + height % 2, width + width % 2), -1, dtype=np.int64)
    tokens[:, :height, :width] = np.arange(prod(grid)).reshape(grid)
    quads = [tokens[:, h::2, w::2] for h, w in ((0, 0), (1, 0), (0, 1), (1, 1))]
    return _frozen(np.stack(quads, axis=-1))


def _check_grid(where: str, grid: object) -> Triple:
    grid = check_triple(where, "grid", grid, 1)
    if prod(grid) > INT32_MAX:
        raise ValueError(f"{where}: grid must hold at most {INT32_MAX} tokens, got {grid}")
    return grid
