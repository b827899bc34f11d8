"""`python -m train.evaluate --checkpoint C`: a trained model on the test videos of its recipe."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from model.weights.files import WeightsError
from train.allocator import set_allocator
from train.batches import ordered_batches
from train.checkpoint import CheckpointError
from train.data import FRAME_ORDERS, Broken, VideoDataset, broken_summary, build_loader
from train.lists import ListError
from train.metrics import mean_class_accuracy, top_k_accuracy, video_scores
from train.parallel import DisagreementError, Group, joined
from train.partial import check_writable
from train.precision import PRECISIONS, casting
from train.prefetch import WorkerError, steady
from train.recipe import (
    LoopSettings,
    Recipe,
    add_machine_options,
    differences,
    resolve_recipe,
    to_dict,
)
from train.recipes import RECIPES
from train.results import compare, write_results
from train.synthetic import CLASSES, OPPOSITE
from train.trained import PUBLISHED, Trained, load_trained, names_of
from train.transforms import normalize
from train.video import ReaderError
from videoswin_kernels.selection import UnavailableError


@dataclass(frozen=True)
class Evaluation:
    """What a model made of a set of videos; those that could not be read are not in the scores.

    Attributes:
        scores: float32 [videos, classes], probabilities averaged over views.
        labels: int64 [videos].
        names: those of the videos in the list.
        broken: the videos that could not be read.
    """

    scores: Tensor
    labels: Tensor
    names: list[str]
    broken: list[Broken]

    @property
    def top1(self) -> float:
        """Share of videos predicted right, 0 to 1; NaN without any video."""
        return top_k_accuracy(self.scores, self.labels, 1)

    @property
    def overflowed(self) -> list[str]:
        """The videos whose scores are no finite numbers; they count as predicted wrong."""
        finite = self.scores.isfinite().all(dim=1).tolist()
        return [name for name, is_finite in zip(self.names, finite, strict=True) if not is_finite]

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
        if self.overflowed:
            unread += f", {len(self.overflowed)} have scores that are no finite numbers"
        return f"{text} on {len(self.labels)} videos{unread}"


# Not inference mode: a model in parts gathers parameters here that training goes on with.
@torch.no_grad()
def evaluate(
    model: nn.Module,
    dataset: VideoDataset,
    loop: LoopSettings,
    device: torch.device,
    group: Group | None = None,
    stops: Callable[[], bool] | None = None,
    precision: str = "float32",
) -> Evaluation | None:
    """The model, in eval mode, on each video of `dataset` once, in the order of the list.

    Of a `group` each process takes every so many-th batch, and all have the whole result. `stops`
    is asked after each batch, and where it says so there is none. Upstream tests in float32.

    Raises:
        WorkerError: data workers die again and again.
    """
    model.eval()
    group = group or Group(device)
    batches = ordered_batches(len(dataset), loop.test_batch_size)
    own, found = batches[group.rank :: group.world], []
    read = steady(lambda: build_loader(dataset, own[len(found) :], device), device)
    settings = dataset.settings
    num_views = dataset.views.crops * dataset.num_clips
    for _ in range(-(-len(batches) // group.world)):
        batch = next(read, None)
        scores = torch.empty(0, 1)
        with casting(device, precision):
            if batch is not None and len(batch.labels):
                clips = batch.clips.to(device)
                scores = video_scores(view_logits(model, clips, loop.views_per_pass)).cpu()
            elif group.world > 1:
                # A model in parts computes with all processes, as often as they do, or with none.
                shape = (3, settings.clip_len, settings.crop, settings.crop)
                passes = -(-num_views // (loop.views_per_pass or num_views))
                black = torch.zeros(1, passes, *shape, dtype=torch.uint8, device=device)
                view_logits(model, black, 1)
        if batch is not None:
            found.append((scores, batch.labels.cpu(), batch.names, batch.broken))
        # Else those that are done would wait for the last longer than a process is waited for.
        group.wait()
        if stops and stops():
            return None
    shares = group.gather(found)
    parts = [shares[n % group.world][n // group.world] for n in range(len(batches))]
    some = [(scores, labels) for scores, labels, _, _ in parts if len(labels)]
    names = [name for _, _, read_ones, _ in parts for name in read_ones]
    broken = [each for _, _, _, unread in parts for each in unread]
    if not some:
        return Evaluation(torch.empty(0, 1), torch.empty(0, dtype=torch.int64), names, broken)
    scores, labels = zip(*some, strict=True)
    return Evaluation(torch.cat(scores), torch.cat(labels), names, broken)


def view_logits(model: nn.Module, clips: Tensor, views_per_pass: int) -> Tensor:
    """Logits [B, views, classes] of clips, uint8 [B, views, 3, T, H, W].

    So many views of each video go through the model at a time, 0 all: memory, and no number.
    """
    parts = clips.split(views_per_pass or clips.shape[1], dim=1)
    return torch.cat([model(normalize(part)) for part in parts], dim=1)


def print_frame_orders(results: dict[str, Evaluation], opposite: tuple[int, ...] | None) -> None:
    """A table of the top-1 of each order of the frames, and how often the opposite class wins."""
    print(f"\n{'frames':<20}{'top-1':>8}{'opposite class' if opposite else '':>18}")
    for order, result in results.items():
        line = f"{order:<20}{result.top1:>8.1%}"
        if opposite:
            turned = torch.tensor(opposite)[result.labels]
            line += f"{top_k_accuracy(result.scores, turned, 1):>18.1%}"
        print(line)


# What `python -m train.evaluate` lets one set.
TEST_FIELDS = ("data.", "loop.test_batch_size", "loop.views_per_pass")
REFUSALS = (
    *(CheckpointError, ListError, UnavailableError, WeightsError, WorkerError, ReaderError),
    DisagreementError,
)


def main(arguments: list[str] | None = None) -> int:
    """Evaluate as the command line says; the exit status: 0 done, 1 refused."""
    parser = argparse.ArgumentParser(
        prog="python -m train.evaluate",
        description="Test a trained model: views averaged after the softmax, each video once.",
        epilog="Fields of the recipe that say what is tested, and how much at a time, can be set: "
        "--data.root=DIR --loop.views-per-pass=4 ...",
    )
    add_trained_options(parser)
    parser.add_argument(
        "--published",
        choices=PUBLISHED,
        metavar="NAME",
        help="released weights by the recipe's name, fetched once; prints the published numbers: "
        + ", ".join(PUBLISHED),
    )
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="evaluation.json, predictions.csv, confusion.png"
    )
    parser.add_argument("--precision", choices=PRECISIONS, default="float32")
    parser.add_argument(
        "--frame-orders", action="store_true", help="also still, shuffled, reversed"
    )
    add_machine_options(parser)
    options, overrides = parser.parse_known_args(arguments)
    if (options.checkpoint is None) == (options.published is None):
        parser.error("one of --checkpoint and --published is needed")
    if options.published and options.recipe:
        parser.error("--published is the name of a recipe: leave out --recipe")
    if options.published:
        published = PUBLISHED[options.published]
        options.recipe, options.checkpoint = options.published, published.weights
    allocator = set_allocator(options.allocator)
    try:
        with joined(options.device) as group:
            if group.is_first:
                print(allocator)
            trained = load_trained(
                options.checkpoint, options.kernels, group.device, options.recipe
            )
            recipe = tested_recipe(trained.recipe, overrides, parser)
            return _evaluate(trained, recipe, options, group)
    except REFUSALS as error:
        print(error, file=sys.stderr)
    except OSError as error:
        where = error.filename or options.output
        print(f"{where}: {(error.strerror or str(error)).lower()}", file=sys.stderr)
    return 1


def add_trained_options(parser: argparse.ArgumentParser) -> None:
    """The options that say which trained model."""
    parser.add_argument(
        "--checkpoint", metavar="FILE", help="of a run; or weights of upstream, torchvision, ..."
    )
    parser.add_argument(
        "--recipe",
        choices=RECIPES,
        metavar="NAME",
        help="how videos are read for weights, which have no recipe with them",
    )


def tested_recipe(recipe: Recipe, overrides: list[str], parser: argparse.ArgumentParser) -> Recipe:
    """The recipe with overrides of what says how videos are read; others end the program."""
    changed = resolve_recipe(recipe, overrides)
    found = differences(recipe, changed)
    if deaf := [each for each in found if not each.startswith(TEST_FIELDS)]:
        parser.error(f"{'; '.join(deaf)}: a trained model takes fields of data alone")
    return changed


def _evaluate(trained: Trained, recipe: Recipe, options: argparse.Namespace, group: Group) -> int:
    """Tests in this process, of which the first tells; the exit status."""
    data = recipe.data
    path = Path(data.root, data.class_names)
    # What was trained has its own order, in which a folder that lacks a class changes nothing.
    names = names_of(path) if trained.has_names else data.known_class_names()
    trained = trained.named(names, path if path.is_file() else data.root)
    model, classes = trained.model, trained.classes
    videos = data.read(data.test_list, classes)
    group.agree("recipe, class names, test videos", to_dict(recipe), classes, videos.digest)
    if options.output and group.is_first:
        # Hours before there is something to write.
        check_writable(options.output)
    results = {}
    for order in FRAME_ORDERS if options.frame_orders else ["as filmed"]:
        dataset = VideoDataset(videos, data, frame_order=order)
        results[order] = evaluate(
            model, dataset, recipe.loop, group.device, group, precision=options.precision
        )
    filmed = results["as filmed"]
    if not group.is_first:
        return int(not len(filmed.labels))
    if filmed.broken:
        print(broken_summary(filmed.broken))
    if not len(filmed.labels):
        print(f"none of the {len(videos)} test videos could be read", file=sys.stderr)
        return 1
    print(filmed)
    if options.published:
        print(compare(filmed, PUBLISHED[options.published]))
    if options.frame_orders:
        print_frame_orders(results, OPPOSITE if tuple(classes) == CLASSES else None)
    if options.output:
        notes = {
            "checkpoint": str(options.checkpoint),
            "published": options.published,
            "recipe": to_dict(recipe),
            "views": f"{dataset.num_clips} x {dataset.views.crops}",
            "kernels": options.kernels,
            "precision": options.precision,
        }
        if options.frame_orders:
            notes["frame_orders"] = {order: result.top1 for order, result in results.items()}
        write_results(options.output, filmed, classes, notes)
    if filmed.overflowed:
        print(
            f"the scores of {len(filmed.overflowed)} videos are no finite numbers, the first being "
            f"{filmed.overflowed[0]}; --precision float32, or other weights",
            file=sys.stderr,
        )
    return int(bool(filmed.overflowed))


if __name__ == "__main__":
    sys.exit(main())
