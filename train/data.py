"""Videos to batches: annotation lists, the data set, and the order in which it is read.

Every random choice has a generator of its own, seeded by (seed, epoch, video): the clips of a run
do not depend on the number of workers, no two epochs or workers share a stream, and a resumed run
reads what the uninterrupted one would have.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from train.sampling import sample_interval, sample_uniform
from train.transforms import EvalTransform, TrainTransform
from train.video import Video, VideoError


@dataclass(frozen=True)
class DataSettings:
    """Which videos, and how a clip is made of one; sizes in pixels, times in frames.

    The defaults are upstream's for Kinetics.

    Attributes:
        root: folder that the paths of the lists are relative to.
        train_list, test_list, class_names: files in `root`: `path label` a line; a name a line.
        sampling: "interval" takes every `interval`-th frame from a place in the video, "uniform"
            one frame from each of `clip_len` equal segments.
        clip_len: frames per clip.
        interval: source frames from one frame of a clip to the next.
        short_side: height or width, whichever is less, after the first resize in training.
        crop: height and width of a clip.
        area, aspect: ranges of the random crop: share of the frame, width over height.
        flip: probability of a horizontal flip.
        test_clips: clips per video in testing.
        test_crops: 1 (centre) or 3 crops of each.
        test_short_side: short side in testing.
        workers: processes that decode.
    """

    root: str = "data/kinetics400"
    train_list: str = "train.txt"
    test_list: str = "test.txt"
    class_names: str = "classes.txt"
    sampling: Literal["interval", "uniform"] = "interval"
    clip_len: int = 32
    interval: int = 2
    short_side: int = 256
    crop: int = 224
    area: tuple[float, float] = (0.08, 1.0)
    aspect: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    test_clips: int = 4
    test_crops: Literal[1, 3] = 3
    test_short_side: int = 224
    workers: int = 4

    def __post_init__(self) -> None:
        for name in ("clip_len", "interval", "crop", "test_clips"):
            if getattr(self, name) < 1:
                raise ValueError(f"data.{name} must be at least 1, got {getattr(self, name)}")
        for name in ("short_side", "test_short_side"):
            if getattr(self, name) < self.crop:
                raise ValueError(
                    f"data.{name} must be at least data.crop {self.crop}, got {getattr(self, name)}"
                )
        if self.workers < 0:
            raise ValueError(f"data.workers must be 0 or more, got {self.workers}")
        if self.test_crops == 3 and self.test_short_side != self.crop:
            raise ValueError(
                f"data.test_short_side must be data.crop {self.crop} with three crops, "
                f"got {self.test_short_side}"
            )
        for name, top in (("area", 1.0), ("aspect", inf)):
            low, high = getattr(self, name)
            if not 0 < low <= high <= top:
                raise ValueError(f"data.{name} must rise from above 0, to {top}, got {low} {high}")
        if not 0 <= self.flip <= 1:
            raise ValueError(f"data.flip must be from 0 to 1, got {self.flip}")


class Broken(NamedTuple):
    """A video that could not be read, and why."""

    path: str
    reason: str


class Batch(NamedTuple):
    """What the readable videos of a batch gave, and which were not.

    `clips` is uint8 [B, views, 3, T, H, W] and `labels` int64 [B], both with B = 0 if none was.
    """

    clips: Tensor
    labels: Tensor
    broken: list[Broken]


def broken_summary(broken: list[Broken], limit: int = 20) -> str:
    """How many videos could not be read, and which: one line each, at most `limit`."""
    videos = dict(broken)
    lines = [f"  {path}: {reason}" for path, reason in sorted(videos.items())]
    if len(lines) > limit:
        lines[limit:] = [f"  and {len(lines) - limit} more"]
    return "\n".join([f"videos that could not be read: {len(videos)}", *lines])


class ListError(ValueError):
    """An annotation list that cannot be used: one sentence with file, line and reason."""


def read_list(path: Path, num_classes: int | None = None) -> list[tuple[str, int]]:
    """The (path, label) pairs of an annotation list; the label is the last word of a line.

    Raises:
        ListError: no such file, no lines, a line without an integer label, or one out of range.
    """
    if not path.is_file():
        raise ListError(f"{path}: no such annotation list")
    pairs = []
    for number, line in enumerate(_read_lines(path), start=1):
        words = line.rsplit(None, 1)
        if not words:
            continue
        name, label = words[0].strip(), words[-1]
        if len(words) == 1 or not label.isdecimal():
            raise ListError(f"{path}:{number}: expected `path label`, got {line!r}")
        if num_classes is not None and int(label) >= num_classes:
            raise ListError(f"{path}:{number}: label must be below {num_classes}, got {label}")
        pairs.append((name, int(label)))
    if not pairs:
        raise ListError(f"{path}: the annotation list has no lines")
    return pairs


def _read_lines(path: Path) -> list[str]:
    """The lines of a text file in UTF-8, with or without a byte order mark."""
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ListError(f"{path}: must be UTF-8 text, got byte {error.start} in another") from None


def read_class_names(path: Path) -> list[str]:
    """The class names of a data set, one a line; raises ListError if there are none."""
    lines = _read_lines(path) if path.is_file() else []
    names = [line.strip() for line in lines if line.strip()]
    if not names:
        raise ListError(f"{path}: no such list of class names, or an empty one")
    return names


def stream(kind: str, *numbers: int) -> np.random.Generator:
    """The generator of a named purpose and place in the run, independent of all others."""
    # Length first: NumPy pads short seeds with zeros, so [1, 2] and [1, 2, 0] would be one.
    return np.random.default_rng([len(numbers), *kind.encode(), *numbers])


# How the frames of a test clip may be put, to see what a model makes of their order.
FRAME_ORDERS: dict[str, Callable[[np.ndarray, np.random.Generator], np.ndarray]] = {
    "as filmed": lambda frames, _: frames,
    "one frame repeated": lambda frames, _: np.full_like(frames, frames[len(frames) // 2]),
    "random order": lambda frames, generator: generator.permutation(frames),
    "backwards": lambda frames, _: frames[::-1],
}


def read_test_clips(
    path: str | Path,
    settings: DataSettings,
    reorder: Callable[[np.ndarray], np.ndarray] = lambda frames: frames,
) -> Tensor:
    """The views of a video in testing, uint8 [views, 3, T, H, W]; raises VideoError.

    `reorder` puts the frame numbers of each clip in another order.
    """
    video = Video(path)
    if settings.sampling == "uniform":
        indices = sample_uniform(video.num_frames, clip_len=settings.clip_len)
    else:
        indices = sample_interval(
            video.num_frames,
            clip_len=settings.clip_len,
            interval=settings.interval,
            num_clips=settings.test_clips,
        )
    frames = video.read(np.concatenate([reorder(clip) for clip in indices]))
    transform = EvalTransform(settings.test_short_side, settings.crop, settings.test_crops)
    return transform(list(frames.split(settings.clip_len)))


def read_train_clip(path: Path, settings: DataSettings, generator: np.random.Generator) -> Tensor:
    """One random clip of a video, uint8 [1, 3, T, H, W]; raises VideoError."""
    video = Video(path)
    if settings.sampling == "uniform":
        indices = sample_uniform(video.num_frames, clip_len=settings.clip_len, generator=generator)
    else:
        indices = sample_interval(
            video.num_frames,
            clip_len=settings.clip_len,
            interval=settings.interval,
            generator=generator,
        )
    transform = TrainTransform(
        settings.short_side, settings.crop, settings.area, settings.aspect, settings.flip
    )
    return transform(video.read(indices[0]), generator)[None]


class VideoDataset(Dataset):
    """Videos of an annotation list; a key is (epoch, index of the video).

    With a `seed` it gives random clips for training, without one the views of testing.
    """

    def __init__(
        self,
        videos: Sequence[tuple[str, int]],
        settings: DataSettings,
        *,
        seed: int | None = None,
        frame_order: str = "as filmed",
    ) -> None:
        self.videos, self.settings, self.seed = videos, settings, seed
        self.frame_order = frame_order

    def __len__(self) -> int:
        return len(self.videos)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int] | Broken:
        epoch, index = key
        name, label = self.videos[index]
        path = Path(self.settings.root, name)
        try:
            if self.seed is not None:
                generator = stream("clip", self.seed, epoch, index)
                return read_train_clip(path, self.settings, generator), label
            generator, order = stream("order", index), FRAME_ORDERS[self.frame_order]
            clips = read_test_clips(path, self.settings, lambda frames: order(frames, generator))
            return clips, label
        except VideoError as error:
            return Broken(name, error.reason)


class EpochBatches(Sampler):
    """The keys of each step's batch, from `first_step` to the last step of the last epoch.

    Each epoch is a permutation of its own of all videos; its last batch may be smaller. Of a batch,
    the process `rank` of `world` has every `world`-th key: all of them together have each key once,
    and some have one key fewer than others, or none.
    """

    def __init__(
        self,
        num_videos: int,
        batch_size: int,
        seed: int,
        epochs: int,
        first_step: int = 0,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.num_videos, self.batch_size, self.seed = num_videos, batch_size, seed
        self.steps_per_epoch = -(-num_videos // batch_size)
        self.num_steps = self.steps_per_epoch * epochs
        self.first_step, self.rank, self.world = first_step, rank, world

    def __len__(self) -> int:
        return max(self.num_steps - self.first_step, 0)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order, order_epoch = None, None
        for step in range(self.first_step, self.num_steps):
            epoch, batch = divmod(step, self.steps_per_epoch)
            if epoch != order_epoch:
                order = stream("epoch", self.seed, epoch).permutation(self.num_videos)
                order_epoch = epoch
            chosen = order[batch * self.batch_size : (batch + 1) * self.batch_size]
            yield [(epoch, int(index)) for index in chosen[self.rank :: self.world]]

    def share_of(self, step: int) -> int:
        """How many keys of a step's batch a process has at most."""
        first = step % self.steps_per_epoch * self.batch_size
        return -(-min(self.batch_size, self.num_videos - first) // self.world)


def collate(samples: list[tuple[Tensor, int] | Broken]) -> Batch:
    """One `Batch` of what a list of keys gave."""
    broken = [sample for sample in samples if isinstance(sample, Broken)]
    read = [sample for sample in samples if not isinstance(sample, Broken)]
    clips = [clips for clips, _ in read]
    return Batch(
        torch.stack(clips) if clips else torch.empty(0, dtype=torch.uint8),
        torch.tensor([label for _, label in read], dtype=torch.int64),
        broken,
    )


def build_loader(
    dataset: VideoDataset, batches: Sampler | list[list[tuple[int, int]]], device: torch.device
) -> DataLoader:
    """A loader of `batches` of keys, decoding in the workers of the data set's settings."""
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=dataset.settings.workers,
        collate_fn=collate,
        worker_init_fn=_leave_signals_to_the_parent,
        pin_memory=device.type == "cuda",
    )


def _leave_signals_to_the_parent(_worker: int) -> None:
    """Ctrl-C and a scheduler's SIGTERM reach workers too; they must serve the step under way.

    A second signal to the parent kills them (`train.signals.stop_on_signals`).
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def ordered_batches(num_videos: int, batch_size: int) -> list[list[tuple[int, int]]]:
    """The keys of a pass over all videos in order, each once."""
    keys = [(0, index) for index in range(num_videos)]
    return [keys[start : start + batch_size] for start in range(0, num_videos, batch_size)]
