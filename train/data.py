"""Videos to batches: what a clip is made of, the data set, and the processes that read it."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from train.augment import RandAugment, erasing_box
from train.batches import stream
from train.lists import Layout, Listed, Videos, find_class_names, read_class_names, read_videos
from train.members import check_shards, member
from train.readers.frames import FrameFolder, has_number
from train.sampling import Rule, sample_interval, sample_uniform
from train.transforms import EvalTransform, TrainTransform, resize_short_side
from train.video import ReaderError, Video, VideoError, open_video, why_not


@dataclass(frozen=True)
class DataSettings:
    """Which videos, and how a clip is made of one; sizes in pixels, times in frames.

    The defaults are upstream's for Kinetics.

    Attributes:
        root: folder that the paths of the lists are relative to.
        train_list, test_list: files in `root`, or, of videos, folders with one for each class.
        class_names: a file in `root`, a name a line; where there is none, the folders are asked.
        layout: what is listed: files of videos, folders of frames, or videos in tar shards.
        reader: what decodes: decord, pyav or torchcodec.
        frame_name: names of the images in a folder of frames, numbered from 1.
        sampling: "interval" takes every `interval`-th frame from a place in the video, "uniform"
            one frame from each of `clip_len` equal segments.
        offsets: whose rule says where the clips of a test begin, of "interval".
        clip_len: frames per clip.
        interval: source frames from one frame of a clip to the next.
        short_side: height or width, whichever is less, after the first resize in training.
        crop: height and width of a clip.
        area, aspect: ranges of the random crop: share of the frame, width over height.
        flip: probability of a horizontal flip.
        augment: "randaugment" does to a clip four of 18 things, as upstream's recipe for
            Something-Something does.
        augment_flip: probability of a horizontal flip by "randaugment". The official behaviour is
            0.5, whatever `flip` is, and left and right are not swapped in the labels.
        erase: probability that a box of a clip is set to the mean colour.
        test_clips, test_crops, test_short_side: views of a video in testing: clips, 1 (centre) or 3
            crops of each, short side.
        val_clips, val_crops, val_short_side: the same in the tests during training.
        workers: processes that decode.
        patience: seconds that they may take for a batch; a video that holds one up for longer is
            broken. 0 is for ever, as without workers.
    """

    root: str = "data/kinetics400"
    train_list: str = "train.txt"
    test_list: str = "test.txt"
    class_names: str = "classes.txt"
    layout: Layout = "files"
    reader: Literal["decord", "pyav", "torchcodec"] = "decord"
    frame_name: str = "img_{:05}.jpg"
    sampling: Literal["interval", "uniform"] = "interval"
    offsets: Rule = "official"
    clip_len: int = 32
    interval: int = 2
    short_side: int = 256
    crop: int = 224
    area: tuple[float, float] = (0.08, 1.0)
    aspect: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    augment: Literal["none", "randaugment"] = "none"
    augment_flip: float = 0.5
    erase: float = 0.0
    test_clips: int = 4
    test_crops: Literal[1, 3] = 3
    test_short_side: int = 224
    val_clips: int = 1
    val_crops: Literal[1, 3] = 1
    val_short_side: int = 256
    workers: int = 4
    patience: int = 600

    def __post_init__(self) -> None:
        for name in ("clip_len", "interval", "crop", "test_clips", "val_clips"):
            if getattr(self, name) < 1:
                raise ValueError(f"data.{name} must be at least 1, got {getattr(self, name)}")
        for name in ("short_side", "test_short_side", "val_short_side"):
            if getattr(self, name) < self.crop:
                raise ValueError(
                    f"data.{name} must be at least data.crop {self.crop}, got {getattr(self, name)}"
                )
        for name in ("workers", "patience"):
            if getattr(self, name) < 0:
                raise ValueError(f"data.{name} must be 0 or more, got {getattr(self, name)}")
        for kind in ("test", "val"):
            side = getattr(self, f"{kind}_short_side")
            if getattr(self, f"{kind}_crops") == 3 and side != self.crop:
                raise ValueError(
                    f"data.{kind}_short_side must be data.crop {self.crop} with three crops, "
                    f"got {side}"
                )
        for name, top in (("area", 1.0), ("aspect", inf)):
            low, high = getattr(self, name)
            if not 0 < low <= high <= top:
                raise ValueError(f"data.{name} must rise from above 0, to {top}, got {low} {high}")
        if not has_number(self.frame_name):
            raise ValueError(
                f"data.frame_name must have one place for a number, got {self.frame_name!r}"
            )
        for name in ("flip", "augment_flip", "erase"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"data.{name} must be from 0 to 1, got {getattr(self, name)}")

    @property
    def test_views(self) -> Views:
        return Views(self.test_clips, self.test_crops, self.test_short_side)

    @property
    def val_views(self) -> Views:
        return Views(self.val_clips, self.val_crops, self.val_short_side)

    def read(self, name: str, classes: Sequence[str]) -> Videos:
        """The videos of a list, `train_list` or `test_list`.

        Raises:
            ListError: it cannot be used.
            ReaderError: this machine does not have the reader.
        """
        if self.layout != "frames" and (reason := why_not(self.reader)):
            raise ReaderError(reason)
        videos = read_videos(self.root, name, classes, self.layout)
        if self.layout == "shards":
            check_shards(self.root, videos, name)
        return videos

    def read_class_names(self) -> list[str]:
        """The class names; raises ListError."""
        return find_class_names(self.root, self.class_names, self.train_list)

    def known_class_names(self) -> list[str] | None:
        """The class names if a file or a folder for each class tells them; raises ListError."""
        path = Path(self.root, self.class_names)
        if path.is_file():
            return read_class_names(path)
        for name in (self.train_list, self.test_list):
            if Path(self.root, name).is_dir():
                return find_class_names(self.root, self.class_names, name)
        return None


class Views(NamedTuple):
    """What is looked at of a video: clips, crops of each (1 or 3), and their short side, pixels."""

    clips: int
    crops: int
    short_side: int


class Broken(NamedTuple):
    """A video that could not be read, and why."""

    path: str
    reason: str


class Sample(NamedTuple):
    """What a video gave: uint8 [views, 3, T, H, W], its label and name, and the box erased.

    The box is (top, left, height, width) in pixels, four zeros for none.
    """

    clips: Tensor
    label: int
    name: str
    box: tuple[int, int, int, int] = (0, 0, 0, 0)


class Batch(NamedTuple):
    """What the readable videos of a batch gave, and which were not.

    `clips` is uint8 [B, views, 3, T, H, W], `labels` int64 [B], `boxes` int64 [B, 4], and there are
    B names, all with B = 0 if none was.
    """

    clips: Tensor
    labels: Tensor
    boxes: Tensor
    names: list[str]
    broken: list[Broken]


def broken_summary(broken: list[Broken], limit: int = 20) -> str:
    """How many videos could not be read, and which: one line each, at most `limit`."""
    videos = dict(broken)
    lines = [f"  {path}: {reason}" for path, reason in sorted(videos.items())]
    if len(lines) > limit:
        lines[limit:] = [f"  and {len(lines) - limit} more"]
    return "\n".join([f"videos that could not be read: {len(videos)}", *lines])


# How the frames of a test clip may be put, to see what a model makes of their order.
FRAME_ORDERS: dict[str, Callable[[np.ndarray, np.random.Generator], np.ndarray]] = {
    "as filmed": lambda frames, _: frames,
    "one frame repeated": lambda frames, _: np.full_like(frames, frames[len(frames) // 2]),
    "random order": lambda frames, generator: generator.permutation(frames),
    "backwards": lambda frames, _: frames[::-1],
}


# 0.8 GB of 3840 x 2160 pixels.
_FRAMES_AT_ONCE = 32


def open_listed(listed: Listed, settings: DataSettings) -> Video:
    """A video of a list, opened; raises VideoError."""
    path = Path(settings.root, listed.name)
    if settings.layout == "frames":
        return FrameFolder(path, listed.frames, settings.frame_name)
    if settings.layout == "shards":
        return open_video(member(settings.root, listed), settings.reader)
    return open_video(path, settings.reader)


def sample_test_clips(num_frames: int, settings: DataSettings, num_clips: int) -> np.ndarray:
    """The frames of each clip of a video in testing, int64 [clips, T]."""
    if settings.sampling == "uniform":
        return sample_uniform(num_frames, clip_len=settings.clip_len)
    return sample_interval(
        num_frames,
        clip_len=settings.clip_len,
        interval=settings.interval,
        num_clips=num_clips,
        rule=settings.offsets,
    )


def read_test_clips(
    video: Video,
    settings: DataSettings,
    views: Views | None = None,
    reorder: Callable[[np.ndarray], np.ndarray] = lambda frames: frames,
) -> Tensor:
    """The views of a video in testing, uint8 [views, 3, T, H, W]; raises VideoError.

    `views` are those of a test unless given; `reorder` puts the frame numbers of each clip in
    another order.
    """
    views = views or settings.test_views
    clips = [reorder(c) for c in sample_test_clips(video.num_frames, settings, views.clips)]
    wanted = np.unique(clips)
    # Large frames are made small before there are more of them.
    parts = np.split(wanted, range(_FRAMES_AT_ONCE, len(wanted), _FRAMES_AT_ONCE))
    frames = torch.cat([resize_short_side(video.read(part), views.short_side) for part in parts])
    places = [torch.from_numpy(np.searchsorted(wanted, clip)) for clip in clips]
    transform = EvalTransform(views.short_side, settings.crop, views.crops)
    return transform([frames[place] for place in places])


def read_train_clip(
    video: Video, settings: DataSettings, generator: np.random.Generator
) -> tuple[Tensor, tuple[int, int, int, int]]:
    """One random clip of a video, uint8 [1, 3, T, H, W], and its erased box; raises VideoError."""
    if settings.sampling == "uniform":
        indices = sample_uniform(video.num_frames, clip_len=settings.clip_len, generator=generator)
    else:
        indices = sample_interval(
            video.num_frames,
            clip_len=settings.clip_len,
            interval=settings.interval,
            generator=generator,
        )
    augment = None
    if settings.augment == "randaugment":
        augment = RandAugment(flip=settings.augment_flip)
    transform = TrainTransform(
        settings.short_side, settings.crop, settings.area, settings.aspect, settings.flip, augment
    )
    clip = transform(video.read(indices[0]), generator)[None]
    box = None
    if settings.erase:
        box = erasing_box(settings.crop, settings.crop, generator, probability=settings.erase)
    return clip, box or (0, 0, 0, 0)


class VideoDataset(Dataset):
    """Videos of a list; a key is (epoch, index of the video).

    With a `seed` it gives random clips for training, without one the `views` of testing.
    """

    def __init__(
        self,
        videos: Sequence[Listed],
        settings: DataSettings,
        *,
        seed: int | None = None,
        views: Views | None = None,
        frame_order: str = "as filmed",
    ) -> None:
        self.videos, self.settings, self.seed = videos, settings, seed
        self.views = views or settings.test_views
        self.frame_order = frame_order
        # Of each worker the video it reads, -1 for none, and since when; all processes see it.
        self._reading = torch.full((settings.workers, 2), -1.0, dtype=torch.float64).share_memory_()
        self._stuck: set[int] = set()

    def give_up(self, seconds: float) -> None:
        """Counts as broken from now on what workers have been reading for longer than this."""
        now = time.monotonic()
        for index, since in self._reading.tolist():
            if index >= 0 and now - since > seconds:
                self._stuck.add(int(index))
        self._reading.fill_(-1)

    def __len__(self) -> int:
        return len(self.videos)

    @property
    def num_clips(self) -> int:
        """Clips of a video in testing; sampled uniformly there is one."""
        return 1 if self.settings.sampling == "uniform" else self.views.clips

    def __getitem__(self, key: tuple[int, int]) -> Sample | Broken:
        epoch, index = key
        listed, worker = self.videos[index], get_worker_info()
        if index in self._stuck:
            return Broken(listed.name, "it took longer to read than data.patience")
        if worker:
            self._reading[worker.id] = torch.tensor([index, time.monotonic()])
        try:
            video = open_listed(listed, self.settings)
            if self.seed is not None:
                generator = stream("clip", self.seed, epoch, index)
                clips, box = read_train_clip(video, self.settings, generator)
                return Sample(clips, listed.label, listed.name, box)
            generator, order = stream("order", index), FRAME_ORDERS[self.frame_order]
            clips = read_test_clips(
                video, self.settings, self.views, lambda frames: order(frames, generator)
            )
            return Sample(clips, listed.label, listed.name)
        except VideoError as error:
            return Broken(listed.name, error.reason)
        finally:
            if worker:
                self._reading[worker.id, 0] = -1


def collate(samples: list[Sample | Broken]) -> Batch:
    """One `Batch` of what a list of keys gave."""
    broken = [sample for sample in samples if isinstance(sample, Broken)]
    read = [sample for sample in samples if not isinstance(sample, Broken)]
    return Batch(
        torch.stack([each.clips for each in read]) if read else torch.empty(0, dtype=torch.uint8),
        torch.tensor([each.label for each in read], dtype=torch.int64),
        torch.tensor([each.box for each in read], dtype=torch.int64).reshape(-1, 4),
        [each.name for each in read],
        broken,
    )


# How often it is asked whether workers live, and whether one is stuck (`train.prefetch.steady`).
_SECONDS_BETWEEN_LOOKS = 5.0


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
        timeout=_SECONDS_BETWEEN_LOOKS if dataset.settings.workers else 0,
    )


def _leave_signals_to_the_parent(_worker: int) -> None:
    """Ctrl-C and a scheduler's SIGTERM reach workers too; they must serve the step under way.

    A second signal to the parent kills them (`train.signals.stop_on_signals`).
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
