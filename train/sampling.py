"""Which frames of a video make up its clips: pure functions of (number of frames, generator).

Source: mmaction/datasets/pipelines/loading.py (`SampleFrames`) of mmaction2 0.15 as used by
Video Swin Transformer. Nothing here reads a video.
"""

from typing import Literal

import numpy as np

Rule = Literal["official", "mmaction2"]


def sample_interval(
    num_frames: int,
    *,
    clip_len: int,
    interval: int,
    num_clips: int = 1,
    generator: np.random.Generator | None = None,
    rule: Rule = "official",
) -> np.ndarray:
    """Return the frame indices of `num_clips` clips with `interval` frames between neighbours.

    Clip k is ``offset[k] + interval * [0, 1, .., clip_len - 1]``, taken modulo `num_frames`, so a
    short video starts again from its beginning. Test mode (`generator` is None) spreads the
    offsets evenly over the positions a clip fits in; train mode draws one offset per clip from its
    share of these positions.

    A clip is counted as ``clip_len * interval`` frames long although its last ``interval - 1``
    frames are never read: upstream's convention, kept because it moves every offset. mmaction2 1.x
    gave it up in test mode, and there the first clip begins with the video, the last ends with it.

    Args:
        num_frames: length of the video, in frames, at least 1.
        clip_len: frames per clip.
        interval: source frames from one clip frame to the next.
        num_clips: clips per video.
        generator: randomness of train mode; None selects test mode.
        rule: "official" or "mmaction2": whose offsets test mode has.

    Returns:
        int64 [num_clips, clip_len], frame indices in [0, num_frames).

    Raises:
        ValueError: if any of the four counts is below 1.

    Source: `SampleFrames` with out_of_bound_opt='loop', temporal_jitter and twice_sample off; of
    mmaction2 1.x the class of the same name.
    """
    _check_counts(
        "sample_interval",
        num_frames=num_frames,
        clip_len=clip_len,
        interval=interval,
        num_clips=num_clips,
    )
    positions = num_frames - clip_len * interval + 1
    if generator is None:
        if rule == "mmaction2":
            offsets = _spread_offsets(num_frames - (clip_len - 1) * interval - 1, num_clips)
        else:
            offsets = _test_offsets(positions, num_clips)
    else:
        offsets = _train_offsets(num_frames, positions, num_clips, generator)
    frames = offsets[:, None] + interval * np.arange(clip_len, dtype=np.int64)
    return frames % num_frames


def sample_uniform(
    num_frames: int,
    *,
    clip_len: int,
    generator: np.random.Generator | None = None,
) -> np.ndarray:
    """Return the frame indices of one clip that spans the whole video, one frame per segment.

    The range [0, num_frames - 1] is cut into `clip_len` equal segments whose bounds are rounded
    half to even; test mode (`generator` is None) takes the middle of each, rounded down, and train
    mode draws from it with both ends included, so neighbouring segments share a frame. A video
    shorter than the clip repeats frames.

    Args:
        num_frames: length of the video, in frames, at least 1.
        clip_len: frames per clip.
        generator: randomness of train mode; None selects test mode.

    Returns:
        int64 [1, clip_len], frame indices in [0, num_frames), never decreasing.

    Raises:
        ValueError: if one of the two counts is below 1.

    Source: `SampleFrames` with frame_uniform=True (the Something-Something v2 recipe).
    """
    _check_counts("sample_uniform", num_frames=num_frames, clip_len=clip_len)
    segment = (num_frames - 1) / clip_len
    bounds = np.round(segment * np.arange(clip_len + 1)).astype(np.int64)
    if generator is None:
        frames = (bounds[:-1] + bounds[1:]) // 2
    else:
        frames = generator.integers(bounds[:-1], bounds[1:], endpoint=True)
    return frames[None]


def _test_offsets(positions: int, num_clips: int) -> np.ndarray:
    """Return the middles of `num_clips` equal shares of the `positions` a clip fits in, int64."""
    if positions < 1:
        return np.zeros(num_clips, dtype=np.int64)
    share = positions / num_clips
    return (np.arange(num_clips) * share + share / 2).astype(np.int64)


def _spread_offsets(last: int, num_clips: int) -> np.ndarray:
    """Return `num_clips` offsets from 0 to `last`, half to even; one alone in the middle, int64."""
    last = max(last, 0)
    if num_clips == 1:
        return np.array([last // 2])
    return np.round(np.arange(num_clips) * last / (num_clips - 1)).astype(np.int64)


def _train_offsets(
    num_frames: int, positions: int, num_clips: int, generator: np.random.Generator
) -> np.ndarray:
    """Return one drawn offset per clip, int64 [num_clips]."""
    share = positions // num_clips
    if share > 0:
        return np.arange(num_clips) * share + generator.integers(share, size=num_clips)
    # From here on there are fewer positions than clips.
    clip_frames = num_frames - positions + 1
    if num_frames > max(num_clips, clip_frames):
        return np.sort(generator.integers(positions, size=num_clips))
    if share == 0:
        return np.round(np.arange(num_clips) * (positions / num_clips)).astype(np.int64)
    return np.zeros(num_clips, dtype=np.int64)


def _check_counts(function: str, **counts: int) -> None:
    """Raise ValueError for the first count below 1, naming `function` and the argument."""
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{function}: {name} must be at least 1, got {count}")
