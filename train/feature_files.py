"""A folder of features: one file a video, and the settings that all of them were made with."""

from __future__ import annotations

import errno
import json
import os
from dataclasses import asdict, dataclass
from io import BytesIO
from math import prod
from pathlib import Path
from typing import Any, Literal

import numpy as np
from safetensors import SafetensorError, safe_open

from train.given import Given
from train.partial import Partial, write_text

SETTINGS = "settings.json"
# What file systems without links say.
_NO_LINKS = (errno.EPERM, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)
# Of NumPy's dtypes in safetensors.
_SHORT = {"<f4": "F32", "<f2": "F16", "<i8": "I64"}


class FeatureError(RuntimeError):
    """Features that cannot be made, or not into this folder: one sentence with the cure."""


@dataclass(frozen=True)
class FeatureSettings:
    """What decides the numbers in a folder, and what its files are.

    Attributes:
        checkpoint_sha256: digest of the file of the model, in hex.
        model: its name.
        clip_len: frames per clip.
        interval: source frames from one frame of a clip to the next.
        stride: source frames from the beginning of one clip to that of the next.
        kind: "pooled" is the mean over the token grid, "dense" all of it.
        crops: 1 the centre of the frames, 3 the mean over both ends and the centre.
        short_side: height or width, whichever is less, after the resize, in pixels.
        crop: height and width of the crops, in pixels; 0 leaves the frames whole.
        reader: what decodes.
        precision: dtype that the model is autocast to.
        dtype: what is stored.
        format: what the files are.
    """

    checkpoint_sha256: str
    model: str
    clip_len: int
    interval: int
    stride: int
    kind: Literal["pooled", "dense"]
    crops: int
    short_side: int
    crop: int
    reader: str
    precision: str
    dtype: Literal["float32", "float16"]
    format: Literal["npy", "safetensors"]


def claim(folder: Path, settings: FeatureSettings, shard: tuple[int, int]) -> None:
    """Puts the settings into a folder, or finds them there; of several processes one is first.

    Raises:
        FeatureError: others are there, or what is no settings.
        OSError: the folder cannot be written.
    """
    path, ours = folder / SETTINGS, asdict(settings)
    if not path.exists() and _is_first(path, json.dumps(ours, indent=2) + "\n", shard):
        return
    try:
        theirs = json.loads(path.read_text())
    except ValueError:
        theirs = None
    if not isinstance(theirs, dict):
        raise FeatureError(f"{path}: must be the settings of features; choose another --output")
    if theirs != ours:
        names = [*ours, *sorted(theirs.keys() - ours.keys())]
        changed = [n for n in names if ours.get(n) != theirs.get(n)]
        said = "; ".join(f"{n}: {theirs.get(n)!r} -> {ours.get(n)!r}" for n in changed)
        raise FeatureError(
            f"{folder}: has features of other settings, {said}: choose another --output"
        )


def _is_first(path: Path, text: str, shard: tuple[int, int]) -> bool:
    """Whether there was no file yet and this text is now in it, all of it; raises OSError."""
    # Shards on several machines may have the same process number.
    own = Partial(path.with_name(f"{path.stem}.{shard[0]}-of-{shard[1]}{path.suffix}"))
    try:
        own.file.write(text.encode())
        own.file.flush()
        try:
            os.link(own.path, path)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            # Who reads it in between is refused, and none takes other settings for its own.
            with open(path, "x") as file:
                file.write(text)
    except FileExistsError:
        return False
    finally:
        own.discard()
    return True


def target(folder: Path, video: Given, settings: FeatureSettings) -> Path:
    """The file of a video; the name keeps the video's suffix, as a.mp4 and a.avi are two."""
    return folder / f"{video.name}.{settings.format}"


def fits(path: Path, folder: Path) -> bool:
    """Whether the file system of `folder` has room for the names that `path`, in it, brings."""
    longest = Partial.of(_beside(path) if path.suffix == ".npy" else path)
    names = map(os.fsencode, longest.relative_to(folder).parts)
    is_short = len(os.fsencode(longest)) < os.pathconf(folder, "PC_PATH_MAX")
    return is_short and max(map(len, names)) <= os.pathconf(folder, "PC_NAME_MAX")


def is_complete(path: Path, video: Given) -> bool:
    """Whether a whole file is there, of this video as it is now.

    It is if the video was at the same absolute path, links not followed, and had as many bytes and
    was changed at the same time, to the nanosecond, as now. Its content is not compared. Without
    its video a file is as good as it was.
    """
    notes = _notes(path)
    if notes is None or _plain(notes["video"]) != _plain(os.path.abspath(video.path)):
        return False
    try:
        now = os.stat(video.path)
    except OSError:
        return True
    return (int(notes["bytes"]), int(notes["mtime_ns"])) == (now.st_size, now.st_mtime_ns)


def _notes(path: Path) -> dict[str, Any] | None:
    """What is noted of a video, None where no whole file is."""
    try:
        if path.suffix == ".npy":
            notes = json.loads(_beside(path).read_text()) if path.is_file() else None
        else:
            with safe_open(path, "pt") as file:
                notes = file.metadata()
        int(notes["bytes"]), int(notes["mtime_ns"]), notes["video"]
    except (OSError, SafetensorError, ValueError, TypeError, KeyError):
        return None
    return notes


class FeatureFile:
    """The features of a video on their way into a file, of which the rows of a part are in memory.

    A safetensors file has `features` and `starts`, and the rest as metadata. Of an npy file, which
    has the features alone, `starts` and the rest are in a JSON file beside it.
    """

    def __init__(
        self,
        path: Path,
        video: Given,
        starts: np.ndarray,
        *,
        row: tuple[int, ...],
        dtype: str,
        num_frames: int,
        fps: float,
    ):
        """Begin the file at `path`; raises OSError.

        Args:
            path: as `target` has it.
            video: whose features these are.
            starts: int64 [clips], the first frame of each clip.
            row: shape of a clip's features.
            dtype: what is stored.
            num_frames, fps: of the video, fps 0 where the file does not tell.
        """
        now, shape = os.stat(video.path), (len(starts), *row)
        notes = {
            "video": os.path.abspath(video.path),
            "bytes": now.st_size,
            "mtime_ns": now.st_mtime_ns,
            "num_frames": num_frames,
            "fps": fps,
        }
        self._notes = {**notes, "starts": starts.tolist()}
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._left = prod(shape) * self._dtype.itemsize
        is_npy = path.suffix == ".npy"
        head = _npy_head if is_npy else _safetensors_head
        self._partial = Partial(path)
        try:
            self._partial.file.write(head(shape, self._dtype, starts, notes))
        except BaseException:
            self._partial.discard()
            raise

    def add(self, rows: np.ndarray) -> None:
        """Writes the features of the clips that follow, [some clips, ...]; raises OSError."""
        data = np.ascontiguousarray(rows, self._dtype)
        self._left -= data.nbytes
        self._partial.file.write(data.data)

    def finish(self) -> None:
        """Gives the file, which has all rows now, its name; raises OSError."""
        if self._left:
            raise ValueError(f"FeatureFile: expected all rows, {self._left} bytes are missing")
        path = self._partial.final
        self._partial.sync()
        if path.suffix == ".npy":
            # The features of what this path was before must not seem to be of this video.
            path.unlink(missing_ok=True)
            write_text(_beside(path), json.dumps(self._notes) + "\n")
        self._partial.rename()

    def discard(self) -> None:
        """Deletes what was written, unless it has its name."""
        self._partial.discard()


def _npy_head(
    shape: tuple[int, ...], dtype: np.dtype, starts: np.ndarray, notes: dict[str, Any]
) -> bytes:
    """What an npy file has before its numbers."""
    head = BytesIO()
    words = {"descr": dtype.str, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(head, words)
    return head.getvalue()


def _safetensors_head(
    shape: tuple[int, ...], dtype: np.dtype, starts: np.ndarray, notes: dict[str, Any]
) -> bytes:
    """What a safetensors file has before its features: its header, and the starts.

    Source: safetensors' README, "Format".
    """
    first = np.ascontiguousarray(starts, "<i8")
    end = first.nbytes + prod(shape) * dtype.itemsize
    spans = {
        "starts": (first.dtype, first.shape, [0, first.nbytes]),
        "features": (dtype, shape, [first.nbytes, end]),
    }
    words: dict[str, Any] = {"__metadata__": {n: _plain(str(v)) for n, v in notes.items()}}
    for name, (kind, sizes, offsets) in spans.items():
        words[name] = {"dtype": _SHORT[kind.str], "shape": sizes, "data_offsets": offsets}
    text = json.dumps(words).encode()
    # Spaces, for the numbers to begin at a multiple of 8 bytes.
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + first.tobytes()


def _plain(path: str) -> str:
    """A path as it can be in any file: a question mark for each byte that is no UTF-8."""
    return path.encode(errors="replace").decode()


def _beside(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")
