"""docs/performance.md and its plots, from the rows of bench/results: nothing in it is typed.

`python bench/page.py [--results DIR] [--output FILE]`. Rows of the presets full and clip are taken,
the latest of each place on each machine, with lost ones and those that say why they have no time.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from bench.plots import plot
from bench.rows import cell

ROOT = Path(__file__).resolve().parents[1]
PUBLISHED = ("full", "clip")
MACHINE = ("card", "device", "threads")
STATE = ("allocator", "torch", "cuda", "triton", "driver", "python", "commit")
HEAD = """# Performance

Written by `python bench/page.py` from `bench/results`; [bench/README.md](../bench/README.md) says
how a row is measured. A cell is the median of its repetitions in milliseconds where no other unit
is named, beside the smallest effect that the run could see for it (half the width of the 95 %
interval of its A/A ratio: each provider is entered twice). **Bold** is the best of a line, where
all were measured together and it is ahead by more than is noise. *floor* is the least time for the
bytes, FLOPs and exponentials at the rates of a copy, a product and exponentials in the same run.
"""


class Table(NamedTuple):
    """What a table shows of a bench.

    Attributes:
        bench: that of its rows.
        title: its heading.
        apart: items by which there are tables of their own.
        lines: items that name a line, in the order of columns.
        provider: the item that names a column of numbers.
        value: the item in the cells, with its unit.
        is_more_better: whether the largest of a line is bold, or the smallest.
        has_plot: whether a plot is drawn of it.
    """

    bench: str
    title: str
    apart: tuple[str, ...]
    lines: tuple[str, ...]
    provider: str = "provider"
    value: tuple[str, str] = ("ms", "ms")
    is_more_better: bool = False
    has_plot: bool = True

    @property
    def is_timed(self) -> bool:
        """Whether its numbers are times, of which there is noise."""
        return self.value[0] in ("ms", "clips_per_s")


OF_MODEL = ("precision", "mode")
MODEL_LINES = ("model", "frames", "size", "batch")
TABLES = (
    Table(
        "attention",
        "Window attention",
        ("model", "window", "dtype", "batch"),
        ("stage", "shifted", "direction"),
    ),
    Table(
        "operators",
        "Operators beside attention",
        ("model", "window", "dtype", "batch"),
        ("operator", "stage", "direction"),
    ),
    Table("model", "Whole models, forward", OF_MODEL, MODEL_LINES),
    Table(
        "model",
        "Whole models, forward: what a user waits for one clip",
        OF_MODEL,
        MODEL_LINES[:3],
        value=("latency_ms", "ms"),
        has_plot=False,
    ),
    Table(
        "model",
        "Whole models, forward: memory",
        OF_MODEL,
        MODEL_LINES,
        value=("peak_mb", "MB"),
        has_plot=False,
    ),
    Table(
        "most clips",
        "Clips that fit at once",
        OF_MODEL,
        MODEL_LINES[:3],
        value=("most_clips", "clips"),
        is_more_better=True,
        has_plot=False,
    ),
    Table("step", "Training steps", OF_MODEL, (*MODEL_LINES, "accumulate")),
    Table(
        "step",
        "Training steps: memory",
        OF_MODEL,
        (*MODEL_LINES, "accumulate"),
        value=("peak_mb", "MB"),
        has_plot=False,
    ),
    Table(
        "data",
        "Reading videos",
        (),
        ("video", "batch", "workers"),
        provider="reader",
        value=("clips_per_s", "clips/s"),
        is_more_better=True,
        has_plot=False,
    ),
    Table(
        "lists",
        "Reading lists of videos, to the keys of the first batch",
        (),
        ("lines",),
        provider="layout",
        has_plot=False,
    ),
    Table(
        "lists",
        "Reading lists of videos: most memory of the process, torch with it",
        (),
        ("lines",),
        provider="layout",
        value=("peak_mb", "MB"),
        has_plot=False,
    ),
)


def read(folder: Path) -> list[dict]:
    """The rows that are published, in the order of the files, the latest of each place.

    Raises:
        ValueError: a row of a bench of the page does not say how large its inputs are.
    """
    found: dict[str, dict] = {}
    benches = {table.bench for table in TABLES} | {"ceilings"}
    for path in sorted(folder.glob("*.jsonl")):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            row = json.loads(line)
            if row["bench"] not in benches:
                continue
            if "preset" not in row:
                raise ValueError(f"{path}: line {number} names no preset; measure it again")
            place = place_of(row)
            is_later = place not in found or row["date"] >= found[place]["date"]
            if row["preset"] in PUBLISHED and is_later:
                found[place] = row
    return list(found.values())


def place_of(row: dict) -> str:
    """What two rows have in common of which only the later one counts."""
    tables = [table for table in TABLES if table.bench == row["bench"]]
    names = ["bench", *MACHINE, "allocator", "dtype"]
    names += [name for table in tables[:1] for name in (*table.apart, *table.lines, table.provider)]
    return json.dumps([row.get(name) for name in names])


def split(rows: Iterable[dict], names: Sequence[str]) -> Iterator[tuple[tuple, list[dict]]]:
    """(items, the rows that have them) in the order in which they first occur."""
    groups: dict[str, list[dict]] = {}
    for row in rows:
        groups.setdefault(json.dumps([row.get(name) for name in names]), []).append(row)
    for key, members in groups.items():
        yield tuple(json.loads(key)), members


def shown(name: str, item: object) -> str:
    """An item that names a table or a line, for the eye."""
    if isinstance(item, list):
        return "x".join(map(str, item))
    return f"{cell(item)}" if name not in ("batch", "accumulate") else f"{item}"


def captioned(rows: Sequence[dict]) -> str:
    """What the rows of a table have in common, and what some of them have."""
    parts = []
    for name in STATE:
        items = list(dict.fromkeys(row.get(name) for row in rows))
        if any(items):
            parts.append(f"{name} {', '.join(str(item) for item in items if item)}")
    return "; ".join(parts)


def text_of(row: dict, table: Table, notes: list[str], is_best: bool) -> str:
    """A cell: a number and its noise, or the number of a note that says why there is none."""
    value = row.get(table.value[0])
    if value is None:
        said = row.get("reason") or row.get("wrong") or row.get("failed") or "not measured"
        notes += [said] if said not in notes else []
        return f"[{notes.index(said) + 1}]"
    text = f"**{cell(value)}**" if is_best else cell(value)
    noise = row.get("noise_percent")
    return f"{text} ±{noise:.1f}%" if table.is_timed and noise is not None else text


def best_of(members: Sequence[dict], table: Table) -> dict | None:
    """The row of a line that is ahead of all others, measured together, by more than is noise."""
    name = table.value[0]
    known = [row for row in members if row.get(name) is not None]
    known.sort(key=lambda row: row[name], reverse=table.is_more_better)
    # A run has one date: that of its beginning.
    if len(known) < 2 or len({row["date"] for row in known}) > 1:
        return None
    first, second = known[:2]
    ahead = 100 * abs(second[name] / first[name] - 1)
    if not table.is_timed:
        return first if ahead > 0 else None
    noise = [row["noise_percent"] for row in (first, second)]
    return first if None not in noise and ahead > max(noise) else None


def render(table: Table, rows: Sequence[dict]) -> str:
    """A table in Markdown and the notes under it."""
    columns = list(dict.fromkeys(row[table.provider] for row in rows))
    has_floor = table.value[0] == "ms" and any("floor_ms" in row for row in rows)
    head = [*table.lines, *columns, *(["floor"] if has_floor else [])]
    lines, notes = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"], []
    for items, members in split(rows, table.lines):
        named = {row[table.provider]: row for row in members}
        best = best_of(members, table)
        cells = [shown(name, item) for name, item in zip(table.lines, items, strict=True)]
        for column in columns:
            row = named.get(column)
            cells.append(text_of(row, table, notes, row is best) if row else "")
        if has_floor:
            floors = [row["floor_ms"] for row in members if "floor_ms" in row]
            cells.append(cell(floors[0]) if floors else "")
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", *(f"[{number}] {said}  " for number, said in enumerate(notes, 1))]
    return "\n".join(lines)


def machine_name(row: dict) -> str:
    """The heading of a machine."""
    if row["device"] == "cuda":
        return row["card"]
    return f"{row['card']}, {row['threads']} threads"


def ceilings_of(rows: Sequence[dict]) -> list[str]:
    """A sentence for each dtype on what the machine reached."""
    return [
        f"Ceilings, {row['dtype']}, {row['source']}: copy {row['bytes'] / 1e9:.4g} GB/s, product "
        f"{row['flops'] / 1e9:.4g} GFLOP/s, exponentials {row['exps'] / 1e9:.4g} G/s "
        f"({captioned([row])}).  "
        for row in rows
    ]


def controls(rows: Sequence[dict]) -> str:
    """How often the A/A control found nothing, as it should."""
    ratios = [row["aa_ratio"] for row in rows if row.get("aa_ratio")]
    if not ratios:
        return ""
    contain = sum(low <= 1 <= high for low, high in ratios)
    share = f"{100 * contain / len(ratios):.1f} %"
    return f"The A/A interval contains 1 in {contain} of {len(ratios)} rows ({share})."


def page(rows: Sequence[dict], plots: Path) -> str:
    """The whole page; its plots are written into a folder beside it."""
    parts = [HEAD]
    for number, (_, members) in enumerate(split(rows, MACHINE), 1):
        parts += [f"## {machine_name(members[0])}", controls(members)]
        parts.append("\n".join(ceilings_of([r for r in members if r["bench"] == "ceilings"])))
        for place, table in enumerate(TABLES):
            of_bench = [row for row in members if row["bench"] == table.bench]
            if table.value[0] == "latency_ms":
                of_bench = [row for row in of_bench if row["batch"] == 1]
            for part, (items, chosen) in enumerate(split(of_bench, (*table.apart, "allocator"))):
                named = zip((*table.apart, "allocator"), items, strict=True)
                said = ", ".join(f"{name} {shown(name, item)}" for name, item in named if item)
                parts += [f"### {table.title}: {said}", captioned(chosen), render(table, chosen)]
                if table.has_plot and any("ms" in row for row in chosen):
                    file = plots / f"{number}_{place}_{part}.png"
                    plot(chosen, table.lines, table.provider, file, f"{table.title}: {said}")
                    parts.append(f"![{table.title}: {said}]({plots.name}/{file.name})")
    return "\n\n".join(part.strip() for part in parts if part.strip()) + "\n"


def main(words: Sequence[str] | None = None) -> int:
    """Writes the page and its plots."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "performance.md")
    options = parser.parse_args(words)
    try:
        rows = read(options.results)
    except ValueError as error:
        parser.error(str(error))
    if not rows:
        parser.error(f"--results: {options.results} has no rows of {' or '.join(PUBLISHED)}")
    plots = options.output.with_suffix("")
    plots.mkdir(parents=True, exist_ok=True)
    for old in plots.glob("*.png"):
        old.unlink()
    options.output.write_text(page(rows, plots), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
