"""What a test came to, for people and programs: a table, JSON, a CSV, a picture of the mistakes."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from model.weights.files import write_atomically
from train.partial import write_text
from train.trained import Published

if TYPE_CHECKING:
    from train.evaluate import Evaluation


def confusion_matrix(predicted: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """How many videos of each class (row) were taken for each (column), int64 [rows, columns]."""
    pairs = labels * num_classes + predicted
    return torch.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)


def compare(result: Evaluation, published: Published) -> str:
    """A table of ours beside the published accuracies, in percent."""
    numbers = result.numbers()
    lines = [f"{'':<8}{'here':>8}{'published':>11}{'difference':>12}"]
    for name, theirs in (("top1", published.top1), ("top5", published.top5)):
        ours = 100 * numbers[name]
        lines.append(f"{name:<8}{ours:>8.2f}{theirs:>11.2f}{ours - theirs:>+12.2f}")
    return "\n".join([*lines, f"published: {published.source}"])


def write_results(
    folder: Path, result: Evaluation, classes: Sequence[str], notes: dict[str, Any]
) -> None:
    """Writes evaluation.json, predictions.csv and confusion.png into `folder`; raises OSError."""
    broken = [{"video": video.path, "reason": video.reason} for video in result.broken]
    text = json.dumps({**notes, **result.numbers(), "unreadable": broken}, indent=2) + "\n"
    write_text(folder / "evaluation.json", text)
    write_text(folder / "predictions.csv", predictions(result, classes))
    counts = confusion_matrix(result.scores.argmax(dim=1), result.labels, len(classes))
    draw_confusion(counts, classes, folder / "confusion.png")


def predictions(result: Evaluation, classes: Sequence[str]) -> str:
    """A line of CSV a video: its name, class, the likeliest five, and their probabilities."""
    count = min(5, len(classes))
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    columns = [f"{kind}{rank}" for rank in range(1, count + 1) for kind in ("top", "probability")]
    writer.writerow(["video", "class", *columns])
    best = result.scores.topk(count, dim=1)
    columns = (result.labels, best.values, best.indices)
    rows = zip(result.names, *(each.tolist() for each in columns), strict=True)
    for name, label, scores, found in rows:
        pairs = zip(found, scores, strict=True)
        cells = [cell for one, score in pairs for cell in (classes[one], f"{score:.6f}")]
        writer.writerow([name, classes[label], *cells])
    return file.getvalue()


def draw_confusion(counts: Tensor, classes: Sequence[str], png: Path) -> None:
    """Draws what share of each class was taken for which; up to 60 classes are named."""
    # Imported here: it takes a second that no other use should pay.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shares = counts.double() / counts.sum(dim=1, keepdim=True).clamp_min(1)
    side = 4 + 0.18 * min(len(classes), 60)
    figure = Figure(figsize=(side + 1.5, side), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    image = axes.imshow(shares.numpy(), vmin=0, vmax=1, cmap="magma_r", interpolation="nearest")
    if len(classes) <= 60:
        # What is between two dollars would be taken for a formula.
        places, names = range(len(classes)), [name.replace("$", r"\$") for name in classes]
        axes.set_xticks(places, names, rotation=90, fontsize=7)
        axes.set_yticks(places, names, fontsize=7)
    axes.set_xlabel("predicted")
    axes.set_ylabel("class")
    figure.colorbar(image, label="share of the class's videos")
    temporary = io.BytesIO()
    figure.savefig(temporary, dpi=110, format="png")
    write_atomically(png, lambda file: file.write(temporary.getbuffer()))
