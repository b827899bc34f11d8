"""The checkpoints of a run: the last few and the best, whole or in parts, and going on."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException

from train import state
from train.checkpoint import (
    REST,
    CheckpointError,
    load_checkpoint,
    load_rest,
    newest_first,
    put,
    restore_weights,
    save_checkpoint,
    set_aside,
)
from train.parallel import Group


class Checkpoints:
    """What a run writes into its folder to go on from.

    A checkpoint that cannot be written, on a full disk for instance, does not end a run: that is
    said, what was there before is still there, and the next one is tried.

    Attributes:
        failures: why the last attempt to write a file failed, by its name; none that succeeded.
    """

    def __init__(
        self,
        folder: Path,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        group: Group,
        *,
        keep: int,
        is_in_parts: bool,
    ) -> None:
        self.folder, self.model, self.optimizer, self.group = folder, model, optimizer, group
        self.keep, self.is_in_parts = keep, is_in_parts
        self.failures: dict[str, str] = {}

    def save_last(self, rest: dict[str, Any]) -> bool:
        """Writes the newest checkpoint, and says whether it could; every process has to call it.

        `rest` is what it has beside model and optimiser.
        """
        if self.is_in_parts:
            return self._attempt(self.folder / "last.parts", rest, self._write_parts, self.keep)
        return self._attempt(self.folder / "last.pt", rest, self._write_whole, self.keep)

    def save_best(self, rest: dict[str, Any]) -> bool:
        """Writes best.pt, which is one file in any case; otherwise as `save_last`."""
        return self._attempt(self.folder / "best.pt", rest, self._write_whole, 1)

    def _attempt(
        self,
        path: Path,
        rest: dict[str, Any],
        write: Callable[[Path, dict[str, Any]], None],
        keep: int,
    ) -> bool:
        new, reason = path.with_name(f"new-{path.name}"), ""
        try:
            write(new, rest)
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
        (is_lost,) = self.group.total(bool(reason))
        if not is_lost:
            if self.group.is_first:
                put(new, path, keep)
            self.failures.pop(path.name, None)
            return True
        # Who has no reason of its own waits for the others in vain.
        reason = next(each for each in self.group.gather(reason) if each)
        said = f"{path}: step {rest['step']} could not be saved: {reason}"
        self.failures[path.name] = said
        if self.group.is_first:
            shutil.rmtree(new, ignore_errors=True)
            print(f"{said}; the run goes on", file=sys.stderr)
        return False

    def _write_whole(self, path: Path, rest: dict[str, Any]) -> None:
        """Writes a file in the first process; every one has to call it."""
        if self.is_in_parts:
            whole = state.gathered(self.model, self.optimizer)
        elif self.group.is_first:
            moments = state.named_moments(self.model, self.optimizer)
            whole = {"model": self.model.state_dict(), "optimizer": moments}
        if self.group.is_first:
            save_checkpoint(path, {**whole, **rest})

    def _write_parts(self, folder: Path, rest: dict[str, Any]) -> None:
        """Writes a folder; every process has to call it. OSError: one of them could not."""
        if self.group.is_first:
            shutil.rmtree(folder, ignore_errors=True)
        self.group.wait()
        try:
            state.write_parts(self.model, self.optimizer, folder)
        except CheckpointException as error:
            raise OSError(reason_of(error)) from error
        if self.group.is_first:
            save_checkpoint(folder / REST, rest)

    def restore(self, check: Callable[[dict[str, Any], Path], None]) -> tuple[str, dict[str, Any]]:
        """Goes on from the newest checkpoint that can be read: its name, and what else it has.

        Those that cannot are renamed, and said.

        Args:
            check: raises if a checkpoint is of another run.

        Raises:
            CheckpointError: each one is damaged, or of another model: what the newest one lacks.
        """
        problems: dict[Path, CheckpointError] = {}
        for path in newest_first(self.folder):
            try:
                found = load_checkpoint(path) if path.suffix == ".pt" else load_rest(path)
                check(found, path)
                self._set(path, found)
            except CheckpointError as error:
                problems[path] = error
                continue
            self.group.wait()
            if self.group.is_first:
                for damaged, problem in problems.items():
                    print(f"{problem}; going on from {path.name}", file=sys.stderr)
                    set_aside(damaged)
                os.replace(path, path.with_name(f"last{path.suffix}"))
            return path.name, found
        raise next(iter(problems.values()))

    def _set(self, path: Path, found: dict[str, Any]) -> None:
        """Gives model and optimiser what a checkpoint has of them; CheckpointError if it cannot."""
        try:
            if path.suffix != ".pt":
                state.read_parts(self.model, self.optimizer, path)
            elif self.is_in_parts:
                state.scatter(self.model, self.optimizer, found)
            else:
                restore_weights(self.model, found["model"], path)
                state.set_named_moments(self.model, self.optimizer, found["optimizer"])
        except CheckpointError:
            raise
        except (Exception, CheckpointException) as error:
            # Of a missing or damaged part torch raises what each of its readers has met.
            raise CheckpointError(f"cannot load {path}: {reason_of(error)}") from error


def reason_of(error: BaseException) -> str:
    """The first line of an error, or of the first one that it collects of several processes."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    said = str(error).strip().partition("\n")[0]
    return said or type(error).__name__
