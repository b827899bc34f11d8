"""Between a file's weights and a model's: windows matched, 2-D inflated, every misfit noted."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from model.weights.files import shown
from model.weights.formats import PATCHES, TABLE, Recognised, stored_windows
from model.weights.inflation import inflate_patches, inflate_table, square_window, stretch_table
from model.weights.windows import is_dense, is_index_of, is_whole
from videoswin_kernels.geometry import Triple, table_rows


class Problems:
    """Everything that is wrong with some weights, and what would help, as one clause."""

    def __init__(self) -> None:
        self.names: dict[str, list[str]] = {}
        self.cures: dict[str, None] = {}

    def add(self, kind: str, names: Iterable[str]) -> None:
        """Note the names of entries with a problem of this kind, if there are any."""
        if names := [shown(name) for name in names]:
            self.names.setdefault(kind, []).extend(names)

    def __bool__(self) -> bool:
        return bool(self.names)

    def __str__(self) -> str:
        clauses = [f"{kind} {', '.join(names)}" for kind, names in self.names.items()]
        return "; ".join([*clauses, *self.cures])


def fit_windows(
    found: Recognised, window_size: Triple, interpolate_time: bool, problems: Problems
) -> tuple[dict[str, Any], list[str]]:
    """The state of 3-D weights for a model with this window, and the tables that were resized.

    Every stored index must be that of one window, and that the model's, or with `interpolate_time`
    one of another depth, whose tables are then stretched.
    """
    state = dict(found.state)
    tables = [n for n, v in state.items() if n.endswith(TABLE) and _is_matrix(v)]
    window = _stored_window(found, [state[name] for name in tables], window_size)
    wrong = (n for n, index in found.index.items() if not window or not is_index_of(index, window))
    problems.add("no index of their window in", (found.names[name] for name in wrong))
    if window is None or window == window_size:
        return state, []
    if window[1:] != window_size[1:] or not interpolate_time:
        problems.add("windows of", [f"{spell(window)} where the model has {spell(window_size)}"])
        cure = f"window_size={window} builds a model they fit"
        if window[1:] == window_size[1:]:
            cure += ", interpolate_time=True stretches them over time"
        problems.cures[cure] = None
        return state, []
    rows = table_rows(window)
    strange = [name for name in tables if len(state[name]) != rows]
    problems.add("no table of their window in", (found.names[name] for name in strange))
    if not strange:
        for name in tables:
            state[name] = stretch_table(state[name], window, window_size[0])
    return state, tables


def _stored_window(found: Recognised, tables: list[Tensor], expected: Triple) -> Triple | None:
    """The window of the file: from its indices, its own word, or the length of its tables."""
    if windows := stored_windows(found):
        return expected if expected in windows else windows[0]
    plane = table_rows((1, *expected[1:]))
    lengths = {len(table) for table in tables}
    if len(lengths) != 1 or (rows := lengths.pop()) % plane or rows // plane % 2 == 0:
        return None
    return ((rows // plane + 1) // 2, *expected[1:])


def inflate(
    found: Recognised, window_size: Triple, frames: int, problems: Problems
) -> tuple[dict[str, Any], list[str]]:
    """The state of 2-D weights for a model with this window and patches of so many frames.

    Returns it with the names of the tables that were resized, rather than only repeated in time.
    The stored indices do not matter, as upstream drops them: 2-D windows are square, and their
    order never was another.
    """
    state, resized = dict(found.state), []
    for name, value in found.state.items():
        if name.endswith(TABLE) and _is_matrix(value):
            extent = square_window(value)
            if extent is None:
                problems.add("no table of a square window in", [found.names[name]])
                continue
            state[name] = inflate_table(value, window_size)
            if (extent, extent) != window_size[1:]:
                resized.append(name)
        elif name == PATCHES and is_whole(value) and value.ndim == 4:
            state[name] = inflate_patches(value, frames)
    return state, resized


def check_values(
    found: Recognised, state: Mapping[str, Any], wanted: Mapping[str, Tensor], problems: Problems
) -> dict[str, Tensor]:
    """The values for the parameters of the same names, in their dtypes and on their devices.

    What is wrong is noted. A device that has no room for them says so here, before any is written.
    """
    ready = {}
    for name in [name for name in wanted if name in state]:
        value, parameter, given = state[name], wanted[name], found.names[name]
        if not isinstance(value, Tensor):
            problems.add("no tensor but", [f"{given} ({type(value).__name__})"])
        elif not is_dense(value):
            problems.add("no dense values in", [given])
        elif not value.is_floating_point():
            problems.add("not floating point", [f"{given} ({str(value.dtype)[6:]})"])
        elif value.shape != parameter.shape:
            shapes = f"{list(value.shape)} instead of {list(parameter.shape)}"
            problems.add("of another shape", [f"{given} {shapes}"])
        else:
            ready[name] = value.detach().to(parameter.device, parameter.dtype)
            if not ready[name].isfinite().all():
                problems.add(f"not finite in {str(parameter.dtype)[6:]}", [given])
    return ready


def suggest_fresh(missing: Sequence[str], unfit: Sequence[str], problems: Problems) -> None:
    """For what weights of another purpose lack or have otherwise, say how to go without it.

    These are a classifier's head, and the norms of a backbone that returns several stages. Where
    anything else is missing too, it is another model's weights, and nothing that is known helps.
    The names are the model's own.
    """
    found = [re.match(r"(cls_head|norm\d+)\.", name) for name in (*missing, *unfit)]
    if not all(found[: len(missing)]):
        problems.cures.clear()
    elif modules := tuple(dict.fromkeys(match[1] for match in found if match)):
        inside = ", ".join(f'"{name}"' for name in modules) + "," * (len(modules) == 1)
        problems.cures[f"fresh=({inside}) keeps the model's own"] = None


def spell(sizes: Iterable[int], between: str = "x") -> str:
    """A window as people write it, 8x7x7, or other sizes."""
    return between.join(map(str, sizes))


def _is_matrix(value: object) -> bool:
    """Whether arithmetic on this table makes sense; `check_values` says why where it does not."""
    return (
        is_whole(value) and value.ndim == 2 and value.is_floating_point() and 0 not in value.shape
    )
