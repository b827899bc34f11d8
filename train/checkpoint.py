"""Checkpoints: written whole or not at all, read without running code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from model import VideoSwin, load_weights
from model.weights.files import FORMAT, WeightsError, write_atomically

KEYS = {"model", "optimizer", "recipe", "classes", "step", "best_top1", "broken", "videos"}


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be read: one sentence with the path and the reason."""


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write `state` (tensors, numbers, strings, lists and dicts of them) to `path`, atomically."""
    write_atomically(path, lambda file: torch.save({"format": FORMAT, **state}, file))


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """The state of a checkpoint that training wrote, its tensors on the CPU.

    Raises:
        CheckpointError: no such file, not a checkpoint, damaged, or of another format.
    """
    path = Path(path)
    if not path.is_file():
        reason = "it is a folder" if path.is_dir() else "no such file"
        raise CheckpointError(f"cannot load {path}: {reason}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # torch raises half a dozen types here, from KeyError to UnpicklingError.
        reason = f"not a checkpoint, or damaged ({type(error).__name__})"
        raise CheckpointError(f"cannot load {path}: {reason}") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise CheckpointError(f"cannot load {path}: expected a file written by `python -m train`")
    if missing := sorted(KEYS - set(state)):
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
