"""Whole models with the same weights: ours with each kernel set, and torchvision's."""

from __future__ import annotations

import contextlib
import copy
import importlib
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.harness import error
from model import create
from videoswin_kernels.selection import UnavailableError

PROVIDERS = ("reference", "fused", "torchvision")
THEIRS = {"swin_t": "swin3d_t", "swin_s": "swin3d_s", "swin_b": "swin3d_b"}
CLASSES = 400
# What the models compute in: bfloat16 under autocast.
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Preset(NamedTuple):
    """Models, the shape of a clip, and clips at a time."""

    models: tuple[str, ...]
    clip: tuple[int, int, int, int]
    batch: int


PRESETS = {
    "full": Preset(("swin_t", "swin_b"), (3, 32, 224, 224), 8),
    # A CPU's: one clip.
    "clip": Preset(("swin_t",), (3, 32, 224, 224), 1),
    # For the benches' own tests.
    "small": Preset(("swin_nano",), (3, 8, 32, 32), 2),
}


class AbsentError(UnavailableError):
    """A provider that is not here: one sentence."""


def mixed(device: torch.device, precision: str) -> contextlib.AbstractContextManager:
    """The context that the models are called in: autocast, but for float32."""
    if precision == "float32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, PRECISIONS[precision])


def build(name: str, provider: str, device: torch.device) -> nn.Module:
    """A classifier with fresh weights, the same from every provider, that drops nothing.

    Raises:
        AbsentError: torchvision, or its port of this model, is not there.
    """
    torch.manual_seed(0)
    dropping = {"drop_path_rate": 0.0, "dropout": 0.0}
    kernels = "fused" if provider == "fused" else "reference"
    ours = create(name, num_classes=CLASSES, kernels=kernels, **dropping)
    if provider != "torchvision":
        return ours.to(device)
    from model.weights import to_torchvision

    try:
        video = importlib.import_module("torchvision.models.video")
    except ImportError:
        raise AbsentError("torchvision is not installed") from None
    if name not in THEIRS:
        raise AbsentError(f"torchvision has no {name}")
    theirs = getattr(video, THEIRS[name])(num_classes=CLASSES)
    theirs.load_state_dict(to_torchvision(ours))
    for module in theirs.modules():
        if type(module).__name__ == "StochasticDepth":
            module.p = 0.0
    return theirs.to(device)


def answer(model: nn.Module, clips: Tensor, labels: Tensor | None) -> dict[str, Tensor]:
    """Logits and, if there are labels, the gradients of all parameters in one vector."""
    with torch.set_grad_enabled(labels is not None):
        logits = model(clips)
    if labels is None:
        return {"logits": logits}
    loss = F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels)
    grads = torch.autograd.grad(loss, list(model.parameters()))
    # Models of all providers have their parameters in the same order.
    return {"logits": logits.detach(), "gradients": torch.cat([g.flatten() for g in grads])}


class Judge:
    """What one clip gives in float64, and what plain PyTorch gives in the precision at hand."""

    def __init__(
        self,
        reference: nn.Module,
        clips: Tensor,
        labels: Tensor | None,
        precision: str = "float32",
    ) -> None:
        self.clips, self.labels, self.precision = clips[:1], None, precision
        self.eps = torch.finfo(PRECISIONS[precision]).eps
        if labels is not None:
            self.labels = labels[:1]
        wide = copy.deepcopy(reference).double()
        self.exact = answer(wide, self.clips.double(), self.labels)
        self.naive = self.errors(reference)

    def errors(self, model: nn.Module) -> dict[str, float]:
        """The error of each result."""
        with mixed(self.clips.device, self.precision):
            got = answer(model, self.clips, self.labels)
        return {name: error(got[name], exact) for name, exact in self.exact.items()}

    def check(self, model: nn.Module) -> dict:
        """The items of a row: the largest error, and what is wrong if something is.

        The budget: twice the error of plain PyTorch, and one rounding.
        """
        errors, rounding = self.errors(model), self.eps / 2
        allowed = {name: 2 * self.naive[name] + rounding for name in errors}
        wrong = [
            f"{name}: off by {off:.1e}, {allowed[name]:.1e} is allowed"
            for name, off in errors.items()
            if not off <= allowed[name]
        ]
        return {"error": max(errors.values()), **({"wrong": "; ".join(wrong)} if wrong else {})}

    def agree(self, model: nn.Module, compiled: nn.Module, clips: Tensor) -> dict:
        """What is wrong with the logits of a compiled model, beside those it has uncompiled."""
        with torch.no_grad(), mixed(clips.device, self.precision):
            off = error(compiled(clips), model(clips))
        # Both may have their own error, and each that of the budget.
        allowed = 4 * self.naive["logits"] + 2 * self.eps
        if off <= allowed:
            return {}
        return {"wrong": f"compiled logits: off by {off:.1e}, {allowed:.1e} is allowed"}


def random_clips(batch: int, clip: Iterable[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Clips as they come out of normalisation, and labels."""
    generator = torch.Generator(device).manual_seed(1)
    clips = torch.randn(batch, *clip, generator=generator, device=device)
    return clips, torch.arange(batch, device=device) % CLASSES
