"""Files that are written whole or not at all, whichever processes write beside each other."""

from __future__ import annotations

import os
from pathlib import Path
from tempfile import TemporaryFile

from model.weights.files import sync_folder


class Partial:
    """A file beside another, which takes the other's name once it is safe on disk.

    It is called NAME.PID.partial by the process's number, so that no two write the same; that of a
    process that was killed is left.
    """

    def __init__(self, path: Path):
        """Open it for the bytes of `path`, whose folder is made; raises OSError."""
        self.final, self.path = path, self.of(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = open(self.path, "wb")  # noqa: SIM115

    @staticmethod
    def of(path: Path) -> Path:
        """What the file beside `path` is called."""
        return path.with_name(f"{path.name}.{os.getpid()}.partial")

    def sync(self) -> None:
        """Makes what was written safe on disk, and closes the file."""
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()

    def rename(self) -> None:
        """Gives it its name."""
        os.replace(self.path, self.final)
        sync_folder(self.final.parent)

    def discard(self) -> None:
        """Deletes it, which makes room on a full disk; nothing where it has its name already."""
        try:
            self.file.close()
        finally:
            self.path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a file, whole or not at all, its bytes that are no UTF-8 as they were."""
    partial = Partial(path)
    try:
        partial.file.write(text.encode(errors="surrogateescape"))
        partial.sync()
        partial.rename()
    finally:
        partial.discard()


def check_writable(folder: Path) -> None:
    """Makes a folder; OSError, with its path, if no file can be written in it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(folder)) from error
