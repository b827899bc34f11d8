"""Bars of medians: a line of a table is a group of bars, a provider has its colour."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt


def plot(rows: Sequence[dict], lines: Sequence[str], provider: str, file: Path, title: str) -> None:
    """Writes a PNG of the rows that have a time, with their 20-80 % spread and their floors.

    Args:
        rows: those of one table, of which one has a time at least.
        lines: items that name a group of bars.
        provider: the item that names a bar.
        file: the PNG.
        title: above the bars.
    """
    timed = [row for row in rows if row.get("ms") is not None]

    def group_of(row: dict) -> tuple[str, ...]:
        return tuple(str(row[name]) for name in lines if row.get(name) is not None)

    groups = list(dict.fromkeys(map(group_of, timed)))
    providers = list(dict.fromkeys(row[provider] for row in timed))
    height = 0.8 / len(providers)
    size = (9, 1.2 + 0.16 * len(groups) * (1 + len(providers)))
    figure, axes = plt.subplots(figsize=size, layout="constrained")
    for number, name in enumerate(providers):
        own = [row for row in timed if row[provider] == name]
        offset = height * (number - (len(providers) - 1) / 2)
        at = [groups.index(group_of(row)) + offset for row in own]
        below = [row["ms"] - row["low"] for row in own]
        above = [row["high"] - row["ms"] for row in own]
        bars = {"xerr": [below, above], "error_kw": {"linewidth": 0.8}}
        axes.barh(at, [row["ms"] for row in own], height, label=name, **bars)
    for row in timed:
        if "floor_ms" in row:
            place = groups.index(group_of(row))
            axes.plot([row["floor_ms"]] * 2, [place - 0.45, place + 0.45], "k--", linewidth=0.8)
    axes.set_yticks(range(len(groups)), [", ".join(group) for group in groups], fontsize=7)
    axes.set_xscale("log")
    axes.invert_yaxis()
    axes.set_xlabel(f"ms, median and 20-80 % spread; dashed: floor ({', '.join(lines)})")
    axes.set_title(title, fontsize=9)
    axes.legend(fontsize=7)
    # Without the date and the version of matplotlib, equal rows give equal files.
    figure.savefig(file, dpi=110, metadata={"Software": None})
    plt.close(figure)
