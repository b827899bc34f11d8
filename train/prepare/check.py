"""What is wrong with a data set, found before a training run finds it.

Which videos can be read is kept in `check.jsonl` in the root, by the file's path, size and time of
change: the next check opens only what is new, and what could not be read, for a disk or a process
may have been at fault.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple, TextIO

import numpy as np
from tqdm import tqdm

from train.data import DataSettings, open_listed
from train.lists import Listed, Videos, find_class_names, read_videos
from train.prepare.workers import Died, each
from train.video import Video, VideoError, why_not

KINDS = (
    "missing",
    "listed twice",
    "with two labels",
    "in two lists",
    "label out of range",
    "unreadable",
    "misread",
    "classes without videos",
)
"""What can be wrong."""
RECORD = "check.jsonl"
# Levels of 256 that two decoders' pictures of one frame may differ by, on average.
_SAME = 8


@dataclass
class Checked:
    """What a check came to.

    Attributes:
        videos: how many each list has, by its name.
        classes: how many there are, None where no file says it.
        opened: videos opened now.
        known: videos that a check before could read.
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
    """A video that could be read, as long as all of this is the same.

    Attributes:
        path: relative to the root, of a shard's member with its name there.
        place: where it begins in there; of a folder, how many images are listed.
        size, changed: bytes and time of change; of a folder, those of all that is in it.
        reader: what read it.
    """

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
        decode: whether the first, middle and last frame are read, too, and those of decord compared
            with PyAV's; else videos are opened.
        workers: processes that open videos.

    Raises:
        ListError: a list cannot be read.
        RuntimeError: a reader is not installed.
    """
    readers = [settings.reader] * (settings.layout != "frames")
    for reader in [*readers, "pyav"] if decode and readers == ["decord"] else readers:
        if (reason := why_not(reader)) is not None:
            raise RuntimeError(reason)
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
    _open_all(jobs, Path(settings.root, RECORD), decode, workers, checked)
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
        states = [os.stat(Path(settings.root, path))]
        if stat.S_ISDIR(states[0].st_mode):
            # An image that is overwritten does not change its folder.
            with os.scandir(Path(settings.root, path)) as images:
                states += [each.stat() for each in images if each.is_file()]
    except OSError:
        return None
    name = f"{path}:{listed.name}" if listed.shard else path
    # A folder of images is opened by no reader; how many it should have is in the list.
    reader = settings.frame_name if settings.layout == "frames" else settings.reader
    size, changed = sum(s.st_size for s in states), max(s.st_mtime_ns for s in states)
    place, size = (listed.offset, listed.size) if listed.shard else (listed.frames, size)
    return Key(name, place, size, changed, reader)


def _open_all(jobs: list[Job], record: Path, decode: bool, workers: int, checked: Checked) -> None:
    """Open the videos that `record` does not know, and add to `checked` what is wrong with them."""
    known = _read_record(record, decode)
    new = [job for job in jobs if job.key not in known]
    checked.known, checked.opened = len(jobs) - len(new), len(new)
    if not new:
        return
    with _appended(record) as file:
        # The first of our lines would be part of it.
        file.write("\n" * _has_half_line(record))
        for job, fault in tqdm(each(find_fault, new, workers), "opened", len(new), unit="video"):
            if isinstance(fault, Died):
                fault = "unreadable", fault.reason
            if fault is not None:
                checked.add(fault[0], job.listed.name, job.where, fault[1])
                continue
            # At once: what a killed check found out is not to be found out again.
            file.write(json.dumps({**job.key._asdict(), "decoded": decode}) + "\n")
            file.flush()


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


def _read_record(record: Path, decode: bool) -> set[Key]:
    """The videos that are known to be readable."""
    known = set()
    for line in _lines(record):
        try:
            fields = json.loads(line)
            # One that was only opened may yet fail in decoding.
            if fields["decoded"] or not decode:
                known.add(Key(*(fields[name] for name in Key._fields)))
        except (ValueError, KeyError, TypeError):
            # The last line of a check that was killed.
            continue
    return known


def _lines(record: Path) -> Iterator[str]:
    if record.is_file():
        with open(record, encoding="utf-8", errors="replace") as file:
            yield from file


def find_fault(job: Job) -> tuple[str, str] | None:
    """Of which kind of `KINDS` a video's fault is, and a reason; None if it has none."""
    listed, settings = job.listed, job.settings
    try:
        video = open_listed(listed, settings)
        if settings.layout == "frames":
            names = set(os.listdir(Path(settings.root, listed.name)))
            for number in range(1, listed.frames + 1):
                if settings.frame_name.format(number) not in names:
                    return "unreadable", f"picture {settings.frame_name.format(number)} is missing"
        if job.decode and settings.layout != "frames" and settings.reader == "decord":
            return _compare(video, job)
        if job.decode:
            video.read(_three_of(video))
    except VideoError as error:
        return "unreadable", error.reason
    except OSError as error:
        return "unreadable", (error.strerror or str(error)).lower()
    return None


def _three_of(video: Video) -> list[int]:
    last = video.num_frames - 1
    return sorted({0, last // 2, last})


def _compare(video: Video, job: Job) -> tuple[str, str] | None:
    """What is wrong with frames that decord reads: in some files it goes to other key frames."""
    keys = [key for key in video.keys()[1:] if key < video.num_frames]
    chosen = {*keys[:1], *keys[-1:], *keys[len(keys) // 2 :][:1]}
    # Each alone, for it is after going there that decord is astray.
    reads = [_three_of(video), *([key] for key in sorted(chosen))]
    ours = [video.read(indices).numpy().astype(np.int16) for indices in reads]
    other_frames = "misread", "decord gives other frames here: --data.reader=pyav reads them"
    try:
        other = open_listed(job.listed, replace(job.settings, reader="pyav"))
        if other.num_frames != video.num_frames:
            return other_frames
        for indices, frames in zip(reads, ours, strict=True):
            theirs = other.read(indices).numpy()
            # The two have different versions of FFmpeg, and colours differ by a little.
            if (
                theirs.shape != frames.shape
                or np.abs(frames - theirs).mean(axis=(1, 2, 3)).max() > _SAME
            ):
                return other_frames
    except VideoError as error:
        return "misread", f"decord reads it, and PyAV does not: {error.reason}"
    return None
