"""What a recipe is: everything that decides a run, as frozen data; train/recipes.py has them."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, get_type_hints

import torch
import tyro

from model import VideoSwin, create, load_weights
from model.weights.download import locate
from train.checkpoint import CheckpointError
from train.data import DataSettings
from train.optim import OptimSettings
from videoswin_kernels.selection import WORDS


@dataclass(frozen=True)
class ModelSettings:
    """The model and what regularises it.

    Attributes:
        name: a name of `model.create`.
        weights: what a run begins with: a name such as "in1k", a URL or a file, as `model.create`
            takes them; empty draws them.
        fresh: parameters that are drawn where `weights` are given, too: ("cls_head",) for weights
            of other classes.
        drop_path_rate: stochastic depth of the last block.
        dropout: dropout before the classifier.
        init_std: standard deviation of the initial weights of the backbone's Linears.
        frozen_stages: -1 none; 0 the patch embedding; k also the first k stages.
        use_checkpoint: recompute blocks in the backward pass to save memory.
    """

    name: str = "swin_t"
    weights: str = ""
    fresh: tuple[str, ...] = ()
    drop_path_rate: float = 0.1
    dropout: float = 0.5
    init_std: float = 0.02
    frozen_stages: int = -1
    use_checkpoint: bool = False

    def __post_init__(self) -> None:
        for name in ("drop_path_rate", "dropout"):
            if not 0 <= getattr(self, name) < 1:
                value = getattr(self, name)
                raise ValueError(f"model.{name} must be at least 0 and below 1, got {value}")
        if self.init_std <= 0:
            raise ValueError(f"model.init_std must be above 0, got {self.init_std}")


@dataclass(frozen=True)
class LoopSettings:
    """How long, how much at a time, how often.

    Attributes:
        epochs: passes over the training videos.
        batch_size: clips per step, on all processes together.
        clips_per_pass: clips that a process takes through the model at a time; a step has as many
            passes as it needs of them. 0: all of its clips at once.
        precision: dtype that the model is autocast to; float16 has its loss scaled.
        test_batch_size: videos per step of testing.
        views_per_pass: views of each of them that go through the model at a time, 0 all.
        evaluate_every: epochs between tests; the last epoch is always tested.
        report_every: steps between lines of metrics.jsonl.
        checkpoint_every: steps between checkpoints, beside the one after each epoch; 0 = none.
        keep: how many checkpoints are kept, last.pt and those before it.
        most_skipped: steps in a row whose gradients are no finite numbers end the run.
        seed: of the initial weights and of every random choice.
    """

    epochs: int = 30
    batch_size: int = 64
    clips_per_pass: int = 0
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    test_batch_size: int = 1
    views_per_pass: int = 0
    evaluate_every: int = 5
    report_every: int = 20
    checkpoint_every: int = 1000
    keep: int = 2
    most_skipped: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        for name in (
            *("epochs", "batch_size", "test_batch_size", "evaluate_every", "report_every"),
            *("keep", "most_skipped"),
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"loop.{name} must be at least 1, got {getattr(self, name)}")
        for name in ("clips_per_pass", "views_per_pass", "checkpoint_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"loop.{name} must be 0 or more, got {getattr(self, name)}")
        if not 0 <= self.seed < 2**31:
            raise ValueError(f"loop.seed must be from 0 to 2^31 - 1, got {self.seed}")


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the numbers of a run, and the few `FREE_FIELDS` that do not."""

    model: ModelSettings = field(default_factory=ModelSettings)
    data: DataSettings = field(default_factory=DataSettings)
    optim: OptimSettings = field(default_factory=OptimSettings)
    loop: LoopSettings = field(default_factory=LoopSettings)


def resolve_recipe(recipe: Recipe, overrides: Sequence[str]) -> Recipe:
    """`recipe` with command-line overrides such as `--optim.lr=0.01` applied.

    Unknown fields, wrong types and values that the settings refuse end the program with a sentence
    and the nearest valid names.
    """
    return tyro.cli(Recipe, prog="python -m train", default=recipe, args=list(overrides))


def to_dict(recipe: Recipe) -> dict[str, Any]:
    """The recipe as nested dicts, lists, numbers and strings, as JSON would give them back."""
    return json.loads(json.dumps(asdict(recipe)))


def from_dict(values: dict[str, Any], kind: type = Recipe) -> Any:
    """The recipe that `to_dict` made `values` of.

    Raises:
        TypeError: unknown fields.
        ValueError: a value that its settings refuse.
    """
    hints = get_type_hints(kind)
    known = {field.name for field in fields(kind)}
    if unknown := set(values) - known:
        raise TypeError(f"{kind.__name__}: unknown fields {', '.join(sorted(unknown))}")
    return kind(
        **{
            name: from_dict(value, hints[name])
            if is_dataclass(hints[name])
            else tuple(value)
            if isinstance(value, list)
            else value
            for name, value in values.items()
        }
    )


def recipe_of(checkpoint: dict[str, Any], path: str | Path) -> Recipe:
    """The recipe in a checkpoint; CheckpointError if this version has not all of its fields."""
    try:
        return from_dict(checkpoint["recipe"])
    except (TypeError, ValueError) as error:
        reason = f"its recipe is that of another version ({error})"
        raise CheckpointError(f"cannot load {path}: {reason}") from error


# Where the files lie, how they are read, what fits at once and how often there is news: a run may
# go on with others.
FREE_FIELDS = {
    "data.root",
    "data.workers",
    "data.patience",
    "loop.clips_per_pass",
    "loop.test_batch_size",
    "loop.views_per_pass",
    "loop.evaluate_every",
    "loop.report_every",
    "loop.checkpoint_every",
    "loop.keep",
    "loop.most_skipped",
}


def differences(a: Recipe, b: Recipe, ignored: Collection[str] = ()) -> list[str]:
    """The fields in which two recipes differ, but for `ignored` ones, as `part.field: a -> b`."""
    flat = [
        {
            f"{part}.{name}": value
            for part, values in asdict(r).items()
            for name, value in values.items()
        }
        for r in (a, b)
    ]
    return [
        f"{name}: {old!r} -> {flat[1][name]!r}"
        for name, old in flat[0].items()
        if old != flat[1][name] and name not in ignored
    ]


def add_machine_options(parser: argparse.ArgumentParser) -> None:
    """The options that say where and how to run, and change no number but by rounding."""
    has_cuda = torch.cuda.is_available()
    parser.add_argument("--kernels", choices=WORDS, default="auto")
    parser.add_argument(
        "--device", type=_device, default="cuda" if has_cuda else "cpu", metavar="DEVICE"
    )
    parser.add_argument("--allocator", choices=("pooled", "default"), default="pooled")


def _device(word: str) -> str:
    """`word` if tensors that hold something can be made on the device it names."""
    # Of several processes each tries its own GPU: it would leave a context on another.
    own = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if word == "cuda" else word
    try:
        torch.empty(0, device=own).tolist()
    except (RuntimeError, AssertionError) as error:
        # AssertionError is what a build of torch without CUDA raises.
        reason = str(error).partition("\n")[0]
        raise argparse.ArgumentTypeError(f"{word!r} cannot be used: {reason}") from None
    return word


def count(word: str) -> int:
    """`word` as an integer of at least 1, for a command line."""
    if not word.isdecimal() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1, got {word!r}")
    return int(word)


def build_model(settings: ModelSettings, num_classes: int, kernels: str) -> VideoSwin:
    """The classifier that a recipe describes, with fresh weights."""
    model = create(
        settings.name,
        num_classes=num_classes,
        kernels=kernels,
        drop_path_rate=settings.drop_path_rate,
        dropout=settings.dropout,
        frozen_stages=settings.frozen_stages,
        use_checkpoint=settings.use_checkpoint,
    )
    model.backbone.init_weights(settings.init_std)
    return model


def begin_with_weights(model: VideoSwin, settings: ModelSettings) -> str:
    """Gives a model of `build_model` the weights its recipe begins with; a sentence on them.

    Raises:
        ValueError: no such name, or a name for what is to be fresh that the model does not have.
        WeightsError: they cannot be had, read or used.
    """
    if not settings.weights:
        return "weights: drawn"
    load_weights(model, locate(settings.name, settings.weights), fresh=settings.fresh)
    kept = f", but for {', '.join(settings.fresh)}" if settings.fresh else ""
    return f"weights: {settings.weights}{kept}"
