"""Clips that slide through a video, what a backbone makes of them, and its way into files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from model import VideoSwin
from train.data import Broken
from train.feature_files import FeatureFile, FeatureSettings, target
from train.given import Given
from train.precision import casting
from train.transforms import EvalTransform, normalize, resize_short_side
from train.video import Video, VideoError, open_video


class Part(NamedTuple):
    """What some clips of a video, in order, came to.

    Attributes:
        video: which.
        features: on the device of the model, as `extract` returns them.
        starts: int64 [clips], the first frames of all clips of the video.
        opened: the video, for its length and frame rate.
        is_last: whether no clips follow.
    """

    video: Given
    features: Tensor
    starts: np.ndarray
    opened: Video
    is_last: bool


def clip_starts(num_frames: int, *, clip_len: int, interval: int, stride: int) -> np.ndarray:
    """The first frame of each clip of a sliding window, int64 [clips], rising.

    A clip counts as `clip_len * interval` frames long, as the official sampler counts it. One
    begins at every `stride`-th frame as long as it ends within the video, and one more ends with
    the video where those do not: no frame is outside of all clips, unless the stride is longer than
    a clip. A video shorter than a clip has one, which begins again where the video ends.

    Raises:
        ValueError: a count below 1.
    """
    counts = {"num_frames": num_frames, "clip_len": clip_len, "interval": interval}
    for name, value in {**counts, "stride": stride}.items():
        if value < 1:
            raise ValueError(f"clip_starts: {name} must be at least 1, got {value}")
    last = max(num_frames - clip_len * interval, 0)
    starts = np.arange(0, last + 1, stride, dtype=np.int64)
    return starts if starts[-1] == last else np.append(starts, last)


def read_clips(video: Video, starts: np.ndarray, settings: FeatureSettings) -> Iterator[Tensor]:
    """The clip at each start, uint8 [crops, 3, T, H, W]; each frame is read and resized once.

    No more frames are in memory than those of a clip, and those that later clips share with it.

    Raises:
        VideoError: a frame cannot be decoded.
    """
    kept: dict[int, Tensor] = {}
    for place, start in enumerate(starts):
        steps = settings.interval * np.arange(settings.clip_len)
        wanted = ((start + steps) % video.num_frames).tolist()
        if missing := sorted(set(wanted) - kept.keys()):
            views = _views(video.read(missing), settings)
            kept.update({number: views[:, :, n] for n, number in enumerate(missing)})
        yield torch.stack([kept[number] for number in wanted], dim=2)
        following = starts[place + 1] if place + 1 < len(starts) else video.num_frames
        kept = {number: frame for number, frame in kept.items() if number >= following}


def _views(frames: Tensor, settings: FeatureSettings) -> Tensor:
    """The crops of frames, uint8 [T, 3, H, W], as [crops, 3, T, h, w]."""
    if not settings.crop:
        return resize_short_side(frames, settings.short_side).transpose(0, 1)[None]
    return EvalTransform(settings.short_side, settings.crop, settings.crops)([frames])


@torch.inference_mode()
def extract(model: VideoSwin, clips: Tensor, settings: FeatureSettings) -> Tensor:
    """The features of clips, uint8 [B, crops, 3, T, H, W], on the device of the clips.

    Returns:
        pooled: [B, C], the mean over depth, height and width of the backbone's output, which is
            what the classifier's dropout and Linear are given, and then over the crops.
        dense: [B, C, D, H, W], the backbone's output, of one crop.

    Source: upstream's `feature_extraction` of the test configuration, which has the mean over the
    clips of a video, too.
    """
    with casting(clips.device, settings.precision):
        dense = model.backbone(normalize(clips.flatten(0, 1)))
    if settings.kind == "pooled":
        wide = torch.promote_types(dense.dtype, torch.float32)
        found = dense.mean(dim=(2, 3, 4), dtype=wide).unflatten(0, clips.shape[:2]).mean(dim=1)
    else:
        found = dense
    return found.to(getattr(torch, settings.dtype)).contiguous()


def parts(
    model: VideoSwin,
    videos: Iterable[Given],
    settings: FeatureSettings,
    batch_size: int,
    device: torch.device,
) -> Iterator[Part | Broken]:
    """The features of videos, `batch_size` clips at a time, and which could not be read."""
    window = {name: getattr(settings, name) for name in ("clip_len", "interval", "stride")}
    for video in videos:
        try:
            opened = open_video(video.path, settings.reader)
            starts, batch = clip_starts(opened.num_frames, **window), []
            for number, clip in enumerate(read_clips(opened, starts, settings), start=1):
                batch.append(clip)
                is_last = number == len(starts)
                if len(batch) == batch_size or is_last:
                    found = extract(model, torch.stack(batch).to(device), settings)
                    batch = []
                    yield Part(video, found, starts, opened, is_last)
        except VideoError as error:
            yield Broken(video.name, error.reason)


def stored(
    found: Iterable[Part | Broken], folder: Path, settings: FeatureSettings
) -> Iterator[Part | Broken]:
    """Each part once it is in a file, and which videos get none; raises OSError.

    A video has its file, whole, once its last part was given. One with a feature that is not finite
    is broken with that part, and the rest of it is passed over.
    """
    file, given_up = None, ""
    try:
        for part in found:
            name = part.path if isinstance(part, Broken) else part.video.name
            if name == given_up:
                continue
            if isinstance(part, Part):
                rows = part.features.cpu()
                if rows.isfinite().all():
                    file = file or _begun(part, folder, settings)
                    file.add(rows.numpy())
                    if part.is_last:
                        file.finish()
                        file = None
                    yield part
                    continue
                given_up, part = name, Broken(name, _not_finite(settings))
            if file is not None:
                file.discard()
                file = None
            yield part
    finally:
        if file is not None:
            file.discard()


def _begun(part: Part, folder: Path, settings: FeatureSettings) -> FeatureFile:
    """The file of a video, for what is like its first part."""
    return FeatureFile(
        target(folder, part.video, settings),
        part.video,
        part.starts,
        row=tuple(part.features.shape[1:]),
        dtype=settings.dtype,
        num_frames=part.opened.num_frames,
        fps=part.opened.fps,
    )


def _not_finite(settings: FeatureSettings) -> str:
    """Why features may be so."""
    half = ", or too large for --half" if settings.dtype == "float16" else ""
    return f"its features are NaN or infinite at --precision {settings.precision}{half}"
