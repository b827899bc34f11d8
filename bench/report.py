"""What a stage leaves behind: report.txt for the eye, logs.tar.gz, and the rows it continues."""

from __future__ import annotations

import json
import shutil
import tarfile
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from bench.rows import SAME, Rows

HEADER = (
    "card",
    "capability",
    "driver",
    "clocks",
    "python",
    "torch",
    "cuda",
    "triton",
    "commit",
    "sources",
    "date",
)
# The whole is in logs.tar.gz.
END_LINES = 30
MOST_NAMES = 20


class Report(NamedTuple):
    """What a stage has to say.

    Attributes:
        stage: its name.
        ran: a sentence on each thing that ran.
        failures: (name, what it said) of each thing that failed.
        skipped: the reason of each thing that did not run.
        left: what is left to do, in words; empty where nothing is.
        table: the result.
    """

    stage: str
    ran: Sequence[str]
    failures: Sequence[tuple[str, str]]
    skipped: Sequence[str]
    left: str
    table: str

    @property
    def verdict(self) -> str:
        """One line on how it went."""
        words = f"{self.stage}: nothing failed"
        if self.failures:
            names = [name for name, _ in self.failures[:MOST_NAMES]]
            names += ["..."] * (len(self.failures) > MOST_NAMES)
            words = f"{self.stage}: {len(self.failures)} failed: {', '.join(names)}"
        if self.left:
            words += f"; {self.left}: the same command with this rows.jsonl continues"
        return words

    def text(self, header: dict) -> str:
        """The whole report, the table last."""
        lines = [self.verdict, ""]
        lines += [f"{name:<12}{header.get(name)}" for name in HEADER]
        lines += _section("ran", self.ran)
        counted = Counter(self.skipped).most_common()
        lines += _section("skipped", [f"{count} x {why}" for why, count in counted])
        for name, said in self.failures:
            lines += _section(f"failed: {name}", said.rstrip().splitlines()[-END_LINES:])
        return "\n".join([*lines, "", self.table, ""])

    @property
    def status(self) -> int:
        """The exit status: 1 where something failed, 3 where something is left, else 0."""
        return 1 if self.failures else 3 if self.left else 0


def _section(title: str, lines: Iterable[str]) -> list[str]:
    lines = [f"  {line}" for line in lines]
    return ["", title, *lines] if lines else []


def pack(output: Path, logs: Path) -> None:
    """Moves the logs into logs.tar.gz."""
    with tarfile.open(output / "logs.tar.gz", "w:gz") as archive:
        archive.add(logs, arcname=logs.name)
    shutil.rmtree(logs)


def latest(rows: Rows, key: dict) -> list[dict]:
    """The rows with these items that the last run to write any wrote, on this machine and code."""
    found = []
    if rows.path is not None and rows.path.exists():
        found = map(json.loads, rows.path.read_text(encoding="utf-8").splitlines())
    items = {**{name: rows.header.get(name) for name in SAME}, **key}
    found = [row for row in found if all(row.get(name) == item for name, item in items.items())]
    return [row for row in found if row["date"] == found[-1]["date"]]


def tabulate(rows: Iterable[dict], columns: Sequence[str]) -> str:
    """The rows as `Rows.table` writes them."""
    table = Rows(None, {})
    for row in rows:
        table.append(row)
    return table.table(columns)
