"""Measured rows: JSON lines in a file that an interrupted run continues, and a readable table."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

# A row stands for a new measurement where all of these are the same.
SAME = (
    *("card", "device", "driver", "threads", "allocator"),
    *("commit", "sources", "python", "torch", "cuda", "triton", "interpret"),
)


class Rows:
    """Rows of one machine and commit, each the header's items and its own.

    Args:
        path: the file of JSON lines, made where it is missing; None keeps the rows in memory.
        header: as `bench.harness.header` returns it.
        same: items in which a row of the file must be like the header to be taken.

    Raises:
        ValueError: a line of the file is no JSON object, and it is not a last one cut short.
    """

    def __init__(self, path: str | Path | None, header: dict, same: Sequence[str] = SAME) -> None:
        self.path, self.same = Path(path) if path is not None else None, same
        self.header = json.loads(json.dumps(header))
        self._rows: list[dict] = []
        if self.path is not None and self.path.exists():
            self._rows = [row for row in self._read() if self._is_ours(row)]

    def _read(self) -> list[dict]:
        """All rows of the file, from which a last line cut short is taken away."""
        text = self.path.read_bytes()
        complete, _, rest = text.rpartition(b"\n")
        if rest:
            # A row is written in one piece with its end of line: without it, it was interrupted.
            with self.path.open("r+b") as file:
                file.truncate(len(text) - len(rest))
        rows = []
        for number, line in enumerate(complete.splitlines(), 1):
            try:
                rows.append(dict(json.loads(line)))
            except (ValueError, TypeError):
                raise ValueError(
                    f"{self.path}: line {number} is no row; remove it, or name another file"
                ) from None
        return rows

    def _is_ours(self, row: dict) -> bool:
        return all(row.get(name) == self.header.get(name) for name in self.same)

    def find(self, key: dict) -> dict | None:
        """The last row of this card and commit with all items of `key`; None if there is none.

        A row with the item "failed" is not found: what failed is tried again.
        """
        key = json.loads(json.dumps(key))
        for row in reversed(self._rows):
            if "failed" not in row and all(row.get(k) == v for k, v in key.items()):
                return row
        return None

    def has(self, key: dict) -> bool:
        """Whether `find` finds a row."""
        return self.find(key) is not None

    def append(self, row: dict) -> None:
        """Adds the header and `row` as one line, which is on the disk when this returns."""
        row = json.loads(json.dumps({**self.header, **_finite(row)}))
        self._rows.append(row)
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def table(self, columns: Mapping[str, str] | Sequence[str], where: dict | None = None) -> str:
        """The rows that have all items of `where`, aligned; "-" stands for an item that is missing.

        A row that carries a sentence instead of numbers (its item "reason", "wrong" or "failed")
        shows it from the first item on that it lacks, once; then it is "as above".

        Args:
            columns: names of items; a mapping gives each its heading.
            where: None takes every row that has the first column.
        """
        names = list(columns)
        lines = [list(columns.values()) if isinstance(columns, Mapping) else names]
        for row in self._rows:
            if names[0] in row and all(row.get(k) == v for k, v in (where or {}).items()):
                lines.append(_cells(row, names))
        said = set()
        for cells in lines:
            if len(cells) < len(names) and cells[-1] in said:
                cells[-1] = "as above"
            said.add(cells[-1])
        # A sentence is as long as it is: it ends its line, and no column is as wide.
        full = [cells if len(cells) == len(names) else cells[:-1] for cells in lines]
        widths = [
            max(len(cells[place]) for cells in full if place < len(cells))
            for place in range(len(names))
        ]
        return "\n".join(
            "  ".join(
                cell.ljust(width) for cell, width in zip(cells, widths, strict=False)
            ).rstrip()
            for cells in lines
        )


def _finite(row: dict) -> dict:
    """The row with infinities and NaN as words: JSON has no numbers for them."""
    return {
        name: str(item) if isinstance(item, float) and not math.isfinite(item) else item
        for name, item in row.items()
    }


def _cells(row: dict, names: list[str]) -> list[str]:
    """A row's cells; fewer than there are names, with a sentence last, where it carries one."""
    marked = (f"{word}: {row[word]}" for word in ("wrong", "failed") if word in row)
    sentence = row.get("reason") or next(marked, None)
    cells = []
    for name in names:
        if sentence and row.get(name) is None:
            return [*cells, sentence]
        cells.append(cell(row.get(name)))
    return cells


def cell(item: object) -> str:
    """An item of a row for the eye: three digits of a number, nothing of None."""
    if item is None:
        return "-"
    if isinstance(item, bool):
        return "yes" if item else "no"
    if not isinstance(item, float):
        return str(item)
    if item == 0 or not 1e-3 <= abs(item) < 1e6:
        return f"{item:.2e}" if item else "0"
    return f"{item:.{max(0, 2 - math.floor(math.log10(abs(item))))}f}"
