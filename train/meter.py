"""Loss, accuracy and speed of the steps since the last report."""

from __future__ import annotations

import time

import torch

from train.parallel import Group
from train.step import Taken


class Meter:
    """What steps came to; nothing is read from the device before `take`.

    Attributes:
        skipped: steps since the last report whose gradients were no finite numbers.
    """

    def __init__(self, group: Group) -> None:
        self.group = group
        self._start_again()

    def _start_again(self) -> None:
        self.taken: list[Taken] = []
        self.clips = self.skipped = 0
        self.waited = 0.0
        self.start = time.monotonic()

    def add(self, taken: Taken | None, clips: int, waited: float) -> None:
        """A step over so many clips of all processes; None where none could be read.

        `waited` is in seconds: how long this process stood still for its clips.
        """
        self.waited += waited
        if taken is None:
            return
        if taken.is_skipped:
            self.skipped += 1
            return
        self.taken.append(taken)
        self.clips += clips

    def take(self) -> dict[str, float]:
        """Numbers of all steps since the last call, over all processes, but for skipped ones.

        clips, mean loss and top-1 (0 to 1) of them if there are any, clips/s, the share of the time
        that was spent waiting for clips (0 to 1), the length of the last gradients, steps skipped
        if there are any, and the most memory of this process's GPU, in MB.
        """
        seconds = time.monotonic() - self.start
        numbers: dict[str, float] = {"clips": self.clips}
        if self.taken:
            sums = torch.stack(
                [torch.stack((t.loss.double(), t.hits.double())) for t in self.taken]
            )
            loss, hits = self.group.total(*sums.sum(dim=0).tolist())
            numbers |= {"loss": loss / self.clips, "top1": hits / self.clips}
            numbers["gradient_norm"] = self.taken[-1].norm
        if self.skipped:
            numbers["skipped"] = self.skipped
        (waited,) = self.group.total(self.waited / seconds)
        numbers["clips_per_second"] = self.clips / seconds
        numbers["data_wait"] = waited / self.group.world
        if self.group.device.type == "cuda":
            numbers["memory_mb"] = torch.cuda.max_memory_allocated(self.group.device) / 1e6
        self._start_again()
        return numbers
