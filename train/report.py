"""What a run tells of itself: metrics.jsonl, and TensorBoard's files where they are asked for."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from model.weights.files import write_atomically
from train.curves import draw_curves


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
        with self._in_spite_of_the_disk(), open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")
        if self.writer:
            for name, number in (("lr", lr), *numbers.items()):
                self.writer.add_scalar(f"{kind}/{name}", number, step)
            self.writer.flush()

    def draw(self) -> None:
        """Draws curves.png of all lines so far."""
        if self.is_first:
            with self._in_spite_of_the_disk():
                draw_curves(self.path, self.path.with_name("curves.png"))

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
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
        whole = [line for line in lines if line.endswith("}\n")]
        last = {"train": step, "test": tested}
        kept = "".join(
            line
            for line, told in zip(whole, map(json.loads, whole), strict=True)
            if told["step"] <= last[told["kind"]]
        )
        write_atomically(self.path, lambda file: file.write(kept.encode()))
