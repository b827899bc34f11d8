"""Recipes: everything that decides a run, as frozen data."""

from __future__ import annotations

import argparse
import json
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import torch
import tyro

from model import VideoSwin, create
from train.checkpoint import CheckpointError
from train.data import DataSettings
from train.optim import OptimSettings
from videoswin_kernels.selection import WORDS


@dataclass(frozen=True)
class ModelSettings:
    """The model and what regularises it.

    Attributes:
        name: a name of `model.create`.
        drop_path_rate: stochastic depth of the last block.
        dropout: dropout before the classifier.
        init_std: standard deviation of the initial weights of the backbone's Linears.
        frozen_stages: -1 none; 0 the patch embedding; k also the first k stages.
        use_checkpoint: recompute blocks in the backward pass to save memory.
    """

    name: str = "swin_t"
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
        batch_size: clips per step.
        test_batch_size: videos per step of testing.
        evaluate_every: epochs between tests; the last epoch is always tested.
        report_every: steps between lines of metrics.jsonl.
        checkpoint_every: steps between checkpoints, beside the one after each epoch; 0 = none.
        seed: of the initial weights and of every random choice.
    """

    epochs: int = 30
    batch_size: int = 8
    test_batch_size: int = 1
    evaluate_every: int = 5
    report_every: int = 20
    checkpoint_every: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "test_batch_size", "evaluate_every", "report_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"loop.{name} must be at least 1, got {getattr(self, name)}")
        if self.checkpoint_every < 0:
            raise ValueError(
                f"loop.checkpoint_every must be 0 or more, got {self.checkpoint_every}"
            )
        if not 0 <= self.seed < 2**31:
            raise ValueError(f"loop.seed must be from 0 to 2^31 - 1, got {self.seed}")


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the numbers of a run, and the few `FREE_FIELDS` that do not."""

    model: ModelSettings = field(default_factory=ModelSettings)
    data: DataSettings = field(default_factory=DataSettings)
    optim: OptimSettings = field(default_factory=OptimSettings)
    loop: LoopSettings = field(default_factory=LoopSettings)


RECIPES: dict[str, Recipe] = {
    # From scratch, on a CPU, in minutes: small clips, initial weights that suit a width of 64, and
    # a high rate for the bias tables, through which this model comes to see motion. No flip: it
    # would turn left into right.
    "demo": Recipe(
        model=ModelSettings(name="swin_nano", drop_path_rate=0.0, dropout=0.0, init_std=0.12),
        data=DataSettings(
            root="runs/demo-videos",
            clip_len=8,
            interval=4,
            short_side=36,
            crop=32,
            area=(0.6, 1.0),
            flip=0.0,
            test_clips=1,
            test_crops=1,
            test_short_side=36,
            workers=1,
        ),
        optim=OptimSettings(lr=1e-2, backbone_lr=0.05, warmup_epochs=1),
        loop=LoopSettings(epochs=16, batch_size=16, test_batch_size=32, evaluate_every=4),
    ),
}


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


# Where the files lie, how they are read and how often there is news: a run may go on with others.
FREE_FIELDS = {
    "data.root",
    "data.workers",
    "loop.test_batch_size",
    "loop.evaluate_every",
    "loop.report_every",
    "loop.checkpoint_every",
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
    try:
        torch.empty(0, device=word).tolist()
    except (RuntimeError, AssertionError) as error:
        # AssertionError is what a build of torch without CUDA raises.
        reason = str(error).partition("\n")[0]
        raise argparse.ArgumentTypeError(f"{word!r} cannot be used: {reason}") from None
    return word


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
