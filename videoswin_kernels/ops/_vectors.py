"""The vectors of `geometry.py` on a device: looked up when a kernel runs, never traced.

Operators carry integers alone, so a compiled or exported program holds no vector: what it was
traced with cannot go stale, and one program serves every grid. Vectors are made once for each
(grid, window, shift, device), 12 bytes a token. On a GPU they are kept for the life of the
process: CUDA graphs that have captured a kernel hold their addresses. On a CPU nothing but a
running call does, and the oldest are dropped beyond `CPU_BYTES`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import Tensor

from videoswin_kernels.geometry import Triple, WindowGeometry, merge_index, shift_index


class WindowVectors(NamedTuple):
    """The vectors of a `WindowGeometry` as int32 tensors, and its numbers."""

    source: Tensor
    target: Tensor
    region: Tensor
    mixed: Tensor
    code: Tensor
    place: Tensor
    offset: int
    num_windows: int
    tokens_per_window: int
    has_padding: bool
    has_mask: bool
    canonical_depth: int


# Clips of ever new sizes would fill a server's memory. This is a hundred grids of 16 x 56 x 56
# tokens: a model of one size looks up two of its largest, and smaller ones.
CPU_BYTES = 64 * 2**20
# What a tensor of a few values takes (730 bytes, torch 2.15 on Linux, 2026-11): else the vectors of
# small grids would count for nothing.
TENSOR_BYTES = 768

_held: dict[tuple, WindowVectors | Tensor] = {}


def window_vectors(
    operator: str,
    grid: Triple,
    window: Triple,
    shift: Triple,
    device: torch.device,
    order: str = "dhw",
) -> WindowVectors:
    """The vectors of a token grid under a configured window and shift, on `device`.

    Raises RuntimeError naming `operator` where they would have to be made during a CUDA graph's
    capture: the copy to the device cannot be captured.
    """

    def build() -> WindowVectors:
        geometry = WindowGeometry.build(grid, window, shift, order)
        names = WindowVectors._fields[:6]
        return WindowVectors(
            *(_copied(getattr(geometry, name), device) for name in names),
            geometry.offset,
            geometry.num_windows,
            geometry.tokens_per_window,
            has_padding=geometry.padded != geometry.grid,
            has_mask=bool(geometry.mixed.any()),
            canonical_depth=geometry.canonical_depth,
        )

    return _lookup(operator, "window", (grid, window, shift, order), device, build)


def attention_vectors(
    operator: str, grid: Triple, window: Triple, shift: Triple, device: torch.device
) -> WindowVectors:
    """`window_vectors` with the places of a window in the order that attention has them.

    Softmax does not care, and what comes out goes back by the vector that it came by. With the
    depth innermost eight neighbours of a window as deep have codes that follow each other.
    """
    return window_vectors(operator, grid, window, shift, device, "hwd")


def shift_vector(operator: str, grid: Triple, shift: Triple, device: torch.device) -> Tensor:
    """`shift_index` on `device`; raises as `window_vectors` does."""
    shift = tuple(s % size for s, size in zip(shift, grid, strict=True))
    return _lookup(
        operator, "shift", (grid, shift), device, lambda: _copied(shift_index(grid, shift), device)
    )


def merge_vector(operator: str, grid: Triple, device: torch.device) -> Tensor:
    """`merge_index` on `device`; raises as `window_vectors` does."""
    return _lookup(operator, "merge", (grid,), device, lambda: _copied(merge_index(grid), device))


def warm(lookup: Callable, operator: str, *axes: Sequence, device: torch.device) -> None:
    """Looks vectors up ahead of the first run, from a fake kernel, where that is possible.

    So a compiled program finds them on its GPU before a CUDA graph is captured. Sizes that are
    symbols are left to the run, as are devices that this machine has not.
    """
    if device.type == "cuda" and torch.cuda.is_available():
        is_there = (device.index or 0) < torch.cuda.device_count()
        if is_there and all(type(item) is int for triple in axes for item in triple):
            lookup(operator, *axes, device)


def _lookup(
    operator: str, kind: str, axes: tuple[Sequence, ...], device: torch.device, build: Callable
) -> WindowVectors | Tensor:
    key = (kind, *map(tuple, axes), device)
    found = _held.get(key)
    if found is not None:
        return found
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        grid = tuple(axes[0])
        raise RuntimeError(
            f"{operator}: the geometry of grid {grid} is not on {device} yet; "
            "run once before capturing"
        )
    # In a thread of its own: no tracing, no inference mode and no CUDA graph's memory pool of the
    # caller reaches it, so what is made is plain, and stays where it is.
    with ThreadPoolExecutor(max_workers=1) as fresh:
        made = fresh.submit(build).result()
    # Two callers may build the same; the first to finish is kept, as a kernel may hold it already.
    kept = _held.setdefault(key, made)
    if device.type == "cpu":
        _drop_oldest()
    return kept


def _drop_oldest() -> None:
    """Leaves the newest vectors of the CPU, up to `CPU_BYTES` and at least one; no others go.

    Callers hold what they use. Two threads may drop the same.
    """
    total, is_newest = 0, True
    # A copy, as one step that no thread comes between, in the order in which they were made.
    for key, vectors in reversed(_held.copy().items()):
        if key[-1].type != "cpu":
            continue
        each = (vectors,) if isinstance(vectors, Tensor) else vectors[:6]
        total += sum(vector.nbytes + TENSOR_BYTES for vector in each)
        if total > CPU_BYTES and not is_newest:
            _held.pop(key, None)
        is_newest = False


def _copied(vector: Any, device: torch.device) -> Tensor:
    # Pageable memory: the copy is complete, for every stream, when the call returns.
    return torch.tensor(vector, device=device)
