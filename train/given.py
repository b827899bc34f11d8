"""The videos that a command line names: files, folders of them, and lists."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePath
from typing import NamedTuple

from train.lists import SUFFIXES, ListError, find_videos


class Given(NamedTuple):
    """A video that was asked for.

    Attributes:
        path: where it is.
        name: what is made of it is called by: its path relative to the folder, or the folder of the
            list, that named it, of a file to the current folder; its whole path without the first
            slash where it is in none of them.
    """

    path: str
    name: str


def given_videos(words: Iterable[str]) -> list[Given]:
    """The videos of a command line, in its order, each once.

    A folder stands for all videos below it, sorted; a file that ends in .txt for the paths in it,
    one a line, with or without the label of an annotation list. Anything else is a video, whether
    it is there or not: reading it says so.

    Raises:
        ListError: a folder or a list without any video.
    """
    found: dict[str, Given] = {}
    for word in words:
        many = 0
        for path, base in _videos_of(word):
            full, many = os.path.abspath(path), many + 1
            found.setdefault(full, Given(path, _name(full, os.path.abspath(base))))
        if not many:
            raise ListError(f"{word}: there is no video in it")
    return list(found.values())


def check_names(videos: Sequence[Given]) -> None:
    """ListError if two videos have the same name, and so what is made of them."""
    paths: dict[str, str] = {}
    for video in videos:
        other = paths.setdefault(video.name, video.path)
        if other != video.path:
            raise ListError(
                f"{other} and {video.path} would both be {video.name} in the output: "
                "name the folder that both are in, or run twice"
            )


def _videos_of(word: str) -> Iterator[tuple[str, str]]:
    """Each video of a word, and the folder its name is relative to."""
    path = Path(word)
    if path.is_dir():
        for video in find_videos(path):
            yield str(video), word
    elif path.suffix.lower() == ".txt" and path.is_file():
        # A path may be of any bytes.
        for line in path.read_text(encoding="utf-8-sig", errors="surrogateescape").split("\n"):
            if line.strip():
                yield os.path.join(path.parent, _without_label(line.strip())), str(path.parent)
    else:
        yield word, "."


def _without_label(line: str) -> str:
    """The path of a line: a number behind the name of a video is its label."""
    head, _, last = line.replace("\t", " ").rpartition(" ")
    has_label = last.isdecimal() and PurePath(head.rstrip()).suffix.lower() in SUFFIXES
    return line[: len(head)].rstrip() if has_label else line


def _name(full: str, base: str) -> str:
    path = PurePath(full)
    return (path.relative_to(base if path.is_relative_to(base) else path.anchor)).as_posix()
