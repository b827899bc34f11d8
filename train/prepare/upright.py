"""The frames of any video as they are to be seen: upright, small, at rising times."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from heapq import heappop, heappush
from itertools import chain, repeat
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import av

# Seconds that a picture may stand still; a broken clock would fill the disk with copies of one.
_LONGEST_PAUSE = 600
# Frames that a time may be away from its own: the most that H.264 can reorder.
_REORDERED = 16


class BrokenError(Exception):
    """A video that cannot be decoded; its text is the reason."""


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
        BrokenError: it cannot be decoded.
    """
    import av

    frames = _decode(source)
    if fps is not None:
        frames = _resample(frames, Fraction(fps).limit_denominator(1001))
    graph = kind = size = None
    for frame, pts, origin in frames:
        turns = upright_filters(frame)
        is_sideways = "transpose" in dict(turns)
        if is_sideways and origin.pixel_aspect:
            origin = replace(origin, pixel_aspect=1 / origin.pixel_aspect)
        new_kind = (frame.width, frame.height, frame.format.name, turns)
        try:
            if new_kind != kind:
                # In a recorded broadcast later frames may differ: all are made as the first.
                if size is None:
                    size = even_size(frame.width, frame.height, short_side)
                    size = size[::-1] if is_sideways else size
                stored = size[::-1] if is_sideways else size
                graph = _build_graph(frame, origin.time_base, stored, turns, pixels)
                kind = new_kind
            frame.pts, frame.time_base = pts, origin.time_base
            graph.push(frame)
            result = graph.pull()
        except av.FFmpegError as error:
            raise BrokenError(f"it cannot be scaled: {error.strerror}") from None
        yield result, origin


def _decode(source: Path) -> Iterator[tuple[av.VideoFrame, int, Origin]]:
    """The frames of a video as they are stored, their times from 0, and what they were part of."""
    import av

    try:
        with av.open(str(source), metadata_errors="replace") as container:
            # Not the first: that may be the picture of a cover.
            stream = container.streams.best("video")
            if stream is None:
                raise BrokenError("there is no video stream in the file")
            # The workers fill the cores.
            stream.codec_context.thread_count = 1
            rate = stream.average_rate or stream.guessed_rate or Fraction(25)
            step = max(1, round(1 / (rate * stream.time_base)))
            pts = None
            for frame, pts in _with_times(container.decode(stream), step):
                origin = Origin(
                    stream.time_base,
                    rate,
                    stream.sample_aspect_ratio or None,
                    stream.codec_context.color_primaries,
                    stream.codec_context.color_trc,
                )
                yield frame, pts, origin
            if pts is None:
                raise BrokenError("no frame of it can be decoded")
    except av.FFmpegError as error:
        raise BrokenError(f"it cannot be decoded: {error.strerror}") from None


def _with_times(frames: Iterator[av.VideoFrame], step: int) -> Iterator[tuple[av.VideoFrame, int]]:
    """Frames with rising times from 0, made of their own; `step` after the last where one has none.

    They come in the order in which they are shown, but not so their times: those of an avi file
    with B-frames are in the order in which it has them. Some recorders repeat a time.
    """
    waiting, times = deque(), []
    first = last = own = None
    for frame in chain(frames, repeat(None, _REORDERED)):
        if frame is not None:
            own = frame.pts if frame.pts is not None else 0 if own is None else own + step
            waiting.append(frame)
            heappush(times, own)
        if waiting and (frame is None or len(waiting) > _REORDERED):
            time = heappop(times)
            first = time if first is None else first
            last = 0 if last is None else max(time - first, last + 1)
            yield waiting.popleft(), last


def _resample(
    frames: Iterator[tuple[av.VideoFrame, int, Origin]], fps: Fraction
) -> Iterator[tuple[av.VideoFrame, int, Origin]]:
    """Frames at a constant rate: frame k is the last whose time is, rounded, at most k / fps."""
    held, place, constant = None, 0, None
    for frame, pts, origin in frames:
        # From time_base to frames of the new rate; halves up.
        slot = math.floor(pts * origin.time_base * fps + Fraction(1, 2))
        if slot - place > _LONGEST_PAUSE * fps:
            raise BrokenError(f"between two frames are {float((slot - place) / fps):.0f} s")
        while held is not None and place < slot:
            yield held, place, constant
            place += 1
        held = frame
        constant = replace(origin, time_base=1 / fps, rate=fps)
    if held is not None:
        yield held, place, constant


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
    from av.filter import Graph

    graph = Graph()
    source = graph.add_buffer(
        width=frame.width, height=frame.height, format=frame.format, time_base=time_base
    )
    filters = [*turns, ("format", pixels), ("buffersink", "")]
    # The narrow range is what players and readers take for granted in yuv420p.
    narrow = ":out_range=tv" if pixels == "yuv420p" else ""
    filters.insert(0, ("scale", f"{size[0]}:{size[1]}:flags=bicubic{narrow}"))
    if frame.width - size[0] in (0, 1) and frame.height - size[1] in (0, 1):
        filters.insert(0, ("crop", f"{size[0]}:{size[1]}:0:0"))
    nodes = [graph.add(name, options or None) for name, options in filters]
    graph.link_nodes(source, *nodes).configure()
    return graph
