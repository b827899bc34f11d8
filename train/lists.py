"""Which videos there are, and of which class: annotation lists, a folder a class, tar shards.

What is listed is kept in a few arrays, not in an object a video: a million of them are 100 MB, and
processes that are forked share them.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

Layout = Literal["files", "frames", "shards"]

# What `train.prepare` and folders of classes take for a video.
SUFFIXES = frozenset(
    [
        ".mp4",
        ".mkv",
        ".webm",
        ".avi",
        ".mov",
        ".m4v",
        ".mpg",
        ".mpeg",
        ".ts",
        ".wmv",
        ".flv",
        ".3gp",
    ]
)


class ListError(ValueError):
    """An annotation list that cannot be used: one sentence with file, line and reason."""


class Listed(NamedTuple):
    """A video of a list.

    Attributes:
        name: path relative to the root of the data set; of a shard's member, its name there.
        label: number of its class.
        frames: images in the folder, where `name` is a folder of images.
        shard: path of the tar file that it is in, relative to the root; "" if it is in none.
        offset, size: where its bytes begin in there, and how many they are.
    """

    name: str
    label: int
    frames: int = 0
    shard: str = ""
    offset: int = 0
    size: int = 0


class Videos(Sequence[Listed]):
    """Listed videos, in order; `labels` int64 [videos] has all of their labels."""

    def __init__(self, listed: Iterable[Listed]) -> None:
        """Packs what is listed; it is gone through once."""
        numbers, text, ends, shards = [], bytearray(), [], {}
        for video in listed:
            # Names of files may be of any bytes.
            text += video.name.encode(errors="surrogateescape")
            ends.append(len(text))
            shard = shards.setdefault(video.shard, len(shards))
            numbers.append((video.label, video.frames, shard, video.offset, video.size))
        self._text, self._ends = bytes(text), np.array(ends, dtype=np.int64)
        self._numbers = np.array(numbers, dtype=np.int64).reshape(-1, 5)
        self._shards = list(shards)
        self.labels = self._numbers[:, 0]

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> Listed:
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        label, frames, shard, offset, size = self._numbers[index].tolist()
        return Listed(
            self._name(index % len(self)), label, frames, self._shards[shard], offset, size
        )

    def _name(self, index: int) -> str:
        start = self._ends[index - 1] if index else 0
        return self._text[start : self._ends[index]].decode(errors="surrogateescape")

    def names(self) -> Iterator[str]:
        """All names, in order."""
        return map(self._name, range(len(self)))

    def ends_of_shards(self) -> Iterator[Listed]:
        """The first and the last listed video of each shard, where they lie in there."""
        order = np.lexsort((self._numbers[:, 3], self._numbers[:, 2]))
        shards = self._numbers[order, 2]
        is_first = np.diff(shards, prepend=-1) != 0
        is_last = np.diff(shards, append=-1) != 0
        return map(self.__getitem__, order[is_first | is_last].tolist())

    @property
    def digest(self) -> str:
        """What these videos in this order are recognised by: SHA-256 in hex."""
        said = "\n".join(self._shards).encode()
        parts = (self._text, self._ends.tobytes(), self._numbers.tobytes(), said)
        return hashlib.sha256(b"".join(parts)).hexdigest()


def read_videos(
    root: str | Path, name: str, classes: Sequence[str], layout: Layout = "files"
) -> Videos:
    """The videos that `name` lists, a path relative to `root`.

    Either a file: `path label` a line, with frames `folder total label`, with shards an index of
    `train.prepare index`. Or, of files, a folder that has one for each class, by its name.

    Raises:
        ListError: there is no such list, it has no videos, or a line that cannot be used.
    """
    path = Path(root, name)
    if path.is_dir():
        if layout != "files":
            raise ListError(
                f"{path}: of {layout} a list is needed; python -m train.prepare makes one"
            )
        return Videos(_read_folders(Path(root), path, classes))
    read = {"files": _of_file, "frames": _of_frames, "shards": _of_shards}[layout]
    return _read(path, read, _EXPECTED[layout], len(classes))


def read_list(path: Path, num_classes: int | None = None) -> Videos:
    """The videos of an annotation list; the label is the last word of a line.

    Raises:
        ListError: no such file, no lines, a line without an integer label, or one out of range.
    """
    return _read(path, _of_file, _EXPECTED["files"], num_classes)


_EXPECTED = {
    "files": "`path label`",
    "frames": "`folder total label`",
    "shards": "`name shard offset size label` with tabs between",
}


def _of_file(line: str) -> Listed:
    name, label = line.rsplit(None, 1)
    return Listed(name.rstrip(), _number(label))


def _of_frames(line: str) -> Listed:
    name, total, label = line.rsplit(None, 2)
    return Listed(name.rstrip(), _number(label), frames=_number(total))


def _of_shards(line: str) -> Listed:
    name, shard, offset, size, label = line.split("\t")
    return Listed(name, _number(label), 0, shard, _number(offset), _number(size))


def _number(word: str) -> int:
    """A word of digits as an integer; int() takes more: signs, underscores, spaces."""
    if not word.isdecimal() or len(word) > 18:
        raise ValueError(word)
    return int(word)


def _read(path: Path, read: object, expected: str, num_classes: int | None) -> Videos:
    """The videos of a file, each made of a line by `read`, which raises ValueError."""
    if not path.is_file():
        raise ListError(f"{path}: no such annotation list")

    def listed() -> Iterator[Listed]:
        for number, line in enumerate(_read_lines(path), start=1):
            line = line.strip()
            if not line:
                continue
            try:
                if "\0" in line:
                    raise ValueError(line)
                video = read(line)
            except ValueError:
                raise ListError(f"{path}:{number}: expected {expected}, got {line!r}") from None
            if num_classes is not None and video.label >= num_classes:
                raise ListError(
                    f"{path}:{number}: label must be below {num_classes}, got {video.label}"
                )
            yield video

    videos = Videos(listed())
    if not len(videos):
        raise ListError(f"{path}: the annotation list has no lines")
    return videos


def _read_lines(path: Path) -> list[str]:
    """The lines of a text file in UTF-8, with or without a byte order mark."""
    try:
        return path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ListError(f"{path}: must be UTF-8 text, got byte {error.start} in another") from None


def read_class_names(path: Path) -> list[str]:
    """The class names of a data set, one a line; raises ListError if there are none."""
    lines = _read_lines(path) if path.is_file() else []
    names = [line.strip() for line in lines if line.strip()]
    if not names:
        raise ListError(f"{path}: no such list of class names, or an empty one")
    return names


def find_class_names(root: str | Path, class_names: str, train_list: str) -> list[str]:
    """Those of the file, or, where there is none, the folders of a folder of training videos.

    Raises:
        ListError: neither is there, or it has none.
    """
    path, folder = Path(root, class_names), Path(root, train_list)
    if path.exists() or not folder.is_dir():
        return read_class_names(path)
    names = sorted(each.name for each in _subfolders(folder))
    if not names:
        raise ListError(f"{folder}: there is no folder of a class in it")
    return names


def _subfolders(folder: Path) -> list[os.DirEntry]:
    with os.scandir(folder) as entries:
        return [each for each in entries if _is_folder(each) and not each.name.startswith(".")]


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        # A link to itself is none.
        return False


def _read_folders(root: Path, folder: Path, classes: Sequence[str]) -> Iterator[Listed]:
    """The videos below the folder of each class, sorted."""
    labels = {name: label for label, name in enumerate(classes)}
    found = 0
    for each in sorted(_subfolders(folder), key=lambda each: each.name):
        if each.name not in labels:
            raise ListError(f"{folder}: its folder {each.name!r} is none of the classes")
        for path in find_videos(Path(each.path)):
            found += 1
            yield Listed(path.relative_to(root).as_posix(), labels[each.name])
    if not found:
        raise ListError(f"{folder}: there is no video in the folders of its classes")


def find_videos(folder: Path) -> Iterator[Path]:
    """The video files below a folder, by their suffix, sorted; hidden ones are left out.

    Links are followed, a folder that is one of those above it is not.
    """
    yield from _find(folder, ())


def _find(folder: Path, above: tuple[tuple[int, int], ...]) -> Iterator[Path]:
    status = os.stat(folder)
    own = (status.st_dev, status.st_ino)
    if own in above:
        return
    with os.scandir(folder) as entries:
        ordered = sorted(entries, key=lambda each: each.name)
    for each in ordered:
        if each.name.startswith("."):
            continue
        if _is_folder(each):
            yield from _find(Path(each.path), (*above, own))
        # A link that leads nowhere is listed: it is named as a video that cannot be read.
        elif Path(each.name).suffix.lower() in SUFFIXES:
            yield Path(each.path)
