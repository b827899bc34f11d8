"""Frame-accurate reading of videos: `open_video`, by a reader of choice; failures are `VideoError`.

A reader is a library that decodes, in a file of its own in train/readers, which is imported when it
is first asked for. Here is what they share: what can be told of a file without decoding it, which
indices may be read, and that a video belongs to its process.
"""

import importlib
import io
import os
import stat
from collections.abc import Sequence
from typing import BinaryIO, NamedTuple

import numpy as np
import torch

READERS = ("decord", "pyav", "torchcodec")

_CURES = {
    "decord": "pip install decord",
    "pyav": "pip install av",
    "torchcodec": "pip install torchcodec, and FFmpeg's shared libraries (4 to 9)",
}


class VideoError(RuntimeError):
    """A video that cannot be read: one sentence, ``cannot read <path>: <reason>``."""

    def __init__(self, path: str | os.PathLike, reason: str):
        """Keep `path` and `reason` as attributes beside the sentence made of them."""
        super().__init__(path, reason)
        self.path = os.fspath(path)
        self.reason = reason

    def __str__(self) -> str:
        return f"cannot read {self.path}: {self.reason}"


class ReaderError(RuntimeError):
    """A reader this machine does not have: no video can be read by it, so none is to blame."""


class Packed(NamedTuple):
    """A video inside a larger file, such as a tar shard.

    Attributes:
        path: the larger file.
        name: of the video, for messages.
        offset: of its first byte, in bytes.
        size: in bytes.
    """

    path: str
    name: str
    offset: int
    size: int


class Video:
    """An open video; `open_video` makes one.

    Open it in the process that reads it (in a DataLoader worker: inside ``__getitem__``): decoders
    have threads, which a fork does not copy.

    Attributes:
        path: the file as given, ``shard.tar:name`` for one that is packed.
        num_frames: frames that are shown.
        fps: average frame rate, frames/s, 0 where the file does not tell.
    """

    path: str
    num_frames: int
    fps: float

    def __init__(self, path: str, num_frames: int, fps: float):
        """Keep the attributes; raises VideoError if there is no frame."""
        self.path, self.num_frames, self.fps = path, num_frames, fps
        self._process = os.getpid()
        if num_frames < 1:
            raise VideoError(path, "there are no frames in the video")

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
        frames = torch.as_tensor(self._decode(unique))
        if len(unique) < len(wanted) or (wanted[1:] < wanted[:-1]).any():
            frames = frames[torch.from_numpy(position)]
        return frames.permute(0, 3, 1, 2)

    def _decode(self, unique: np.ndarray) -> np.ndarray | torch.Tensor:
        """Return the frames at `unique`, which ascends, uint8 [len(unique), H, W, 3]."""
        raise NotImplementedError


def open_video(
    source: str | os.PathLike | Packed, reader: str = "decord", *, num_threads: int = 1
) -> Video:
    """Return the video in the file `source`, or in a part of one, opened by `reader`.

    Args:
        source: path of a file, or where in a larger file the video is; the bytes of a packed one
            stay in memory as long as the video is open.
        reader: one of `READERS`.
        num_threads: decoding threads, 1 being right where workers decode.

    Raises:
        ValueError: if there is no reader of this name.
        ReaderError: if this machine lacks it; no other takes its place.
        VideoError: if the file is missing, empty, truncated or not a video the reader can open.
    """
    opened = _load(reader)
    if isinstance(source, Packed):
        path, data = f"{source.path}:{source.name}", _read_packed(source)
        _check_length(path, len(data), io.BytesIO(data))
    else:
        path, data = os.fspath(source), None
        check_file(path)
    return opened(path, data, num_threads)


def why_not(reader: str) -> str | None:
    """Return why `reader` cannot be used on this machine, as a sentence, None if it can."""
    try:
        _load(reader)
    except ReaderError as error:
        return str(error)
    return None


def _load(reader: str) -> type[Video]:
    """Return the class of a reader, its library being imported when it is first asked for."""
    if reader not in READERS:
        raise ValueError(f"open_video: reader must be one of {', '.join(READERS)}, got {reader!r}")
    try:
        return importlib.import_module(f"train.readers.{reader}").Reader
    # What a library raises that is there and finds none of its own, or another version.
    except (ImportError, OSError, RuntimeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ReaderError(
            f"open_video: reader {reader!r} cannot be used here, {reason}; {_CURES[reader]}"
        ) from None


def check_file(path: str) -> None:
    """Raise VideoError for what can be told of a file without decoding."""
    _file_size(path)
    try:
        with open(path, "rb") as file:
            _check_length(path, file.seek(0, os.SEEK_END), file)
    except OSError as error:
        raise VideoError(path, _words(error)) from None


def _read_packed(source: Packed) -> bytes:
    """Return the bytes of a packed video; raises VideoError where they are not."""
    path = f"{source.path}:{source.name}"
    there = max(0, _file_size(source.path, path) - source.offset)
    if there < source.size:
        raise VideoError(path, f"the shard is too short, {there} of {source.size} bytes are there")
    try:
        with open(source.path, "rb") as file:
            file.seek(source.offset)
            return file.read(source.size)
    except OSError as error:
        raise VideoError(path, _words(error)) from None


def _file_size(path: str, name: str | None = None) -> int:
    """Return the bytes of a file; raises VideoError, with `name`, for what is none."""
    name = path if name is None else name
    try:
        status = os.stat(path)
    except FileNotFoundError:
        raise VideoError(name, "no such file") from None
    except ValueError:
        raise VideoError(name, "no file can have this name") from None
    except OSError as error:
        raise VideoError(name, _words(error)) from None
    if stat.S_ISDIR(status.st_mode):
        raise VideoError(name, "it is a directory")
    # Reading a pipe could wait for ever.
    if not stat.S_ISREG(status.st_mode):
        raise VideoError(name, "it is no regular file")
    return status.st_size


def _check_length(path: str, size: int, file: BinaryIO) -> None:
    """Raise VideoError if a file of `size` bytes is empty, or shorter than it says itself."""
    if size == 0:
        raise VideoError(path, "the file is empty")
    declared = declared_bytes(file)
    if size < declared:
        raise VideoError(path, f"the file is truncated, {size} of {declared} bytes are there")


def _words(error: OSError) -> str:
    """Return what the system says of an error."""
    return (error.strerror or str(error)).lower()


def declared_bytes(file: BinaryIO) -> int:
    """Return how many bytes the container's own headers say the file has, 0 where they do not.

    Reads a few headers of mp4/mov (top-level boxes), avi (RIFF chunk) and mkv/webm (segment); a
    file shorter than this was cut short.
    """
    file.seek(0)
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
