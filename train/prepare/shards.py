"""The index of tar shards: where in which file the bytes of each video lie.

A shard is read once, and of it the headers alone; training then reads a video in place.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from tqdm import tqdm

from train.lists import SUFFIXES, Listed, ListError, Videos
from train.prepare.found import shown, why_unlistable

# What compressed files begin with: nothing in them can be read in place.
_COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\x00": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
}
_CHUNK = 1 << 20


@dataclass
class Index:
    """What is in a data set's shards.

    Attributes:
        videos: in the order in which they lie there.
        classes: names, by label; None where a list gave the labels.
        duplicates: name, first shard and other shard of a video that occurs again; the first is
            the one in `videos`.
        skipped: member and reason of what is no video to be listed.
        missing: names in the list of labels that no shard has.
    """

    videos: list[Listed] = field(default_factory=list)
    classes: list[str] | None = None
    duplicates: list[tuple[str, str, str]] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)


def build_index(
    root: Path, pattern: str, labels: Videos | None = None, classes: list[str] | None = None
) -> Index:
    """The index of the shards below `root` that match `pattern`, in the order of their names.

    Args:
        root: folder of the data set.
        pattern: a glob relative to it.
        labels: label of each name; without them the first folder of a name is its class.
        classes: names by label that those folders must be among; without them they are sorted.

    Raises:
        ListError: there is no shard, one is no whole uncompressed tar file, no video is in them, or
            a class is none of `classes`.
    """
    paths = sorted(path for path in root.glob(pattern) if path.is_file())
    if not paths:
        raise ListError(f"{root}: no file matches {pattern!r}")
    index, members = Index(), {}
    for path in tqdm(paths, "shards", unit="shard"):
        shard = path.relative_to(root).as_posix()
        if (reason := why_unlistable(shard)) is not None:
            raise ListError(f"{str(path)!a}: {reason}")
        for member in read_members(path):
            name = member.name.removeprefix("./")
            if (reason := _why_no_video(member, name)) is not None:
                index.skipped.append((f"{shard}:{shown(name)}", reason))
            elif name in members:
                index.duplicates.append((name, members[name].shard, shard))
            else:
                members[name] = Listed(name, 0, 0, shard, member.offset_data, member.size)
    if labels is not None:
        wanted = {listed.name.removeprefix("./"): listed.label for listed in labels}
        index.missing = [name for name in wanted if name not in members]
        why_not = "it is not in the list of labels"
    else:
        folders = {name: name.partition("/")[0] for name in members if _why_no_class(name) is None}
        index.classes = sorted(set(folders.values())) if classes is None else classes
        numbers = {name: label for label, name in enumerate(index.classes)}
        for name, folder in folders.items():
            if folder not in numbers:
                raise ListError(
                    f"{members[name].shard}:{name}: its folder is none of the {len(numbers)} "
                    f"classes in classes.txt; remove that file to number them anew"
                )
        wanted = {name: numbers[folder] for name, folder in folders.items()}
        why_not = None
    for name, listed in members.items():
        if name in wanted:
            index.videos.append(listed._replace(label=wanted[name]))
        else:
            index.skipped.append((f"{listed.shard}:{name}", why_not or _why_no_class(name)))
    if not index.videos:
        reasons = sorted({reason for _, reason in index.skipped}) or ["they are empty"]
        raise ListError(f"{root}: no video of {len(paths)} shards is listed: {'; '.join(reasons)}")
    return index


def read_members(path: Path) -> Iterator[tarfile.TarInfo]:
    """The members of a tar file in order, of whose data nothing is read.

    Raises:
        ListError: it is compressed, no tar file, or not whole.
    """
    with open(path, "rb") as file:
        head = file.read(6)
        kind = next((name for magic, name in _COMPRESSED.items() if head.startswith(magic)), None)
        if kind is not None:
            raise ListError(
                f"{path}: compressed with {kind}, and no video in it can be read in place: "
                f"uncompress it"
            )
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        try:
            with tarfile.open(fileobj=file, mode="r:") as archive:
                for member in archive:
                    # A file with holes is shorter in there.
                    is_plain = member.isreg() and not member.issparse()
                    end = member.offset_data + (member.size if is_plain else 0)
                    if end > size:
                        raise ListError(
                            f"{path}: cut short, {member.name} ends at byte {end} of {size}"
                        )
                    yield member
                    # It keeps all of them, and a shard may have a million.
                    archive.members.clear()
                end = archive.offset
        except tarfile.TarError as error:
            raise ListError(f"{path}: not a whole tar file, {error}") from None
        if size - end < tarfile.BLOCKSIZE:
            raise ListError(f"{path}: cut short, there is no block of zeros at its end, byte {end}")
        file.seek(end)
        while chunk := file.read(_CHUNK):
            if chunk.count(0) < len(chunk):
                raise ListError(
                    f"{path}: there are data after its end, at byte {end}: it is damaged, or "
                    f"several tar files joined, to be unpacked and packed as one"
                )


def _why_no_video(member: tarfile.TarInfo, name: str) -> str | None:
    if member.isdir():
        return "it is a folder"
    if not member.isreg() or member.issparse():
        return "it is no plain file"
    base = PurePosixPath(name).name
    if base.startswith("."):
        return "it is hidden"
    if PurePosixPath(base).suffix.lower() not in SUFFIXES:
        return "it is no video by its suffix"
    if not member.size:
        return "it is empty"
    return why_unlistable(name)


def _why_no_class(name: str) -> str | None:
    """Why the first folder of a name is no class, None if it is one."""
    folder = name.partition("/")[0]
    if not folder:
        return "its name begins with a slash"
    if folder == name:
        return "it is not in the folder of a class"
    return None if why_unlistable(folder) is None else f"of its folder: {why_unlistable(folder)}"


def write_lines(videos: list[Listed]) -> str:
    """The text of an index."""
    return "".join(
        f"{each.name}\t{each.shard}\t{each.offset}\t{each.size}\t{each.label}\n" for each in videos
    )
