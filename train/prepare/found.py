"""The videos below a folder, files by their suffix or folders of images; and texts about them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from train.lists import ListError, find_videos

FRAME_NAME = "img_{:05}.jpg"
_IMAGES = frozenset((".jpg", ".jpeg", ".png", ".webp", ".bmp"))


@dataclass
class Found:
    """What is below a folder.

    Attributes:
        frames: images in each folder by its path relative to the root, in order; 0 for a file.
        skipped: path and reason of each that is there and of no use.
    """

    frames: dict[str, int] = field(default_factory=dict)
    skipped: list[tuple[str, str]] = field(default_factory=list)


def survey(root: Path, frame_name: str | None = None) -> Found:
    """The videos below `root`, or with a `frame_name` like "img_{:05}.jpg" its folders of images.

    Hidden ones are left out; links are followed, but not to a folder above.

    Raises:
        ListError: `root` is no folder.
    """
    if not root.is_dir():
        raise ListError(f"{root}: no such folder")
    found = Found()
    for path in find_videos(root) if frame_name is None else _folders_of_images(root, ()):
        name, total = path.relative_to(root).as_posix(), 0
        reason = why_unlistable(name)
        if frame_name is not None and reason is None:
            total, reason = _count(path, frame_name)
        elif reason is None and not path.exists():
            reason = "it is a link that leads nowhere"
        if reason is None:
            found.frames[name] = total
        else:
            found.skipped.append((shown(name), reason))
    return found


def why_unlistable(name: str) -> str | None:
    """Why a path cannot stand in a list, None if it can."""
    if any(separator in name for separator in "\n\r\t"):
        return "its name has a tab or a line break, which no list can hold"
    if name != name.strip():
        return "its name begins or ends with a space, which no list can hold"
    try:
        name.encode()
    except UnicodeEncodeError:
        return "its name is not UTF-8"
    return None


def shown(name: str) -> str:
    """A name as a piece of a line that any terminal and any file can take."""
    return name if why_unlistable(name) is None else ascii(name)


def _folders_of_images(folder: Path, above: tuple[tuple[int, int], ...]) -> Iterator[Path]:
    """The folders that have images in them, sorted."""
    status = os.stat(folder)
    own = (status.st_dev, status.st_ino)
    if own in above:
        return
    below, has_images = [], False
    with os.scandir(folder) as entries:
        for each in entries:
            if each.name.startswith("."):
                continue
            if os.path.splitext(each.name)[1].lower() in _IMAGES:
                has_images = True
            elif os.path.isdir(each.path):
                below.append(each.name)
    if has_images:
        yield folder
    for name in sorted(below):
        yield from _folders_of_images(folder / name, (*above, own))


def _count(folder: Path, frame_name: str) -> tuple[int, str | None]:
    """How many images a folder has, and why that is no use, if it is none."""
    names = {each for each in os.listdir(folder) if Path(each).suffix.lower() in _IMAGES}
    names = {each for each in names if not each.startswith(".")}
    total = 0
    while frame_name.format(total + 1) in names:
        total += 1
    if total == len(names):
        return total, None
    following = frame_name.format(total + 1)
    return total, f"of its {len(names)} images {following} is missing, or named otherwise"
