"""The frames of any video as they are to be seen: upright, small, at rising times."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from heapq import heappop, heappush
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import av
import av.filter
import numpy as np

from train.readers.pyav import Opened
from train.video import VideoError

# Seconds that a picture may stand still; a broken clock would fill the disk with copies of one.
_LONGEST_PAUSE = 600
# Frames that a time may be away from its own: the most that H.264 can reorder.
_REORDERED = 16
# Of the length that a file says it has, the least that its frames must come to.
_LEAST_LENGTH = 0.9


@dataclass(frozen=True)
class Origin:
    """What the result keeps of the source.

    Attributes:
        time_base: unit of the times, seconds.
        rate: frames/s, on average.
        pixel_aspect: width of a pixel over its height, upright, None if unknown.
        primaries, transfer: FFmpeg's numbers for the meaning of colours.
    """

    time_base: Fraction
    rate: Fraction
    pixel_aspect: Fraction | None
    primaries: int
    transfer: int


def read_upright(
    source: Path, short_side: int, fps: float | None, pixels: str
) -> Iterator[tuple[av.VideoFrame, Origin]]:
    """The frames of a video: small, upright, in `pixels`, at rising times from 0.

    Args:
        source: a file.
        short_side: height or width, whichever is less, at most.
        fps: frames/s, or all frames.
        pixels: FFmpeg's name of a format, "yuv420p" or "rgb24".

    Raises:
        VideoError: it cannot be decoded, or is damaged.
    """
    opened = Opened(str(source), None, 1)
    try:
        stream = opened.stream
        time_base = stream.time_base
        rate = stream.average_rate or stream.guessed_rate or Fraction(25)
        step = max(1, round(1 / (rate * time_base)))
        # Small frames wait for their times, not those of the source.
        frames = _with_times(_scale(_whole(opened, step), time_base, short_side, pixels), step)
        if fps is not None:
            fps = Fraction(fps).limit_denominator(1001)
            frames = _resample(frames, time_base, fps, str(source))
            time_base, rate = 1 / fps, fps
        for (frame, is_sideways), pts in frames:
            aspect = stream.sample_aspect_ratio or None
            if aspect and is_sideways:
                aspect = 1 / aspect
            context = stream.codec_context
            frame.pts, frame.time_base = pts, time_base
            yield frame, Origin(time_base, rate, aspect, context.color_primaries, context.color_trc)
    except av.FFmpegError as error:
        raise VideoError(str(source), f"it cannot be decoded: {error.strerror}") from None
    finally:
        opened.close()


def _whole(opened: Opened, step: int) -> Iterator[av.VideoFrame]:
    """The frames of a video as they are stored, if none is damaged and none is left out."""
    number, end = -1, 0
    for number, frame in enumerate(opened.frames()):
        if frame.is_corrupt:
            raise VideoError(opened.path, f"frame {number} is damaged")
        end = max(end, (number + 1) * step, (frame.pts or 0) + step)
        yield frame
    if number < 0:
        raise VideoError(opened.path, "no frame of it can be decoded")
    # Behind a damaged place FFmpeg goes on where it can, without a word. If that is before the end,
    # all that is left of the damage is a pause, and some videos have pauses.
    end, declared = float(end * opened.stream.time_base), float(_declared_length(opened))
    if end < _LEAST_LENGTH * declared:
        reason = f"it is damaged, its frames end at {end:.1f} of {declared:.1f} s"
        raise VideoError(opened.path, reason)


def _declared_length(opened: Opened) -> Fraction:
    """When the video ends as avi and Matroska files say, in seconds; 0 where nothing says it.

    Others guess it, or count frames that are not shown; what is damaged in an mp4 file is refused
    by the decoder.
    """
    stream = opened.stream
    if opened.container.format.name == "avi":
        return (stream.duration or 0) * stream.time_base
    try:
        hours, minutes, seconds = stream.metadata.get("DURATION", "").split(":")
        return (int(hours) * 60 + int(minutes)) * 60 + Fraction(seconds)
    except ValueError:
        return Fraction(0)


def _scale(
    frames: Iterable[av.VideoFrame], time_base: Fraction, short_side: int, pixels: str
) -> Iterator[tuple[tuple[av.VideoFrame, bool], int | None]]:
    """Each frame small and upright, whether it was turned by a quarter, and its own time."""
    graph = kind = size = None
    for frame in frames:
        turns = upright_filters(frame)
        is_sideways = "transpose" in dict(turns)
        new_kind = (
            *(frame.width, frame.height, frame.format.name),
            *(frame.colorspace, frame.color_range, turns),
        )
        if new_kind != kind:
            # In a recorded broadcast later frames may differ: all are made as the first.
            if size is None:
                size = even_size(frame.width, frame.height, short_side)
                size = size[::-1] if is_sideways else size
            stored = size[::-1] if is_sideways else size
            graph, kind = _build_graph(frame, time_base, stored, turns, pixels), new_kind
        pts = frame.pts
        graph.push(frame)
        yield (graph.pull(), is_sideways), pts


def _with_times(frames: Iterable[tuple[Any, int | None]], step: int) -> Iterator[tuple[Any, int]]:
    """Frames with rising times from 0, made of their own; `step` after the last where one has none.

    They come in the order in which they are shown, but not so their times: those of an avi file
    with B-frames are in the order in which it has them. Some recorders repeat a time.
    """
    waiting, times = deque(), []
    first = last = own = None
    for frame, pts in chain(frames, repeat((None, None), _REORDERED)):
        if frame is not None:
            own = pts if pts is not None else 0 if own is None else own + step
            waiting.append(frame)
            heappush(times, own)
        if waiting and (frame is None or len(waiting) > _REORDERED):
            time = heappop(times)
            first = time if first is None else first
            last = 0 if last is None else max(time - first, last + 1)
            yield waiting.popleft(), last


def _resample(
    frames: Iterable[tuple[Any, int]], time_base: Fraction, fps: Fraction, path: str
) -> Iterator[tuple[Any, int]]:
    """Frames at a constant rate: frame k is the last whose time is, rounded, at most k / fps."""
    held, place = None, 0
    for frame, pts in frames:
        # From time_base to frames of the new rate; halves up.
        slot = math.floor(pts * time_base * fps + Fraction(1, 2))
        if slot - place > _LONGEST_PAUSE * fps:
            seconds = float((slot - place) / fps)
            raise VideoError(path, f"between two frames are {seconds:.0f} s")
        while held is not None and place < slot:
            yield held, place
            place += 1
        held = frame
    if held is not None:
        yield held, place


def even_size(width: int, height: int, short_side: int) -> tuple[int, int]:
    """Width and height with at most this short side, the same shape, both even."""
    factor = short_side / min(width, height)
    if factor >= 1:
        # A last column or row is dropped, and the others stay as sharp as they are.
        return max(2, width // 2 * 2), max(2, height // 2 * 2)
    return 2 * math.floor(width * factor / 2 + 0.5), 2 * math.floor(height * factor / 2 + 0.5)


def upright_filters(frame: av.VideoFrame) -> list[tuple[str, str]]:
    """The filters that show a frame as its display matrix says, to the nearest quarter turn."""
    matrices = [bytes(each) for each in frame.side_data if each.type.name == "DISPLAYMATRIX"]
    if not matrices:
        return []
    # Fixed-point numbers; a pixel at (x, y), y down, is shown at (a x + c y, b x + d y).
    a, b, _, c, d = np.frombuffer(matrices[0], dtype=np.int32, count=5)
    turns = []
    if abs(int(a)) < abs(int(b)):
        turns.append(("transpose", "cclock_flip"))
        a, d = c, b
    turns += [("hflip", "")] * bool(a < 0) + [("vflip", "")] * bool(d < 0)
    return turns


def _build_graph(
    frame: av.VideoFrame,
    time_base: Fraction,
    size: tuple[int, int],
    turns: list[tuple[str, str]],
    pixels: str,
) -> av.filter.Graph:
    """What frames like this one are pushed into and pulled from; `size` is that before turning."""
    graph = av.filter.Graph()
    source = graph.add_buffer(
        width=frame.width, height=frame.height, format=frame.format, time_base=time_base
    )
    filters = [*turns, ("format", pixels), ("buffersink", "")]
    # What players and readers take for granted in yuv420p; `reencode` says it in the file, too.
    meaning = ":out_color_matrix=bt601:out_range=tv" if pixels == "yuv420p" else ""
    # Without the two other flags, BT.709 becomes BT.601 three to five levels darker.
    flags = "flags=bicubic+accurate_rnd+full_chroma_int"
    filters.insert(0, ("scale", f"{size[0]}:{size[1]}:{flags}{meaning}"))
    if frame.width - size[0] in (0, 1) and frame.height - size[1] in (0, 1):
        filters.insert(0, ("crop", f"{size[0]}:{size[1]}:0:0"))
    nodes = [graph.add(name, options or None) for name, options in filters]
    graph.link_nodes(source, *nodes).configure()
    return graph
