"""A training run: steps, reports, tests, checkpoints, and going on after an interruption."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from math import inf, nan
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tqdm import tqdm

from model import VideoSwin
from model.weights.files import write_atomically
from train.checkpoint import load_checkpoint, restore_weights, save_checkpoint
from train.curves import draw_curves
from train.data import (
    EpochBatches,
    VideoDataset,
    build_loader,
    read_class_names,
    read_list,
    stream,
)
from train.evaluate import Evaluation, evaluate
from train.optim import build_optimizer, learning_rate_factor, set_learning_rate
from train.recipe import FREE_FIELDS, Recipe, build_model, differences, recipe_of, to_dict
from train.transforms import normalize


class RunError(RuntimeError):
    """A run that cannot start or go on: one sentence."""


class Run:
    """One training run and its folder: last.pt, best.pt, metrics.jsonl, curves.png, recipe.json.

    Attributes:
        step: steps done.
        lr: learning rate of the last step, before the factors of the parameter groups.
        broken: training videos that could not be read so far, path to reason.
        broken_test: the same of the last test.
    """

    def __init__(
        self,
        recipe: Recipe,
        output: Path,
        *,
        kernels: str = "auto",
        device: str | torch.device = "cpu",
        resume: bool = False,
    ) -> None:
        """Prepare the run: lists, model, optimiser; with `resume` from `output/last.pt`.

        Raises:
            RunError: `output` holds a run and `resume` is off, that run had another recipe, or the
                recipe describes no model.
            ListError: an annotation list that cannot be used.
            CheckpointError: last.pt cannot be read, or holds another model.
            OSError: `output` cannot be made.
        """
        self.recipe, self.output, self.device = recipe, Path(output), torch.device(device)
        data, loop = recipe.data, recipe.loop
        self.classes = read_class_names(Path(data.root, data.class_names))
        videos = read_list(Path(data.root, data.train_list), len(self.classes))
        self.test_videos = read_list(Path(data.root, data.test_list), len(self.classes))
        self.output.mkdir(parents=True, exist_ok=True)
        self.dataset = VideoDataset(videos, data, seed=loop.seed)
        torch.manual_seed(loop.seed)
        try:
            self.model: VideoSwin = build_model(recipe.model, len(self.classes), kernels)
        except ValueError as error:
            raise RunError(str(error)) from error
        self.model.to(self.device)
        self.optimizer = build_optimizer(self.model, recipe.optim)
        self.step, self.lr, self.best_top1, self.broken = 0, nan, -inf, {}
        self.broken_test: dict[str, str] = {}
        if self.last.is_file():
            if not resume:
                raise RunError(
                    f"{self.output} already holds a run; --resume continues it, "
                    "another --output starts a new one"
                )
            self._restore()

    @property
    def videos_digest(self) -> str:
        """What the list of training videos is recognised by: its order decides every batch."""
        return hashlib.sha256(json.dumps(self.dataset.videos).encode()).hexdigest()

    @property
    def last(self) -> Path:
        return self.output / "last.pt"

    @property
    def metrics(self) -> Path:
        return self.output / "metrics.jsonl"

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.dataset) // self.recipe.loop.batch_size)

    @property
    def num_steps(self) -> int:
        return self.steps_per_epoch * self.recipe.loop.epochs

    def train(self) -> bool:
        """Train to the last step; False if a signal ended the run early, after a checkpoint."""
        recipe = json.dumps(to_dict(self.recipe), indent=2) + "\n"
        write_atomically(self.output / "recipe.json", lambda file: file.write(recipe.encode()))
        self._forget_lost_reports()
        loop = self.recipe.loop
        batches = EpochBatches(
            len(self.dataset), loop.batch_size, loop.seed, loop.epochs, self.step
        )
        loader = build_loader(self.dataset, batches, self.device)
        bar = tqdm(loader, initial=self.step, total=self.num_steps, unit="step", disable=None)
        meter = Meter()
        with stop_on_signals() as stop:
            for batch in bar:
                self._step(batch, meter)
                is_epoch_end = self.step % self.steps_per_epoch == 0
                if self.step % loop.report_every == 0 or is_epoch_end:
                    self._refuse_divergence(meter)
                    numbers = meter.take()
                    self._report("train", numbers)
                    bar.set_postfix(numbers)
                if is_epoch_end:
                    self._end_epoch()
                elif stop or (loop.checkpoint_every and self.step % loop.checkpoint_every == 0):
                    self._refuse_divergence(meter)
                    self._save(self.last)
                if stop and self.step < self.num_steps:
                    return False
        return True

    def _step(self, batch: Any, meter: Meter) -> None:
        """One step of the optimiser; without a readable video it counts, and changes nothing."""
        for video in batch.broken:
            self.broken[video.path] = video.reason
        # Stochastic depth and dropout are a function of the step, whatever was drawn before: a
        # resumed run draws what the uninterrupted one would have.
        torch.manual_seed(int(stream("step", self.recipe.loop.seed, self.step).integers(2**32)))
        settings = self.recipe.optim
        factor = learning_rate_factor(
            self.step, self.steps_per_epoch, self.recipe.loop.epochs, settings
        )
        self.lr = settings.lr * factor
        set_learning_rate(self.optimizer, self.lr)
        if len(batch.labels):
            self.model.train()
            clips = normalize(batch.clips[:, 0].to(self.device, non_blocking=True))
            labels = batch.labels.to(self.device, non_blocking=True)
            logits = self.model(clips)
            loss = F.cross_entropy(logits, labels)
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            meter.add(loss.detach(), logits.detach(), labels)
        self.step += 1

    def _refuse_divergence(self, meter: Meter) -> None:
        """RunError once a loss was no finite number: such weights must not replace good ones."""
        if not all(loss.isfinite() for loss in meter.losses):
            raise RunError(f"the loss is not finite by step {self.step}: a lower optim.lr may help")

    def _end_epoch(self) -> None:
        """Save; test where it is due; keep the best; RunError if there was nothing to train on."""
        if len(self.broken) == len(dict(self.dataset.videos)):
            path, reason = next(iter(self.broken.items()))
            raise RunError(
                f"none of the {len(self.broken)} training videos could be read, "
                f"the first being {path}: {reason}"
            )
        epoch = self.step // self.steps_per_epoch
        is_due = epoch % self.recipe.loop.evaluate_every == 0 or self.step == self.num_steps
        if is_due:
            result = self.evaluate()
            self.broken_test = dict(result.broken)
            if not len(result.labels):
                path, reason = result.broken[0]
                raise RunError(
                    f"none of the {len(self.test_videos)} test videos could be read, "
                    f"the first being {path}: {reason}"
                )
            self._report("test", result.numbers())
            tqdm.write(f"epoch {epoch}: {result}")
            if result.top1 > self.best_top1:
                self.best_top1 = result.top1
                self._save(self.output / "best.pt")
            draw_curves(self.metrics, self.output / "curves.png")
        self._save(self.last)

    def evaluate(self, frame_order: str = "as filmed") -> Evaluation:
        """The model on the test videos."""
        dataset = VideoDataset(self.test_videos, self.recipe.data, frame_order=frame_order)
        return evaluate(self.model, dataset, self.recipe.loop.test_batch_size, self.device)

    def _report(self, kind: str, numbers: dict[str, float]) -> None:
        epoch = self.step / self.steps_per_epoch
        line = {"kind": kind, "step": self.step, "epoch": epoch, "lr": self.lr}
        with open(self.metrics, "a", encoding="utf-8") as file:
            file.write(json.dumps({**line, **numbers}, allow_nan=False) + "\n")

    def _save(self, path: Path) -> None:
        save_checkpoint(
            path,
            {
                "model": self.model.state_dict(),
                "window_size": list(self.model.backbone.window_size),
                "optimizer": self.optimizer.state_dict(),
                "recipe": to_dict(self.recipe),
                "classes": self.classes,
                "step": self.step,
                "best_top1": self.best_top1,
                "broken": self.broken,
                "videos": self.videos_digest,
            },
        )

    def _restore(self) -> None:
        state = load_checkpoint(self.last)
        changed = differences(recipe_of(state, self.last), self.recipe, FREE_FIELDS)
        if changed:
            raise RunError(f"{self.last} was made with another recipe: {'; '.join(changed)}")
        if state["classes"] != self.classes:
            raise RunError(f"{self.last} was made with other class names")
        if state["videos"] != self.videos_digest:
            raise RunError(
                f"{self.last} was made with another {self.recipe.data.train_list}; a changed list "
                "needs a run of its own (--output)"
            )
        restore_weights(self.model, state["model"], self.last)
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.best_top1 = state["step"], state["best_top1"]
        self.broken = state["broken"]

    def _forget_lost_reports(self) -> None:
        """Drop from metrics.jsonl what steps after the checkpoint, if any, reported and will again.

        A run that was killed leaves them, before its first checkpoint too, and the last line may be
        half a line.
        """
        if not self.metrics.is_file():
            return
        lines = self.metrics.read_text(encoding="utf-8").splitlines(keepends=True)
        whole = [line for line in lines if line.endswith("}\n")]
        kept = "".join(line for line in whole if json.loads(line)["step"] <= self.step)
        write_atomically(self.metrics, lambda file: file.write(kept.encode()))


class Meter:
    """Loss, accuracy and speed since the last report; nothing is read from the device before."""

    def __init__(self) -> None:
        self._start_again()

    def _start_again(self) -> None:
        self.losses, self.hits, self.clips, self.start = [], [], 0, time.monotonic()

    def add(self, loss: torch.Tensor, logits: torch.Tensor, labels: torch.Tensor) -> None:
        self.losses.append(loss)
        self.hits.append((logits.argmax(dim=1) == labels).sum())
        self.clips += len(labels)

    def take(self) -> dict[str, float]:
        """Clips and clips/s since the last call, their mean loss and top-1 (0 to 1) if any."""
        numbers: dict[str, float] = {"clips": self.clips}
        if self.losses:
            numbers["loss"] = torch.stack(self.losses).mean().item()
            numbers["top1"] = torch.stack(self.hits).sum().item() / self.clips
        numbers["clips_per_second"] = self.clips / (time.monotonic() - self.start)
        self._start_again()
        return numbers


@contextmanager
def stop_on_signals() -> Iterator[list[int]]:
    """A list that SIGINT or SIGTERM make true: the step under way ends before the run does.

    A second signal ends the process at once, and its workers, of which one may be stuck in a video.
    """
    received: list[int] = []
    kinds = (signal.SIGINT, signal.SIGTERM)

    def stop(number: int, _frame: object) -> None:
        if received:
            for worker in multiprocessing.active_children():
                worker.kill()
            os._exit(128 + number)
        received.append(number)
        os.write(2, b"\nstopping after this step; once more to stop at once\n")

    before = [signal.signal(kind, stop) for kind in kinds]
    try:
        yield received
    finally:
        for kind, handler in zip(kinds, before, strict=True):
            signal.signal(kind, handler)
