"""What is wrong with a data set, found before a training run finds it.

What opening a video came to is kept in `check.jsonl` beside the list, by the file's path, size and
time of change: the next check opens only what is new.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, TextIO

from tqdm import tqdm

from train.data import DataSettings, open_listed
from train.lists import Listed, Videos, find_class_names, read_videos
from train.prepare.workers import Died, each
from train.video import VideoError

KINDS = (
    "missing",
    "listed twice",
    "with two labels",
    "in two lists",
    "label out of range",
    "unreadable",
    "classes without videos",
)
"""What can be wrong."""
RECORD = "check.jsonl"


@dataclass
class Checked:
    """What a check came to.

    Attributes:
        videos: how many each list has, by its name.
        classes: how many there are, None where no file says it.
        opened: videos opened now.
        known: videos opened by a check before.
        faults: by kind, a line each.
    """

    videos: dict[str, int] = field(default_factory=dict)
    classes: int | None = None
    opened: int = 0
    known: int = 0
    faults: dict[str, list[str]] = field(default_factory=lambda: {kind: [] for kind in KINDS})

    @property
    def is_well(self) -> bool:
        return not any(self.faults.values())

    def add(self, kind: str, what: str, where: str, reason: str = "") -> None:
        self.faults[kind].append(f"{what} ({where})" + (f": {reason}" if reason else ""))


class Key(NamedTuple):
    """What the answer of an opened video holds for, as long as all of it is the same."""

    path: str
    place: int
    size: int
    changed: int
    reader: str


class Job(NamedTuple):
    """A video to open; `decode` says whether frames of it are read, too."""

    key: Key
    where: str
    listed: Listed
    settings: DataSettings
    decode: bool


def check(
    lists: Sequence[str], settings: DataSettings, *, decode: bool = False, workers: int = 1
) -> Checked:
    """What is wrong with the videos of `lists`, whose paths are relative to `settings.root`.

    Args:
        lists: each a file of the settings' layout, or a folder with one for each class.
        settings: those of training: root, layout, reader, class_names, frame_name.
        decode: whether the first, middle and last frame are read, too; else videos are opened.
        workers: processes that open videos.

    Raises:
        ListError: a list cannot be read.
        RuntimeError: the reader is not installed.
    """
    checked, jobs = Checked(), []
    names = _class_names(settings, lists[0])
    checked.classes = None if names is None else len(names)
    seen: dict[str, tuple[int, str]] = {}
    for where in lists:
        videos = _read(where, settings, names)
        checked.videos[where] = len(videos)
        for listed in tqdm(videos, where, unit="video", leave=False):
            if _is_new(listed, where, seen, checked):
                key = _key(listed, settings)
                if key is None:
                    missing = f"{listed.shard}:{listed.name}" if listed.shard else listed.name
                    checked.add("missing", missing, where)
                else:
                    jobs.append(Job(key, where, listed, settings, decode))
            if names is not None and listed.label >= len(names):
                reason = f"{listed.label}, there are {len(names)} classes"
                checked.add("label out of range", listed.name, where, reason)
        there = set(videos.labels.tolist())
        for label, name in enumerate(names or ()):
            if label not in there:
                checked.add("classes without videos", name, where)
    record = Path(settings.root, lists[0]).parent / RECORD
    _open_all(jobs, record, decode, workers, checked)
    for lines in checked.faults.values():
        lines.sort()
    return checked


def _class_names(settings: DataSettings, first: str) -> list[str] | None:
    """The class names, None where nothing says them."""
    is_said = Path(settings.root, settings.class_names).exists()
    if not is_said and not Path(settings.root, first).is_dir():
        return None
    return find_class_names(settings.root, settings.class_names, first)


def _read(where: str, settings: DataSettings, names: list[str] | None) -> Videos:
    """The videos of a list, whose labels may be any."""
    is_folder = Path(settings.root, where).is_dir()
    # Only the length is asked for by a file; a label beyond it would be the end of the check.
    classes = names if is_folder and names is not None else range(2**40)
    return read_videos(settings.root, where, classes, settings.layout)


def _is_new(listed: Listed, where: str, seen: dict[str, tuple[int, str]], checked: Checked) -> bool:
    """Whether a video was in no line before; if it was, that is a fault, or two."""
    if listed.name not in seen:
        seen[listed.name] = listed.label, where
        return True
    label, other = seen[listed.name]
    if other == where:
        checked.add("listed twice", listed.name, where)
    else:
        checked.add("in two lists", listed.name, f"{other} and {where}")
    if label != listed.label:
        checked.add("with two labels", listed.name, where, f"{label} and {listed.label}")
    return False


def _key(listed: Listed, settings: DataSettings) -> Key | None:
    """What is recorded of a file, None if there is none."""
    path = listed.shard or listed.name
    try:
        status = os.stat(Path(settings.root, path))
    except OSError:
        return None
    name = f"{path}:{listed.name}" if listed.shard else path
    # A folder of images is opened by no reader; how many it should have is in the list.
    reader = settings.frame_name if settings.layout == "frames" else settings.reader
    place, size = (listed.offset, listed.size) if listed.shard else (listed.frames, status.st_size)
    return Key(name, place, size, status.st_mtime_ns, reader)


def _open_all(jobs: list[Job], record: Path, decode: bool, workers: int, checked: Checked) -> None:
    """Open the videos that `record` does not know, and add to `checked` which cannot be read."""
    known = _read_record(record, decode)
    new = [job for job in jobs if job.key not in known]
    for job in jobs:
        if known.get(job.key):
            checked.add("unreadable", job.listed.name, job.where, known[job.key])
    checked.known, checked.opened = len(jobs) - len(new), len(new)
    if not new:
        return
    with _appended(record) as file:
        # The first of our lines would be part of it.
        file.write("\n" * _has_half_line(record))
        for job, reason in tqdm(
            each(why_unreadable, new, workers), "opened", len(new), unit="video"
        ):
            if isinstance(reason, Died):
                reason = reason.reason
            line = {**job.key._asdict(), "decode": decode, "reason": reason}
            # At once: what a killed check found out is not to be found out again.
            file.write(json.dumps(line) + "\n")
            file.flush()
            if reason is not None:
                checked.add("unreadable", job.listed.name, job.where, reason)


def _appended(record: Path) -> TextIO:
    """The record, to be gone on with; where none can be written, nothing is kept."""
    try:
        return open(record, "a", encoding="utf-8")
    except OSError as error:
        print(f"{record}: {error.strerror}, so nothing is kept for the next check")
        return open(os.devnull, "w", encoding="utf-8")


def _has_half_line(record: Path) -> bool:
    """Whether the record of a check that was killed ends amid a line."""
    if not record.is_file() or not record.stat().st_size:
        return False
    with open(record, "rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read() != b"\n"


def _read_record(record: Path, decode: bool) -> dict[Key, str | None]:
    """Why each video known by now cannot be read, None for those that can; the last line counts."""
    known = {}
    for line in _lines(record):
        try:
            fields = json.loads(line)
            key, reason = Key(*(fields[name] for name in Key._fields)), fields["reason"]
            # One that was only opened may yet fail in decoding.
            if fields["decode"] or not decode or reason is not None:
                known[key] = reason
        except (ValueError, KeyError, TypeError):
            # The last line of a check that was killed.
            continue
    return known


def _lines(record: Path) -> Iterator[str]:
    if record.is_file():
        with open(record, encoding="utf-8", errors="replace") as file:
            yield from file


def why_unreadable(job: Job) -> str | None:
    """Why a video cannot be read, None if it can."""
    listed, settings = job.listed, job.settings
    try:
        video = open_listed(listed, settings)
        if settings.layout == "frames":
            names = set(os.listdir(Path(settings.root, listed.name)))
            for number in range(1, listed.frames + 1):
                if settings.frame_name.format(number) not in names:
                    return f"picture {settings.frame_name.format(number)} is missing"
        if job.decode:
            last = video.num_frames - 1
            video.read(sorted({0, last // 2, last}))
    except VideoError as error:
        return error.reason
    return None
