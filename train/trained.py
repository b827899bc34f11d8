"""A trained model and what its videos are to be made of, from whatever it was saved as."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model import VideoSwin, create, load_weights
from model.weights.catalogue import CATALOGUE
from model.weights.download import locate, read
from model.weights.files import WeightsError, read_file
from model.weights.formats import recognise
from train.checkpoint import KEYS, CheckpointError, load_checkpoint, restore_weights
from train.lists import read_class_names
from train.recipe import Recipe, build_model, recipe_of
from train.recipes import RECIPES

_HEAD = "cls_head.fc_cls.weight"


@dataclass(frozen=True)
class Published:
    """What a released model was published with.

    Attributes:
        weights: their name in the catalogue, of the variant that the recipe of this name has.
        top1, top5: in percent, as printed.
        source: who printed them.
    """

    weights: str
    top1: float
    top5: float
    source: str = "upstream's README"


# By the recipe they were trained and are tested with.
PUBLISHED: dict[str, Published] = {
    "swin_t_k400_1k": Published("k400", 78.8, 93.6),
    "swin_s_k400_1k": Published("k400", 80.6, 94.5),
    "swin_b_k400_1k": Published("k400", 80.6, 94.6),
    "swin_b_k400_22k": Published("k400_22k", 82.7, 95.5),
    "swin_b_k600_22k": Published("k600_22k", 84.0, 96.5),
    "swin_b_w1677_sthv2": Published("ssv2", 69.6, 92.7),
    "swin_l_k400_22k": Published("k400_22k", 83.46, 95.91, "mmaction2's model zoo"),
}


@dataclass(frozen=True)
class Trained:
    """A trained model in eval mode on its device, its recipe, and the names of its classes.

    Attributes:
        has_names: whether the file named the classes; numbers stand for them otherwise.
    """

    model: VideoSwin
    recipe: Recipe
    classes: list[str]
    has_names: bool = True

    def named(self, names: list[str] | None, where: str | Path) -> Trained:
        """The same with the class names of `where`; None leaves what there is.

        Raises:
            CheckpointError: they are others than the file's, or not as many as it has classes.
        """
        if names is None or names == self.classes:
            return self
        if self.has_names:
            raise CheckpointError(f"{where}: these are not the class names that were trained")
        if len(names) != len(self.classes):
            raise CheckpointError(
                f"{where}: has {len(names)} class names, the model {len(self.classes)} classes"
            )
        return replace(self, classes=names, has_names=True)


def load_trained(
    source: str | Path, kernels: str, device: torch.device, recipe: str | None = None
) -> Trained:
    """The model of a file.

    Args:
        source: a checkpoint of `python -m train`; or weights of any format that `load_weights`
            knows, as a file, a URL, or a name of the catalogue.
        kernels: which implementation runs the operators.
        device: where the model shall be.
        recipe: of weights, which have none with them, a name of `RECIPES`.

    Raises:
        CheckpointError: it cannot be read, holds another model, or is of weights without a recipe.
        WeightsError: weights cannot be had, read or used.
    """
    if recipe is None:
        state = _checkpoint(source)
        own, classes = recipe_of(state, source), state["classes"]
        try:
            model = build_model(own.model, len(classes), kernels)
        except ValueError as error:
            raise CheckpointError(f"cannot load {source}: {error}") from error
        restore_weights(model, state["model"], Path(source))
        return Trained(model.to(device).eval(), own, classes)
    own = RECIPES[recipe]
    try:
        located = locate(own.model.name, source)
        content = read(located)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    if set(content) >= KEYS:
        raise CheckpointError(f"{source} has a recipe of its own: leave out --recipe {recipe}")
    head = recognise(content, f"load_weights: {located}").state.get(_HEAD)
    if not isinstance(head, Tensor) or head.ndim != 2:
        raise WeightsError(f"load_weights: {located} has no classifier of videos")
    model = create(own.model.name, num_classes=len(head), kernels=kernels)
    load_weights(model, content)
    numbers = [f"class {label}" for label in range(len(head))]
    return Trained(model.to(device).eval(), own, numbers, has_names=False)


def _checkpoint(source: str | Path) -> dict[str, Any]:
    """The state in a checkpoint of a run; CheckpointError, which says so of weights."""
    try:
        return load_checkpoint(source)
    except CheckpointError as error:
        if not _is_weights(source):
            raise
        raise CheckpointError(
            f"cannot load {source}: expected a file written by `python -m train`; "
            "weights need --recipe NAME"
        ) from error


def _is_weights(source: str | Path) -> bool:
    """Whether this is a URL, a name of the catalogue, or a file of weights without a recipe."""
    if not Path(source).exists():
        return "://" in str(source) or any(str(source) in names for names in CATALOGUE.values())
    try:
        content = read_file(source)
        recognise(content, "")
    except WeightsError:
        return False
    return "recipe" not in content


def names_of(path: Path) -> list[str] | None:
    """The class names of a file, None if there is no such file; raises ListError."""
    return read_class_names(path) if path.is_file() else None
