"""Checkpoints: written whole or not at all, read without running code.

A checkpoint is a file, or of a run under FSDP2 a folder in which each process has written its part.
"""

from __future__ import annotations

import io
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from model import VideoSwin, load_weights
from model.weights.files import FORMAT, WeightsError, sync_folder, write_atomically

# Of a folder all but the first two are in the file REST.
KEYS = {"model", "optimizer", "recipe", "classes", "step", "best_top1", "broken", "videos"} | {
    *("scaler", "skipped", "tested", "test_videos"),
}
REST = "rest.pt"


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be read: one sentence with the path and the reason."""


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write `state` (tensors, numbers, strings, lists and dicts of them) to `path`, atomically."""
    # In memory first: of a full disk torch's writer tells in words that nobody understands.
    data = io.BytesIO()
    torch.save({"format": FORMAT, **state}, data)
    write_atomically(path, lambda file: file.write(data.getbuffer()))


def put(new: Path, path: Path, keep: int) -> None:
    """Gives a checkpoint, a file or a folder, its name; `keep` of them stay with it.

    What was last.pt becomes last-1.pt, that last-2.pt, and so on. Whenever this is interrupted,
    none but the oldest is lost, and that only once the new one has its name.
    """
    number = 0
    while number < keep and numbered(path, number).exists():
        number += 1
    trash = path.with_name(f"old-{path.name}")
    _remove(trash)
    # The first name that is free, or the oldest's, takes the one before it.
    if number == keep:
        number -= 1
        os.replace(numbered(path, number), trash)
    for place in range(number, 0, -1):
        os.replace(numbered(path, place - 1), numbered(path, place))
    os.replace(new, path)
    sync_folder(path.parent)
    _remove(trash)
    mine = [numbered(path, place) for place in range(keep)]
    for other in _of_name(path.parent, path.stem):
        # Of a larger `keep`, or of processes in parts where there are none now, and so older.
        if other not in mine:
            _remove(other)


def numbered(path: Path, number: int) -> Path:
    """The name of the checkpoint so many before the one at `path`."""
    return path.with_name(f"{path.stem}-{number}{path.suffix}") if number else path


def set_aside(path: Path) -> None:
    """Takes its name from a damaged checkpoint, in place of one that was set aside before."""
    aside = path.with_name(f"damaged-{path.name}")
    _remove(aside)
    os.replace(path, aside)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def newest_first(folder: Path) -> list[Path]:
    """The checkpoints of a run to go on from, whole ones and damaged ones."""

    def place(path: Path) -> tuple[int, int]:
        number = path.stem.removeprefix("last").removeprefix("-")
        # Both kinds are there only while the first of one has come and those of the other go.
        return int(number) if number.isdecimal() else 0, -path.stat().st_mtime_ns

    return sorted(_of_name(folder, "last"), key=place)


def _of_name(folder: Path, name: str) -> list[Path]:
    return [*folder.glob(f"{name}*.pt"), *folder.glob(f"{name}*.parts")]


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """The state of a checkpoint that training wrote, its tensors on the CPU.

    Raises:
        CheckpointError: no such file, not a checkpoint, damaged, of another format, or in parts.
    """
    path = Path(path)
    if not path.is_file():
        cure = "it is a folder"
        if path.suffix == ".parts":
            cure += f" of parts; `python -m train.consolidate {path}` makes one file of them"
        raise CheckpointError(f"cannot load {path}: {cure if path.is_dir() else 'no such file'}")
    return _load(path, KEYS)


def load_rest(folder: Path) -> dict[str, Any]:
    """What a checkpoint in parts has beside model and optimiser.

    Raises:
        CheckpointError: as `load_checkpoint`.
    """
    if not (folder / REST).is_file():
        raise CheckpointError(f"cannot load {folder}: it has no {REST}")
    return _load(folder / REST, KEYS - {"model", "optimizer"})


def _load(path: Path, keys: set[str]) -> dict[str, Any]:
    """The state in a file, which has to have these keys."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # torch raises half a dozen types here, from KeyError to UnpicklingError.
        reason = f"not a checkpoint, or damaged ({type(error).__name__})"
        raise CheckpointError(f"cannot load {path}: {reason}") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise CheckpointError(f"cannot load {path}: expected a file written by `python -m train`")
    if missing := sorted(keys - set(state)):
        raise CheckpointError(f"cannot load {path}: it has no {', '.join(missing)}")
    return state


def restore_weights(model: VideoSwin, weights: dict[str, torch.Tensor], path: Path) -> None:
    """Give `model` all its weights from a checkpoint, none missing and none left over.

    Raises:
        CheckpointError: they do not fit.
    """
    try:
        load_weights(model, weights)
    except WeightsError as error:
        raise CheckpointError(f"cannot load {path}: {error}") from error
