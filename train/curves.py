"""The curves of a run as one picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def draw_curves(lines: Sequence[dict[str, Any]], png: Path) -> None:
    """Draw loss, accuracy and learning rate over epochs from the lines of metrics.jsonl."""
    # Imported here: it takes a second that no other use of the training code should pay.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    train = [line for line in lines if line["kind"] == "train" and "loss" in line]
    test = [line for line in lines if line["kind"] == "test"]
    figure = Figure(figsize=(12, 3.5), layout="constrained")
    FigureCanvasAgg(figure)
    loss, accuracy, rate = figure.subplots(1, 3)
    loss.plot([line["epoch"] for line in train], [line["loss"] for line in train])
    accuracy.plot(
        [line["epoch"] for line in train], [line["top1"] for line in train], label="train"
    )
    accuracy.plot(
        [line["epoch"] for line in test], [line["top1"] for line in test], "o-", label="test"
    )
    accuracy.set_ylim(0, 1)
    accuracy.legend(loc="lower right")
    rate.plot([line["epoch"] for line in train], [line["lr"] for line in train])
    for axes, title in ((loss, "training loss"), (accuracy, "top-1"), (rate, "learning rate")):
        axes.set_title(title)
        axes.set_xlabel("epoch")
        axes.grid(alpha=0.3)
    figure.savefig(png, dpi=110)
