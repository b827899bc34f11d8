"""What a run tells of itself: metrics.jsonl, and TensorBoard's files where they are asked for."""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from train.curves import draw_curves
from train.partial import write_text


class Report:
    """Lines of numbers, each with its step; of a process that is not the first, none.

    Args:
        output: the folder of the run.
        step: that of the run's checkpoint: what steps after it reported, they report again.
        tested: the step of the last test that it knows of; later ones are done again, too.
        is_first: whether this process writes.
        has_tensorboard: whether the numbers are written for TensorBoard, too, in a folder of this
            name.

    Raises:
        ImportError: TensorBoard is asked for, and is not installed.
    """

    def __init__(
        self,
        output: Path,
        step: int,
        tested: int,
        *,
        is_first: bool = True,
        has_tensorboard: bool = False,
    ) -> None:
        self.path, self.is_first, self.writer = output / "metrics.jsonl", is_first, None
        self.has_failed = False
        if not is_first:
            return
        self._forget_after(step, tested)
        if has_tensorboard:
            # Imported here: it takes a second, and not every machine has it.
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                raise ImportError("--tensorboard needs pip install tensorboard") from error
            self.writer = SummaryWriter(output / "tensorboard", purge_step=step + 1)

    def add(self, kind: str, step: int, epoch: float, lr: float, numbers: dict[str, Any]) -> None:
        """Adds a line, and makes sure that it is written."""
        if not self.is_first:
            return
        line = {"kind": kind, "step": step, "epoch": epoch, "lr": lr, **numbers}
        with self._in_spite_of_the_disk():
            _append(self.path, (json.dumps(line, allow_nan=False) + "\n").encode())
        if self.writer:
            for name, number in (("lr", lr), *numbers.items()):
                self.writer.add_scalar(f"{kind}/{name}", number, step)
            self.writer.flush()

    def name_broken(self, videos: dict[str, str]) -> None:
        """Writes which videos could not be read so far, and why: a line each, if there are any."""
        if self.is_first and videos:
            lines = "".join(f"{path}\t{reason}\n" for path, reason in sorted(videos.items()))
            with self._in_spite_of_the_disk():
                write_text(self.path.with_name("broken.txt"), lines)

    def draw(self) -> None:
        """Draws curves.png of all lines so far."""
        if self.is_first:
            with self._in_spite_of_the_disk():
                draw_curves(read_lines(self.path), self.path.with_name("curves.png"))

    @contextmanager
    def _in_spite_of_the_disk(self) -> Iterator[None]:
        """What cannot be written, on a full disk for instance, is said once, and missing."""
        try:
            yield
        except OSError as error:
            if not self.has_failed:
                reason = (error.strerror or str(error)).lower()
                print(f"{self.path.parent}: a report is missing: {reason}", file=sys.stderr)
            self.has_failed = True

    def close(self) -> None:
        """Ends what TensorBoard's writer runs beside."""
        if self.writer:
            self.writer.close()

    def _forget_after(self, step: int, tested: int) -> None:
        """Drops what steps and tests after the checkpoint, if any, reported and will again.

        A run that was killed leaves them, before its first checkpoint too, and the last line may be
        half a line.
        """
        if not self.path.is_file():
            return
        last = {"train": step, "test": tested}
        told = [line for line in read_lines(self.path) if line["step"] <= last[line["kind"]]]
        kept = "".join(json.dumps(line) + "\n" for line in told)
        write_text(self.path, kept)


def _append(path: Path, data: bytes) -> None:
    """Adds to a file all of the data or, raising OSError, nothing: a full disk takes a part."""
    with open(path, "ab", buffering=0) as file:
        end = file.tell()
        try:
            if file.write(data) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        except OSError:
            file.truncate(end)
            raise


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, but for those that are no whole line."""
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with suppress(ValueError):
            found.append(json.loads(line))
    return [line for line in found if isinstance(line, dict)]
