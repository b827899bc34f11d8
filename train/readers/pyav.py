"""Videos read with PyAV, by the time at which each frame is shown.

Opening reads all packets without decoding them. Frame number i is the one shown at the i-th of
their times; reading goes to the key frame before it where that saves decoding, and decodes until a
frame of that time comes out. One that does not, or is damaged, is looked for once more from the
start of the video, for not all that containers call a key frame can be decoded alone.

Where times cannot be trusted, frames are counted as they are decoded from the start: opening then
decodes the whole video once, reading goes to no key frame, and the file stays open until the next
read, which goes on from there if it can: clips that follow each other decode a video once more.
Such are, with FFmpeg 8.1:

* avi and MPEG program streams with B-frames: the first stores the order of decoding alone (H.264
  frames came out as 1 3 4 2), of the second two frames in sixty had each other's time;
* packets without a time, as in elementary streams, and two of one time;
* videos whose first key frame is not the first to be shown: what is before it may be undecodable.

Frames outside the edit list of an mp4 are not shown, and have no number. Rotated videos are
shown upright; mirrored ones are not mirrored. What FFmpeg conceals is not noticed, as with decord:
bits flipped inside a picture are wrong pixels, and an mkv or webm overwritten in the middle goes
on behind the damage, as a shorter video.
"""

import io
import os
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import NamedTuple

import av
import numpy as np
from av.stream import Disposition

from train.video import Video, VideoError

# By FFmpeg's names, what stores the time at which a frame is shown for every frame.
_TIMED = {"mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "flv", "mpegts"}

# What another process opened, and this one must not free.
_leaked = []


class Packet(NamedTuple):
    """What is told of a packet without decoding it; times are in the stream's units or None."""

    pts: int | None
    dts: int | None
    is_key: bool
    is_shown: bool


class Key(NamedTuple):
    """A key frame: its number as a frame, its place as a packet, and where to seek it."""

    number: int
    place: int
    pts: int
    dts: int | None


class Times:
    """The times at which the frames of a video are shown.

    Attributes:
        numbers: of the frame at each time.
        places: of the packet with each time, in the order of the file.
        keys: key frames by number.
    """

    def __init__(self, packets: list[Packet]):
        """Sort `packets`, which come in the order of the file and have one time each."""
        shown = sorted(packet.pts for packet in packets if packet.is_shown)
        self.numbers = {pts: number for number, pts in enumerate(shown)}
        self.places = {packet.pts: place for place, packet in enumerate(packets)}
        self.keys = sorted(
            Key(self.numbers[packet.pts], place, packet.pts, packet.dts)
            for place, packet in enumerate(packets)
            if packet.is_key and packet.is_shown
        )

    def key_before(self, number: int) -> Key | None:
        """Return the last key frame that is not after frame `number`, None without one."""
        found = bisect_right(self.keys, number, key=lambda key: key.number)
        return self.keys[found - 1] if found else None


def times_of(packets: list[Packet]) -> Times | None:
    """Return the times of `packets`, in the order of the file; None if they cannot be trusted."""
    times = [packet.pts for packet in packets]
    if None in times or len(set(times)) < len(times):
        return None
    # What an edit list hides still counts here: it may begin between two key frames.
    if not packets or not packets[0].is_key or packets[0].pts > min(times):
        return None
    return Times(packets)


class Reader(Video):
    """A video that PyAV decodes.

    Its file is open only while it is read; where frames are counted, from the first read until the
    last frame was read, a read fails, or the video is let go of.
    """

    _search = None

    def __init__(self, path: str, data: bytes | None, num_threads: int):
        """Open the file at `path`, or `data` if there are some; raises VideoError."""
        self.path = path
        self._data, self._num_threads = data, num_threads
        opened = Opened(path, data, num_threads)
        try:
            packets = list(map(_packet, opened.packets()))
            rate = opened.stream.average_rate or opened.stream.guessed_rate or 0
            sorts = opened.container.format.name not in _TIMED
            sorts = sorts and opened.stream.codec_context.has_b_frames
            self._times = None if sorts else times_of(packets)
            if self._times is None:
                opened.start()
                num_frames = sum(1 for _ in opened.frames())
            else:
                num_frames = len(self._times.numbers)
        except av.FFmpegError as error:
            raise VideoError(path, f"the file is damaged, {_words(error)}") from None
        finally:
            opened.close()
        super().__init__(path, num_frames, float(rate))

    def _decode(self, unique: np.ndarray) -> np.ndarray:
        """Return the frames at `unique`, which ascends, uint8 [len(unique), H, W, 3]."""
        search, self._search = self._search, None
        if search is not None and search.last >= unique[0]:
            search.opened.close()
            search = None
        if search is None:
            search = Search(Opened(self.path, self._data, self._num_threads), self._times)
        try:
            pictures = []
            for index in unique.tolist():
                frame, reason = search.find(index)
                if frame is None:
                    self._fail(index, reason)
                pictures.append(_upright(frame, self._num_threads))
                if pictures[-1].shape != pictures[0].shape:
                    height, width = pictures[0].shape[:2]
                    size = f"{pictures[-1].shape[0]} x {pictures[-1].shape[1]}"
                    self._fail(index, f"it has {size} pixels, others {height} x {width}")
            if self._times is None and search.last + 1 < self.num_frames:
                self._search = search
            return np.stack(pictures)
        finally:
            if self._search is None:
                search.opened.close()

    def __del__(self):
        """Close a file that was kept open; a fork of the process that opened it leaks it instead.

        Freeing a decoder joins its threads, which a fork does not have: it would wait for ever.
        """
        if self._search is None:
            return
        if self._process == os.getpid():
            self._search.opened.close()
        else:
            _leaked.append(self._search)

    def _fail(self, index: int, reason: str) -> None:
        """Raise VideoError for frame `index`."""
        raise VideoError(self.path, f"frame {index} of {self.num_frames} cannot be read, {reason}")


class Opened:
    """The video stream of an open file.

    Attributes:
        container, stream: of PyAV.
    """

    def __init__(self, path: str, data: bytes | None, num_threads: int):
        """Open the file at `path`, or `data` if there are some; raises VideoError."""
        self.path, self.data, self.num_threads = path, data, num_threads
        self.container = None
        self.start()

    def start(self) -> None:
        """Open the file anew: a container that was read to its end need not go back."""
        self.close()
        # An absolute path, or FFmpeg would take what stands before a colon for a protocol.
        source = os.path.abspath(self.path) if self.data is None else io.BytesIO(self.data)
        try:
            # Broken text in the metadata is no reason to refuse the pictures.
            self.container = av.open(source, metadata_errors="ignore")
        except (av.FFmpegError, ValueError):
            raise VideoError(self.path, "not a video PyAV can open") from None
        # A picture on the cover of a sound file is a video stream, too.
        streams = [
            stream
            for stream in self.container.streams.video
            if not stream.disposition & Disposition.attached_pic
        ]
        best = self.container.streams.best("video")
        self.stream = best if best in streams else next(iter(streams), None)
        reason = None
        if self.stream is None:
            reason = "there is no video stream in the file"
        elif self.stream.codec_context is None:
            reason = "there is no decoder for its video stream"
        if reason is not None:
            self.close()
            raise VideoError(self.path, reason)
        self.stream.codec_context.thread_type = "AUTO" if self.num_threads != 1 else "NONE"
        self.stream.codec_context.thread_count = self.num_threads

    def close(self) -> None:
        """Close the file; PyAV's objects refer to each other, and would keep it for long."""
        if self.container is not None:
            self.container.close()
            self.container = None

    def packets(self) -> Iterator[av.Packet]:
        """Yield the packets of the stream, from where the container is, without the last flush."""
        return (packet for packet in self.container.demux(self.stream) if packet.size)

    def frames(self, packets: Iterable[av.Packet] | None = None) -> Iterator[av.VideoFrame]:
        """Yield the frames of `packets`, or of all from where the container is."""
        for packet in self.packets() if packets is None else packets:
            yield from self.stream.codec_context.decode(packet)
        yield from self.stream.codec_context.decode(None)


class Search:
    """The frames of an open file as they come out of the decoder, which goes to key frames."""

    def __init__(self, opened: Opened, times: Times | None):
        """Start at the first packet of `opened`; without `times`, frames are counted."""
        self.opened, self.times = opened, times
        self._begin(opened.frames())

    def _begin(self, frames: Iterator[av.VideoFrame], last: int = -1, is_start: bool = True):
        """Take `frames` from now on; the first of interest follows number `last`."""
        self.frames, self.last, self.is_start, self.count = frames, last, is_start, 0

    def find(self, index: int) -> tuple[av.VideoFrame | None, str]:
        """Return frame `index`, or None and why it is not there; indices ascend."""
        key = self.times.key_before(index) if self.times else None
        if key is not None and key.number > self.last + 1:
            self._seek(key)
        frame, reason = self._next(index)
        if frame is None and not self.is_start:
            self.opened.start()
            self._begin(self.opened.frames())
            frame, reason = self._next(index)
        return frame, reason

    def _next(self, index: int) -> tuple[av.VideoFrame | None, str]:
        """Return frame `index` if it is among those to come, else None and why it is not."""
        try:
            for frame in self.frames:
                number = self._number(frame)
                # Frames before a key frame, or outside of the edit list.
                if number is None or number <= self.last:
                    continue
                self.last = number
                if number == index:
                    return (None, "it is damaged") if frame.is_corrupt else (frame, "")
                if number > index:
                    break
        except av.FFmpegError as error:
            return None, _words(error)
        return None, "the decoder gives no picture for it"

    def _number(self, frame: av.VideoFrame) -> int | None:
        """Return the number of a frame that came out of the decoder, None if it has none."""
        if self.times is not None:
            return self.times.numbers.get(frame.pts)
        self.count += 1
        return self.count - 1

    def _seek(self, key: Key) -> None:
        """Go to a key frame, or before it, or to the start if the container cannot seek."""
        # Some containers seek by the one, some by the other time.
        for time in (key.pts, key.dts):
            try:
                self.opened.container.seek(time, stream=self.opened.stream)
                packets = self.opened.packets()
                first = next(packets, None)
            except (av.FFmpegError, TypeError):
                continue
            if first is not None and self.times.places.get(first.pts, key.place + 1) <= key.place:
                frames = self.opened.frames(chain([first], packets))
                self._begin(frames, key.number - 1, is_start=False)
                return
        self.opened.start()
        self._begin(self.opened.frames())


def _packet(packet: av.Packet) -> Packet:
    """Return what is told of a packet."""
    is_shown = not packet.is_discard
    # A VP8 frame may only be there for others to be predicted from, as a bit of it says.
    if packet.stream.codec_context.name == "vp8":
        is_shown = is_shown and bool(bytes(packet)[0] & 0x10)
    return Packet(packet.pts, packet.dts, packet.is_keyframe, is_shown)


def _upright(frame: av.VideoFrame, num_threads: int) -> np.ndarray:
    """Return the RGB picture of a frame as it is to be seen, uint8 [H, W, 3]."""
    # Left to itself, the conversion would start a thread for every core.
    picture = frame.to_ndarray(format="rgb24", threads=num_threads)
    return np.rot90(picture, round(frame.rotation / 90))


def _words(error: av.FFmpegError) -> str:
    """Return what FFmpeg says of an error, in lower case."""
    return (error.strerror or "it cannot be decoded").lower()
