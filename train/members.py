"""A video inside a tar shard, as the index says, and whether the shard still is as it says."""

from __future__ import annotations

import re
import tarfile
from pathlib import Path

from train.lists import Listed, ListError, Videos
from train.video import Packed, VideoError

# What a tar file is made of: each member's header is one of these, and its data begin after it.
_BLOCK = 512


def member(root: str | Path, listed: Listed) -> Packed:
    """Where a listed video is.

    Raises:
        VideoError: there is no such shard, or the member is not where the index says.
    """
    path = Path(root, listed.shard)
    where = f"{path}:{listed.name}"
    try:
        with open(path, "rb") as file:
            file.seek(max(listed.offset - _BLOCK, 0))
            found = file.read(_BLOCK) if listed.offset >= _BLOCK else b""
            header = tarfile.TarInfo.frombuf(found, "utf-8", "surrogateescape")
    except OSError as error:
        raise VideoError(where, (error.strerror or str(error)).lower()) from None
    except tarfile.HeaderError:
        header = None
    if header is None or header.size != listed.size or not _is_name(header.name, listed.name):
        reason = "it is not where the index says, which is older than the shard: make it again"
        raise VideoError(where, reason)
    return Packed(str(path), listed.name, listed.offset, listed.size)


def _is_name(short: str, name: str) -> bool:
    """Whether a header's name is a name, as far as a header can have it.

    Longer ones than 100 bytes and, in some formats, what is not ASCII stand in a member before.
    """
    if name.isascii() and len(name) <= 100:
        return short == name
    return short.startswith(re.match(r"[\x20-\x7e]*", name)[0][:90])


def check_shards(root: str | Path, videos: Videos, index: str) -> None:
    """ListError if the first or last listed video of a shard is not where the index says."""
    for listed in videos.ends_of_shards():
        try:
            member(root, listed)
        except VideoError as error:
            raise ListError(f"{Path(root, index)}: {error}") from None
