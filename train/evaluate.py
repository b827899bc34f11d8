"""`python -m train.evaluate --checkpoint C`: a trained model on the test videos of its recipe."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from model import VideoSwin
from train.allocator import set_allocator
from train.checkpoint import CheckpointError, load_checkpoint, restore_weights
from train.data import (
    FRAME_ORDERS,
    Broken,
    DataSettings,
    ListError,
    VideoDataset,
    broken_summary,
    build_loader,
    ordered_batches,
    read_class_names,
    read_list,
)
from train.metrics import mean_class_accuracy, top_k_accuracy, video_scores
from train.parallel import Group
from train.prefetch import WorkerError, steady
from train.recipe import (
    Recipe,
    add_machine_options,
    build_model,
    differences,
    recipe_of,
    resolve_recipe,
)
from train.synthetic import CLASSES, OPPOSITE
from train.transforms import normalize
from videoswin_kernels.selection import UnavailableError


@dataclass(frozen=True)
class Evaluation:
    """What a model made of a set of videos; those that could not be read are not in the scores.

    Attributes:
        scores: float32 [videos, classes], probabilities averaged over views.
        labels: int64 [videos].
        broken: the videos that could not be read.
    """

    scores: Tensor
    labels: Tensor
    broken: list[Broken]

    @property
    def top1(self) -> float:
        """Share of videos predicted right, 0 to 1; NaN without any video."""
        return top_k_accuracy(self.scores, self.labels, 1)

    def numbers(self) -> dict[str, float]:
        """Accuracies from 0 to 1, and how many videos they are over."""
        return {
            "top1": self.top1,
            "top5": top_k_accuracy(self.scores, self.labels, 5),
            "mean_class": mean_class_accuracy(self.scores.argmax(dim=1), self.labels),
            "videos": len(self.labels),
            "broken": len(self.broken),
        }

    def __str__(self) -> str:
        numbers = self.numbers()
        text = ", ".join(f"{name} {numbers[name]:.2%}" for name in ("top1", "top5", "mean_class"))
        unread = f", {len(self.broken)} could not be read" if self.broken else ""
        return f"{text} on {len(self.labels)} videos{unread}"


# Not inference mode: a model in parts gathers parameters here that training goes on with.
@torch.no_grad()
def evaluate(
    model: nn.Module,
    dataset: VideoDataset,
    batch_size: int,
    device: torch.device,
    group: Group | None = None,
    stops: Callable[[], bool] | None = None,
) -> Evaluation | None:
    """The model, in eval mode, on each video of `dataset` once, in the order of the list.

    Of a `group` each process takes every so many-th batch, and all have the whole result. `stops`
    is asked after each batch, and where it says so there is none.

    Raises:
        WorkerError: data workers die again and again.
    """
    model.eval()
    group = group or Group(device)
    batches = ordered_batches(len(dataset), batch_size)
    own, found = batches[group.rank :: group.world], []
    read = steady(lambda: build_loader(dataset, own[len(found) :], device), device)
    # A model in parts computes with all processes or with none.
    for _ in range(-(-len(batches) // group.world)):
        batch = next(read, None)
        scores = torch.empty(0, 1)
        if batch is not None and len(batch.labels):
            scores = video_scores(model(normalize(batch.clips.to(device)))).cpu()
        elif group.world > 1:
            model(normalize(_black_clip(dataset.settings).to(device)))
        if batch is not None:
            found.append((scores, batch.labels.cpu(), batch.broken))
        if stops and stops():
            return None
    shares = group.gather(found)
    parts = [shares[n % group.world][n // group.world] for n in range(len(batches))]
    some = [(scores, labels) for scores, labels, _ in parts if len(labels)]
    broken = [each for _, _, unread in parts for each in unread]
    if not some:
        return Evaluation(torch.empty(0, 1), torch.empty(0, dtype=torch.int64), broken)
    scores, labels = zip(*some, strict=True)
    return Evaluation(torch.cat(scores), torch.cat(labels), broken)


def _black_clip(settings: DataSettings) -> Tensor:
    """uint8 [1, 3, T, H, W] of zeros."""
    return torch.zeros(1, 3, settings.clip_len, settings.crop, settings.crop, dtype=torch.uint8)


def load_trained(
    path: str | Path, kernels: str, device: torch.device
) -> tuple[VideoSwin, Recipe, list[str]]:
    """The model of a checkpoint in eval mode, its recipe, and its class names.

    Raises:
        CheckpointError: `path` cannot be read, was not written by `python -m train`, or
            holds another model.
    """
    state = load_checkpoint(path)
    recipe, classes = recipe_of(state, path), state["classes"]
    try:
        model = build_model(recipe.model, len(classes), kernels)
    except ValueError as error:
        raise CheckpointError(f"cannot load {path}: {error}") from error
    restore_weights(model, state["model"], Path(path))
    return model.to(device).eval(), recipe, classes


# What `python -m train.evaluate` lets one set.
TEST_FIELDS = ("data.", "loop.test_batch_size")


def print_frame_orders(results: dict[str, Evaluation], opposite: tuple[int, ...] | None) -> None:
    """A table of the top-1 of each order of the frames, and how often the opposite class wins."""
    print(f"\n{'frames':<20}{'top-1':>8}{'opposite class' if opposite else '':>18}")
    for order, result in results.items():
        line = f"{order:<20}{result.top1:>8.1%}"
        if opposite:
            turned = torch.tensor(opposite)[result.labels]
            line += f"{top_k_accuracy(result.scores, turned, 1):>18.1%}"
        print(line)


def main(arguments: list[str] | None = None) -> int:
    """Evaluate as the command line says; the exit status: 0 done, 1 refused."""
    parser = argparse.ArgumentParser(
        prog="python -m train.evaluate",
        description="Test a trained model: views averaged after the softmax, each video once.",
        epilog="Fields of the checkpoint's recipe that say what is tested, and how many at a "
        "time, can be set: --data.root=DIR --loop.test-batch-size=8 ...",
    )
    parser.add_argument("--checkpoint", required=True, metavar="FILE")
    parser.add_argument(
        "--frame-orders", action="store_true", help="also still, shuffled, reversed"
    )
    add_machine_options(parser)
    options, overrides = parser.parse_known_args(arguments)
    print(set_allocator(options.allocator))
    device = torch.device(options.device)
    try:
        model, recipe, classes = load_trained(options.checkpoint, options.kernels, device)
        trained, recipe = recipe, resolve_recipe(recipe, overrides)
        if deaf := [d for d in differences(trained, recipe) if not d.startswith(TEST_FIELDS)]:
            parser.error(f"{'; '.join(deaf)}: a trained model takes fields of data alone")
        data = recipe.data
        names = Path(data.root, data.class_names)
        if names.is_file() and read_class_names(names) != classes:
            raise ListError(f"{names}: these are not the class names of {options.checkpoint}")
        videos = read_list(Path(data.root, data.test_list), len(classes))
        results = {}
        for order in FRAME_ORDERS if options.frame_orders else ["as filmed"]:
            dataset = VideoDataset(videos, data, frame_order=order)
            results[order] = evaluate(model, dataset, recipe.loop.test_batch_size, device)
    except (CheckpointError, ListError, UnavailableError, WorkerError) as error:
        print(error, file=sys.stderr)
        return 1
    filmed = results["as filmed"]
    if filmed.broken:
        print(broken_summary(filmed.broken))
    if not len(filmed.labels):
        print(f"none of the {len(videos)} test videos could be read", file=sys.stderr)
        return 1
    print(filmed)
    if options.frame_orders:
        print_frame_orders(results, OPPOSITE if tuple(classes) == CLASSES else None)
    return 0


if __name__ == "__main__":
    sys.exit(main())
