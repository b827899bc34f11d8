"""Which window weights are of: told by a stored index, or left in a state dict's metadata.

Shapes cannot tell: the tables and indices of windows (8, 7, 7) and (7, 8, 7) have the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from videoswin_kernels.geometry import Triple, relative_position_index, table_rows


def name_window(module: nn.Module, _state: object, _prefix: str, metadata: dict[str, Any]) -> None:
    """Leaves the window in a state dict's metadata, which `torch.save` keeps."""
    metadata["window_size"] = module.window_size


def check_window(
    module: nn.Module,
    state: dict[str, Tensor],
    prefix: str,
    metadata: dict[str, Any],
    *rest: object,
) -> None:
    """Holds a state dict to the module's own window; takes the official index buffer out of it."""
    errors = rest[-1]
    name = f"{prefix}relative_position_index"
    if name in state and not is_index_of(state.pop(name), module.window_size):
        errors.append(f"{name} is not that of the model's window {module.window_size}")
    if tuple(metadata.get("window_size", module.window_size)) != module.window_size:
        errors.append(f"{prefix[:-1]} is of window {metadata['window_size']}, not of the model's")


def window_in_metadata(weights: Mapping[str, Any]) -> object:
    """The window that our models leave in the metadata of their state dicts, if there is any."""
    metadata = getattr(weights, "_metadata", None)
    if isinstance(metadata, Mapping):
        for entry in metadata.values():
            if isinstance(entry, Mapping) and "window_size" in entry:
                return entry["window_size"]
    return None


def windows_of(index: object) -> list[Triple]:
    """The windows whose relative position index this is: none, one, or a few of the same index.

    (1, 1, 8) and (8, 1, 1) count their offsets alike; (8, 7, 7) and (7, 8, 7) do not, though
    their indices and their tables have the same shapes.
    """
    if not is_whole(index) or index.ndim != 2 or len(set(index.shape)) != 1 or not len(index):
        return []
    tokens = len(index)
    divisors = [extent for extent in range(1, tokens + 1) if tokens % extent == 0]
    windows = [
        (depth, height, tokens // (depth * height))
        for depth in divisors
        for height in divisors
        if tokens % (depth * height) == 0
    ]
    return [window for window in windows if is_index_of(index, window)]


def is_index_of(index: object, window_size: Triple) -> bool:
    """Whether `index` is the relative position index, int [N, N], of this window."""
    tokens = prod(window_size)
    if not is_whole(index) or index.shape != (tokens, tokens):
        return False
    if index.dtype.is_floating_point or index.is_complex():
        return False
    # The corner is the last row of the table: it tells most windows apart without the matrix.
    if int(index[-1, 0]) != table_rows(window_size) - 1:
        return False
    return torch.equal(index.cpu().long(), torch.from_numpy(relative_position_index(window_size)))


def is_dense(value: object) -> bool:
    """Whether this is a tensor whose values can be read where they lie."""
    if not isinstance(value, Tensor) or value.layout != torch.strided:
        return False
    return not (value.is_meta or value.is_nested or value.is_quantized)


def is_whole(value: object) -> bool:
    """Whether each value also has a place of its own: an expanded tensor can claim any size."""
    return (
        is_dense(value) and value.untyped_storage().nbytes() >= value.numel() * value.element_size()
    )
