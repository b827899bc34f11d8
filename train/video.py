"""Frame-accurate reading of video files with decord; every failure is a `VideoError`.

What decord 0.6 does with damaged files, found by experiment (x86-64 Linux, 2 cores):

* An mp4 whose index (``moov``) comes first and whose data are cut opens as if nothing were
  missing; reading beyond the cut fails, reading before it succeeds. A cut avi, mkv or webm opens
  as a shorter video and reads without a word. So the size the container declares is compared with
  the size of the file before decord sees it (`declared_bytes`).
* A packet without a picture is answered with the frame before it; ``fault_tol`` makes that an
  error where decord notices. Bits flipped inside a picture are concealed by FFmpeg and read as
  wrong pixels: nothing short of a checksum would find those.
* ``DECORD_EOF_RETRY_MAX`` counts how often the reader polls the decoding thread after the last
  packet was handed over. Low limits (16 to 256 here) fail on intact files as soon as the
  cores are busy, and no damaged file of ours came near decord's own limit of 10240: the limit is
  left alone.
* Three kinds of intact files are refused: MPEG transport streams as FFmpeg writes them, videos with
  a rotation in their metadata (phones held upright) and very narrow ones (48 pixels, say, where
  FFmpeg pads the rows): for the last two decord prepares batches of the wrong size. Re-encode them.
"""

import os
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import BinaryIO

import numpy as np
import torch

# decord turns a share of the frames below 1 into a number of tolerated repeats, here always 0;
# a plain 0 would switch the check off.
_NO_REPEATED_FRAMES = 1e-9

# Open decord readers of this process.
_readers = weakref.WeakSet()


def _forget_readers() -> None:
    """Leak, in a forked child, the readers of its parent.

    Freeing one joins its decoding thread, which a child does not have: the child is aborted, or
    waits for ever. And it may free one at any time, when it collects garbage its parent left.
    """
    for reader in list(_readers):
        reader._handle = None  # what decord's destructor asks for
    _readers.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_readers)


class VideoError(RuntimeError):
    """A video that cannot be read: one sentence, ``cannot read <path>: <reason>``."""

    def __init__(self, path: str | os.PathLike, reason: str):
        """Keep `path` and `reason` as attributes beside the sentence made of them."""
        super().__init__(path, reason)
        self.path = os.fspath(path)
        self.reason = reason

    def __str__(self) -> str:
        return f"cannot read {self.path}: {self.reason}"


class Video:
    """An open video file.

    decord decodes in a thread of its own, which a fork does not copy: open the video in the
    process that reads it (in a DataLoader worker: inside ``__getitem__``). Forking while videos are
    open is safe: the child cannot read them, and does not free them.

    Attributes:
        path: the file, as given.
        num_frames: frames in the video.
        fps: average frame rate, frames/s.
    """

    def __init__(self, path: str | os.PathLike, *, num_threads: int = 1):
        """Open `path`; `num_threads` decoding threads, 1 being right where workers decode.

        Raises:
            VideoError: if the file is missing, empty, truncated or not a video decord can open.
        """
        self.path = os.fspath(path)
        self._num_threads = num_threads
        self._process = os.getpid()
        _check_file(self.path)
        self._reader = self._open()
        self.num_frames = len(self._reader)
        self.fps = float(self._reader.get_avg_fps())

    def read(self, indices: Sequence[int] | np.ndarray) -> torch.Tensor:
        """Return the frames at `indices`, RGB, in the order given; repeats are decoded once.

        Args:
            indices: frame numbers in [0, num_frames), any order, at least one.

        Returns:
            uint8 [T, 3, H, W] with T = len(indices), the strides of a [T, H, W, 3] array.

        Raises:
            ValueError: if `indices` is empty, not one-dimensional or out of range.
            VideoError: if a frame cannot be decoded, or the video was opened in another process.
        """
        wanted = np.asarray(indices)
        if wanted.ndim != 1 or wanted.size == 0 or not np.issubdtype(wanted.dtype, np.integer):
            raise ValueError(
                f"Video.read: indices must be a non-empty list of integers, "
                f"got shape {list(wanted.shape)} of {wanted.dtype}"
            )
        if wanted.min() < 0 or wanted.max() >= self.num_frames:
            raise ValueError(
                f"Video.read: indices must lie in [0, {self.num_frames}), "
                f"got {wanted.min()} to {wanted.max()}"
            )
        if self._process != os.getpid():
            raise VideoError(self.path, "it was opened in another process, open it in this one")
        unique, position = np.unique(wanted, return_inverse=True)
        try:
            frames = self._reader.get_batch(unique).asnumpy()
        except Exception as error:
            # decord's message is a C++ stack trace, and its failed reader gives no more frames.
            if "size must exactly match" in str(error):
                reason = "decord cannot read it (a rotation, or very narrow): re-encode it upright"
            else:
                reason = self._undecodable(unique)
            self._reader = self._open()
            raise VideoError(self.path, reason) from None
        if len(unique) < len(wanted) or (wanted[1:] < wanted[:-1]).any():
            frames = frames[position]
        return torch.from_numpy(frames).permute(0, 3, 1, 2)

    def _open(self):
        """Return a fresh decord reader."""
        decord = _decord()
        try:
            with _silent_stderr():
                reader = decord.VideoReader(
                    self.path,
                    ctx=decord.cpu(0),
                    num_threads=self._num_threads,
                    fault_tol=_NO_REPEATED_FRAMES,
                )
        except Exception as error:
            if "cannot find video stream" in str(error):
                raise VideoError(self.path, "there is no video stream in the file") from None
            raise VideoError(self.path, "not a video decord can open") from None
        _readers.add(reader)
        return reader

    def _undecodable(self, unique: np.ndarray) -> str:
        """Return which of the sorted frames `unique` fails first, as a reason.

        "At or soon after", because decord decodes ahead of the frame it is asked for.
        """
        reader = self._open()
        for index in unique:
            try:
                reader.get_batch([index])
            except Exception:
                return f"decoding failed at or soon after frame {index} of {self.num_frames}"
        return "the frames asked for could not be decoded together"


def declared_bytes(path: str | os.PathLike) -> int:
    """Return how many bytes the container's own headers say the file has, 0 where they do not.

    Reads a few headers of mp4/mov (top-level boxes), avi (RIFF chunk) and mkv/webm (segment); a
    file shorter than this was cut short.
    """
    with open(path, "rb") as file:
        head = file.read(12)
        if head[4:8] in (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide"):
            return _end_of_boxes(file)
        if head[:4] == b"RIFF":
            length = int.from_bytes(head[4:8], "little")
            # Writers that could not seek back leave one of these two.
            return 0 if length in (0, 0xFFFFFFFF) else 8 + length
        if head[:4] == b"\x1a\x45\xdf\xa3":
            return _end_of_segment(file)
    return 0


def _end_of_boxes(file: BinaryIO) -> int:
    """Return where the last top-level box of an mp4 ends, in bytes from the start."""
    size = file.seek(0, os.SEEK_END)
    position = 0
    while position + 8 <= size:
        file.seek(position)
        head = file.read(16)
        length = int.from_bytes(head[:4], "big")
        if length == 1:
            length = int.from_bytes(head[8:16], "big")
        # 0 means "to the end of the file"; less than a header, or a name that is none, is no box.
        if length < 8 or not head[4:8].isalnum():
            break
        position += length
    return position


def _end_of_segment(file: BinaryIO) -> int:
    """Return where the segment of a Matroska file ends, in bytes, 0 if its length is not told."""
    file.seek(4)
    file.seek(_read_vint(file) or 0, os.SEEK_CUR)
    if file.read(4) != b"\x18\x53\x80\x67":
        return 0
    length = _read_vint(file)
    return 0 if length is None else file.tell() + length


def _read_vint(file: BinaryIO) -> int | None:
    """Return the next EBML variable-length integer, None for the reserved value "unknown"."""
    first = file.read(1)
    if not first or first[0] == 0:
        return None
    extra = 8 - first[0].bit_length()
    value = int.from_bytes(first + file.read(extra), "big") & ((1 << (7 * (extra + 1))) - 1)
    return None if value == (1 << (7 * (extra + 1))) - 1 else value


def _check_file(path: str) -> None:
    """Raise VideoError for what can be told without decoding."""
    if not os.path.exists(path):
        raise VideoError(path, "no such file")
    if os.path.isdir(path):
        raise VideoError(path, "it is a directory")
    size = os.path.getsize(path)
    if size == 0:
        raise VideoError(path, "the file is empty")
    try:
        declared = declared_bytes(path)
    except OSError as error:
        raise VideoError(path, (error.strerror or str(error)).lower()) from None
    if size < declared:
        raise VideoError(path, f"the file is truncated, {size} of {declared} bytes are there")


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """Drop what is written to file descriptor 2: decord reports what it cannot open there.

    Its log level does not reach that line. Python's own errors are raised, not written.
    """
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _decord():
    """Return the decord module, imported at the first use so that only readers need it."""
    import decord

    # Its own complaints would only repeat, at length and on stderr, what VideoError says.
    decord.logging.set_level(decord.logging.QUIET)
    return decord
