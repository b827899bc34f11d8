"""A step of the optimiser: in as many passes as it takes, judged before it is taken."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import isfinite

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train.augment import erase
from train.optim import OptimSettings, clip_gradients
from train.parallel import Group, adding_up
from train.precision import casting
from train.recipe import LoopSettings
from train.transforms import normalize


@dataclass(frozen=True)
class Taken:
    """What a step of the optimiser found, on this process.

    Attributes:
        loss: sum over this process's clips, a scalar on its device.
        hits: how many of them were predicted right, likewise.
        norm: length of all gradients together, of all processes; of a skipped step not finite.
    """

    loss: Tensor
    hits: Tensor
    norm: float

    @property
    def is_skipped(self) -> bool:
        """Whether the weights are as they were, as the gradients are no finite numbers."""
        return not isfinite(self.norm)


class Stepper:
    """Steps of a model that stands on this process's device, alone or as a part of many.

    The gradients are those of the mean loss over all clips of all processes, however they are
    divided: a process that has fewer clips than others, or none, counts for as much less.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        optim: OptimSettings,
        loop: LoopSettings,
        clip_shape: tuple[int, ...],
        group: Group,
    ) -> None:
        self.module, self.optimizer, self.group = module, optimizer, group
        self.clip_shape = clip_shape
        self.smoothing, self.clip_norm = optim.label_smoothing, optim.clip_norm
        self.clips_per_pass, self.precision = loop.clips_per_pass, loop.precision
        # Small gradients are zero in float16 unless their loss is scaled.
        is_scaled = loop.precision == "float16"
        self.scaler = torch.amp.GradScaler(group.device.type, enabled=is_scaled)

    def num_passes(self, share: int) -> int:
        """Passes of a step in which a process has so many clips at most."""
        return -(-share // self.clips_per_pass) if self.clips_per_pass else 1

    def step(
        self,
        clips: Tensor,
        labels: Tensor,
        count: int,
        num_passes: int,
        boxes: Tensor | None = None,
    ) -> Taken:
        """Takes the gradients of a step, and the step if they are finite numbers.

        Args:
            clips: uint8 [B, 3, T, H, W] of this process, B = 0 if it has none.
            labels: int64 [B].
            count: clips of all processes.
            num_passes: the same for all processes, as they wait for each other in every one.
            boxes: int64 [B, 4], what is erased of each clip (`train.augment.erase`); None nothing.
        """
        self.module.train()
        loss = torch.zeros((), device=self.group.device)
        hits = torch.zeros((), device=self.group.device, dtype=torch.int64)
        parts = self._parts(clips, labels, boxes, num_passes)
        for number, (part, own, out) in enumerate(parts, 1):
            with adding_up(self.module, number == num_passes):
                logits = self._logits(part, out)
                losses = F.cross_entropy(
                    logits[: len(own)], own, label_smoothing=self.smoothing, reduction="sum"
                )
                # Gradients are averaged over the processes: sums over their own clips become the
                # mean over all clips.
                self.scaler.scale(losses * (self.group.world / count)).backward()
            loss += losses.detach()
            hits += (logits[: len(own)].argmax(dim=1) == own).sum()
        self.scaler.unscale_(self.optimizer)
        norm = clip_gradients(self.module.parameters(), self.clip_norm)
        if isfinite(norm):
            self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return Taken(loss, hits, norm)

    def _logits(self, clips: Tensor, boxes: Tensor | None) -> Tensor:
        """float32 [B, classes]."""
        with casting(self.group.device, self.precision):
            clips = normalize(clips)
            return self.module(clips if boxes is None else erase(clips, boxes)).float()

    def _parts(
        self, clips: Tensor, labels: Tensor, boxes: Tensor | None, num_passes: int
    ) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        """The clips, labels and boxes of each pass; one without any has a black clip, and no label.

        A process alone leaves those out: nobody waits for it.
        """
        size = self.clips_per_pass or max(len(labels), 1)
        for start in range(0, num_passes * size, size):
            place = slice(start, start + size)
            own, out = labels[place], None if boxes is None else boxes[place]
            if len(own):
                yield clips[place], own, out
            elif self.group.world > 1:
                black = clips.new_zeros((1, *self.clip_shape), device=self.group.device)
                yield black, own, None
