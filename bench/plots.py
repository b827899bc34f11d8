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
        rows: those of one table.
        lines: items that name a group of bars.
        provider: the item that names a bar.
        file: the PNG.
        title: above the bars.
    """
    timed = [row for row in rows if row.get("ms") is not None]
    groups = list(dict.fromkeys(tuple(map(str, (row.get(n) for n in lines))) for row in timed))
    providers = list(dict.fromkeys(row[provider] for row in timed))
    height = 0.8 / max(1, len(providers))
    size = (9, 1.2 + 0.16 * len(groups) * (1 + len(providers)))
    figure, axes = plt.subplots(figsize=size, layout="constrained")
    for number, name in enumerate(providers):
        own = [row for row in timed if row[provider] == name]
        places = [groups.index(tuple(map(str, (row.get(n) for n in lines)))) for row in own]
        middle = [row["ms"] for row in own]
        spread = [
            [row["ms"] - row["low"] for row in own],
            [row["high"] - row["ms"] for row in own],
        ]
        at = [place + height * (number - (len(providers) - 1) / 2) for place in places]
        axes.barh(at, middle, height, xerr=spread, label=name, error_kw={"linewidth": 0.8})
    for place, group in enumerate(groups):
        found = [
            row["floor_ms"]
            for row in timed
            if "floor_ms" in row and tuple(map(str, (row.get(n) for n in lines))) == group
        ]
        if found:
            axes.plot([found[0]] * 2, [place - 0.45, place + 0.45], "k--", linewidth=0.8)
    names = [", ".join(part for part in group if part != "None") for group in groups]
    axes.set_yticks(range(len(groups)), names, fontsize=7)
    axes.set_xscale("log")
    axes.invert_yaxis()
    axes.set_xlabel(f"ms, median and 20-80 % spread; dashed: floor ({', '.join(lines)})")
    axes.set_title(title, fontsize=9)
    axes.legend(fontsize=7)
    # Without the date and the version of matplotlib, equal rows give equal files.
    figure.savefig(file, dpi=110, metadata={"Software": None})
    plt.close(figure)
