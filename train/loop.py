"""A training run: steps, reports, tests, checkpoints, and going on after an interruption."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from math import inf, nan
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from model import VideoSwin
from train.batches import EpochBatches, stream
from train.checkpoint import newest_first
from train.data import Batch, VideoDataset, build_loader, open_listed
from train.evaluate import Evaluation, evaluate
from train.meter import Meter
from train.optim import build_optimizer, learning_rate_factor, set_learning_rate
from train.parallel import Group, Parallel, spread
from train.partial import write_text
from train.prefetch import steady
from train.recipe import (
    FREE_FIELDS,
    Recipe,
    begin_with_weights,
    build_model,
    differences,
    recipe_of,
    to_dict,
)
from train.report import Report
from train.saving import Checkpoints
from train.signals import stop_on_signals
from train.step import Stepper
from train.video import VideoError


class RunError(RuntimeError):
    """A run that cannot start or go on: one sentence."""


class Run:
    """One training run and its folder: checkpoints, metrics.jsonl, curves.png, recipe.json.

    Attributes:
        step: steps done.
        lr: learning rate of the last step, before the factors of the parameter groups.
        skipped: steps whose gradients were no finite numbers, and which changed nothing.
        tested: steps done at the last test.
        broken: training videos that could not be read so far, path to reason.
        broken_test: the same of the last test.
        beginning: a sentence on the weights that the run began with.
    """

    def __init__(
        self,
        recipe: Recipe,
        output: Path,
        *,
        kernels: str = "auto",
        device: str | torch.device = "cpu",
        resume: bool = False,
        group: Group | None = None,
        parallel: Parallel = "ddp",
        compiles: bool = False,
        has_tensorboard: bool = False,
        profiled: int = 0,
    ) -> None:
        """Prepare the run: lists, model, optimiser; with `resume` from its newest checkpoint.

        Args:
            recipe: what decides its numbers.
            output: its folder.
            kernels: which implementation runs the operators.
            device: of a process alone; that of the `group` otherwise.
            resume: go on from the run in `output`, if there is one.
            group: this process's place among others.
            parallel: how the model is spread over them.
            compiles: whether torch.compile sees the model.
            has_tensorboard: whether the reports are written for TensorBoard, too.
            profiled: steps that torch's profiler records, after two, into trace.json.

        Raises:
            RunError: `output` holds a run and `resume` is off, that run had another recipe, the
                recipe describes no model, or has fewer clips in a step than there are processes,
                or those do not agree on what they are to do.
            ListError: an annotation list that cannot be used.
            CheckpointError: no checkpoint can be read, or it holds another model.
            WeightsError: the weights to begin with cannot be had, read or used.
            OSError: `output` cannot be made.
        """
        self.recipe, self.output = recipe, Path(output)
        self.group = group or Group(torch.device(device))
        self.device, self.profiled = self.group.device, profiled
        data, loop = recipe.data, recipe.loop
        if loop.batch_size < self.group.world:
            raise RunError(
                f"loop.batch_size must be at least the number of processes {self.group.world}, "
                f"got {loop.batch_size}"
            )
        is_in_parts = parallel == "fsdp" and self.group.world > 1
        if is_in_parts and loop.precision == "float16":
            # The scaled loss's check looks at this process's part of the gradients alone.
            raise RunError("loop.precision=float16 is not for parts (fsdp), bfloat16 is")
        self.classes = data.read_class_names()
        videos = data.read(data.train_list, self.classes)
        self.test_videos = data.read(data.test_list, self.classes)
        self.output.mkdir(parents=True, exist_ok=True)
        self.dataset = VideoDataset(videos, data, seed=loop.seed)
        self.step, self.lr, self.best_top1, self.skipped, self.tested = 0, nan, -inf, 0, 0
        self.broken: dict[str, str] = {}
        self.broken_test: dict[str, str] = {}
        has_begun = bool(newest_first(self.output))
        digests = (videos.digest, self.test_videos.digest)
        self.group.agree("recipe, videos, --output", has_begun, to_dict(recipe), digests)
        if has_begun and not resume:
            raise RunError(
                f"{self.output} already holds a run; --resume continues it, "
                "another --output starts a new one"
            )
        torch.manual_seed(loop.seed)
        try:
            self.model: VideoSwin = build_model(recipe.model, len(self.classes), kernels)
            if not has_begun:
                self.beginning = begin_with_weights(self.model, recipe.model)
        except ValueError as error:
            raise RunError(str(error)) from error
        self.model.to(self.device)
        self.module = spread(self.model, parallel, self.group, compiles=compiles)
        self.optimizer = build_optimizer(self.model, recipe.optim)
        shape = (3, data.clip_len, data.crop, data.crop)
        self.stepper = Stepper(self.module, self.optimizer, recipe.optim, loop, shape, self.group)
        self.checkpoints = Checkpoints(
            self.output,
            self.model,
            self.optimizer,
            self.group,
            keep=loop.keep,
            is_in_parts=is_in_parts,
        )
        if has_begun:
            name, rest = self.checkpoints.restore(self._check)
            self.beginning = f"goes on from {name}"
            self._set_counters(rest)
            self.group.agree("--output", name, self.step)
        self.report = Report(
            self.output,
            self.step,
            self.tested,
            is_first=self.group.is_first,
            has_tensorboard=has_tensorboard,
        )

    @property
    def classes_without_videos(self) -> list[str]:
        """Names of classes that no training video is of."""
        labels = set(self.dataset.videos.labels.tolist())
        return [name for number, name in enumerate(self.classes) if number not in labels]

    @property
    def steps_per_epoch(self) -> int:
        return self.batches().steps_per_epoch

    @property
    def num_steps(self) -> int:
        return self.batches().num_steps

    def batches(self) -> EpochBatches:
        """This process's keys of the steps that are left."""
        loop, group = self.recipe.loop, self.group
        number = len(self.dataset)
        place = (self.step, group.rank, group.world)
        return EpochBatches(number, loop.batch_size, loop.seed, loop.epochs, *place)

    def __str__(self) -> str:
        """How many clips a step has, and how they are divided."""
        clips = self.batches().share_of(0)
        passes = self.stepper.num_passes(clips)
        most = min(self.recipe.loop.clips_per_pass or clips, clips)
        return (
            f"{min(self.recipe.loop.batch_size, len(self.dataset))} clips a step: at most {most} "
            f"a pass x {passes} passes x {self.group.world} processes"
        )

    def train(self) -> bool:
        """Train to the last step; False if a signal ended the run early, after a checkpoint.

        Raises:
            RunError: no video can be read, too many steps in a row are skipped or have no video
                that can be read, or the last attempt to write a checkpoint failed.
            WorkerError: data workers die again and again.
            OSError: recipe.json cannot be written.
        """
        if self.group.is_first:
            recipe = json.dumps(to_dict(self.recipe), indent=2) + "\n"
            write_text(self.output / "recipe.json", recipe)
        loop = self.recipe.loop
        bar = tqdm(
            initial=self.step,
            total=self.num_steps,
            unit="step",
            disable=None if self.group.is_first else True,
        )
        meter, in_a_row, unread = Meter(self.group), 0, 0
        if not self.step:
            self._try_some()
        with stop_on_signals() as stop, self._profiler() as profiler, bar:
            # A signal may have ended the run before the test of its last epoch.
            goes_on = not self._is_test_due or self._end_epoch(stop)
            for batch, waited in self._batches() if goes_on else ():
                taken = self._step(batch, meter, waited)
                bar.update()
                if profiler:
                    profiler.step()
                in_a_row = in_a_row + 1 if taken and taken.is_skipped else 0
                if in_a_row == loop.most_skipped:
                    raise RunError(
                        f"the gradients of {in_a_row} steps in a row, to step {self.step}, are no "
                        "finite numbers: a lower optim.lr may help; the weights are those before"
                    )
                unread = 0 if taken else unread + 1
                if unread == loop.most_skipped:
                    said = (
                        f"of {unread} steps in a row, to step {self.step}, no video could be read"
                    )
                    raise RunError(f"{said}{self._first()}")
                is_epoch_end = self.step % self.steps_per_epoch == 0
                if self.step % loop.report_every == 0 or is_epoch_end:
                    numbers = meter.take()
                    self._report("train", numbers)
                    bar.set_postfix(numbers)
                (stops,) = self.group.total(bool(stop))
                if is_epoch_end and not self._end_epoch(stop):
                    break
                is_due = loop.checkpoint_every and self.step % loop.checkpoint_every == 0
                if not is_epoch_end and (stops or is_due):
                    self.checkpoints.save_last(self._rest())
                if stops:
                    break
        self.report.close()
        if failures := self.checkpoints.failures.values():
            said = "; ".join(failures)
            raise RunError(f"{said}; the ones before are there to go on from")
        return self.step == self.num_steps and not self._is_test_due

    def _try_some(self) -> None:
        """RunError if of many training videos none can be opened: hours would come to nothing."""
        data, videos = self.recipe.data, self.dataset.videos
        places = np.linspace(0, len(videos) - 1, min(len(videos), 64)).astype(int).tolist()
        broken = {}
        for video in map(videos.__getitem__, places):
            try:
                open_listed(video, data)
                return
            except VideoError as error:
                broken[video.name] = error.reason
        self.broken |= broken
        cure = ""
        if data.layout == "files" and places and videos[0].name.rpartition(" ")[2].isdecimal():
            cure = "; of folders of frames --data.layout=frames reads the list"
        said = f"none of {len(broken)} training videos can be opened"
        raise RunError(f"{said}{self._first()}{cure}")

    def _first(self) -> str:
        """The last part of a sentence on videos that cannot be read."""
        for path, reason in self.broken.items():
            return f", the first being {path}: {reason}"
        return ""

    def _batches(self) -> Iterator[tuple[Batch, float]]:
        """This process's clips of each step that is left, and the seconds it waited for them."""

        def build() -> DataLoader:
            return build_loader(self.dataset, self.batches(), self.device)

        found, began = steady(build, self.device), time.monotonic()
        for batch in found:
            yield batch, time.monotonic() - began
            began = time.monotonic()

    def _step(self, batch: Batch, meter: Meter, waited: float) -> Any:
        """One step of the optimiser; without a readable video it counts, and changes nothing."""
        for video in batch.broken:
            self.broken[video.path] = video.reason
        loop = self.recipe.loop
        # Stochastic depth and dropout are a function of the step, whatever was drawn before: a
        # resumed run draws what the uninterrupted one would have.
        place = ("step", loop.seed, self.step, self.group.rank)
        torch.manual_seed(int(stream(*place).integers(2**32)))
        self.lr = self._learning_rate(self.step)
        set_learning_rate(self.optimizer, self.lr)
        (count,) = map(int, self.group.total(len(batch.labels)))
        taken = None
        if count:
            clips = batch.clips[:, 0] if len(batch.labels) else batch.clips
            num_passes = self.stepper.num_passes(self.batches().share_of(self.step))
            boxes = batch.boxes.to(self.device) if self.recipe.data.erase else None
            taken = self.stepper.step(
                clips.to(self.device), batch.labels.to(self.device), count, num_passes, boxes
            )
            self.skipped += taken.is_skipped
        meter.add(taken, count, waited)
        self.step += 1
        return taken

    @property
    def _is_test_due(self) -> bool:
        """Whether an epoch has ended whose test has not."""
        epoch, rest = divmod(self.step, self.steps_per_epoch)
        if not epoch or rest or self.tested == self.step:
            return False
        return epoch % self.recipe.loop.evaluate_every == 0 or self.step == self.num_steps

    def _learning_rate(self, step: int) -> float:
        """That of a step, before the factors of the parameter groups."""
        settings, epochs = self.recipe.optim, self.recipe.loop.epochs
        return settings.lr * learning_rate_factor(step, self.steps_per_epoch, epochs, settings)

    def _end_epoch(self, stop: Sequence[int]) -> bool:
        """Tests where it is due, keeps the best, saves; False if a signal ended the test early.

        Raises:
            RunError: there was nothing to train on, or there is nothing to test on.
        """
        self._rest()
        if all(name in self.broken for name in self.dataset.videos.names()):
            count = len(self.broken)
            raise RunError(f"none of the {count} training videos could be read{self._first()}")
        if self._is_test_due:
            result = self.evaluate(lambda: any(self.group.total(bool(stop))))
            if result is None:
                self.checkpoints.save_last(self._rest())
                return False
            self.tested, self.broken_test = self.step, dict(result.broken)
            if not len(result.labels):
                path, reason = result.broken[0]
                raise RunError(
                    f"none of the {len(self.test_videos)} test videos could be read, "
                    f"the first being {path}: {reason}"
                )
            self._report("test", result.numbers())
            if self.group.is_first:
                tqdm.write(f"epoch {self.step // self.steps_per_epoch}: {result}")
            rest = {**self._rest(), "best_top1": result.top1}
            if result.top1 > self.best_top1 and self.checkpoints.save_best(rest):
                self.best_top1 = result.top1
        self.checkpoints.save_last(self._rest())
        # Behind what must not be lost.
        self.report.name_broken({**self.broken, **self.broken_test})
        if self.tested == self.step:
            self.report.draw()
        return True

    def evaluate(self, stops: Callable[[], bool] | None = None) -> Evaluation | None:
        """The model on the test videos, of which each process has its share, in the `val_views`.

        None if `stops`, asked after each batch, says so.
        """
        data, loop = self.recipe.data, self.recipe.loop
        dataset = VideoDataset(self.test_videos, data, views=data.val_views)
        return evaluate(self.module, dataset, loop, self.device, self.group, stops)

    def _report(self, kind: str, numbers: dict[str, float]) -> None:
        self.report.add(kind, self.step, self.step / self.steps_per_epoch, self.lr, numbers)

    def _profiler(self) -> AbstractContextManager[Any]:
        """torch's profiler over some steps of the first process; otherwise nothing."""
        if not (self.profiled and self.group.is_first):
            return nullcontext()
        path = str(self.output / "trace.json")
        return torch.profiler.profile(
            schedule=torch.profiler.schedule(wait=1, warmup=1, active=self.profiled, repeat=1),
            on_trace_ready=lambda found: found.export_chrome_trace(path),
            profile_memory=True,
        )

    def _rest(self) -> dict[str, Any]:
        """What a checkpoint has beside model and optimiser; broken videos are all processes'."""
        for each in self.group.gather(self.broken):
            self.broken |= each
        return {
            "window_size": list(self.model.backbone.window_size),
            "recipe": to_dict(self.recipe),
            "classes": self.classes,
            "step": self.step,
            "best_top1": self.best_top1,
            "broken": self.broken,
            "videos": self.dataset.videos.digest,
            "test_videos": self.test_videos.digest,
            "scaler": self.stepper.scaler.state_dict(),
            "skipped": self.skipped,
            "tested": self.tested,
        }

    def _set_counters(self, rest: dict[str, Any]) -> None:
        self.step, self.best_top1 = rest["step"], rest["best_top1"]
        self.lr = self._learning_rate(max(self.step - 1, 0))
        self.broken, self.skipped, self.tested = rest["broken"], rest["skipped"], rest["tested"]
        if rest["scaler"]:
            self.stepper.scaler.load_state_dict(rest["scaler"])

    def _check(self, rest: dict[str, Any], path: Path) -> None:
        """RunError if a checkpoint is of another run."""
        changed = differences(recipe_of(rest, path), self.recipe, FREE_FIELDS)
        if changed:
            raise RunError(f"{path} was made with another recipe: {'; '.join(changed)}")
        if rest["classes"] != self.classes:
            raise RunError(f"{path} was made with other class names")
        data = self.recipe.data
        for key, videos, name in (
            ("videos", self.dataset.videos, data.train_list),
            ("test_videos", self.test_videos, data.test_list),
        ):
            if rest[key] != videos.digest:
                raise RunError(
                    f"{path} was made with another {name}; a changed list needs a run of its own "
                    "(--output)"
                )
