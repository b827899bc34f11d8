"""Whole models with the same weights: ours, torchvision's, and torchvision's accelerated."""

from __future__ import annotations

import contextlib
import copy
import importlib
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn import functional as F

from bench.harness import error
from model import create
from model.variants import VARIANTS
from videoswin_kernels import accelerate
from videoswin_kernels.selection import UnavailableError

PROVIDERS = ("reference", "fused", "torchvision", "accelerated")
CLASSES = 400
# What the models compute in: bfloat16 under autocast.
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


# The most that a result may be off by, whatever plain PyTorch is off by.
MOST_ERROR = 0.5
# Of one function: beyond them torch.compile would leave blocks of torchvision's as they are.
MOST_GRAPHS = 256


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
        AbsentError: torchvision is not there.
    """
    torch.manual_seed(0)
    dropping = {"drop_path_rate": 0.0, "dropout": 0.0}
    kernels = "fused" if provider == "fused" else "reference"
    ours = create(name, num_classes=CLASSES, kernels=kernels, **dropping)
    if provider not in ("torchvision", "accelerated"):
        return ours.to(device)
    from model.weights import to_torchvision

    try:
        video = importlib.import_module("torchvision.models.video.swin_transformer")
    except ImportError:
        raise AbsentError("torchvision is not installed") from None
    # Its class, as its functions know three sizes alone.
    sizes = {key: VARIANTS[name][key] for key in ("embed_dim", "depths", "num_heads")}
    # It copies them, as only lists can be.
    patch, window = (list(VARIANTS[name][key]) for key in ("patch_size", "window_size"))
    theirs = video.SwinTransformer3d(patch, **sizes, window_size=window, num_classes=CLASSES)
    theirs.load_state_dict(to_torchvision(ours))
    for module in theirs.modules():
        if type(module).__name__ == "StochasticDepth":
            module.p = 0.0
    if provider == "accelerated":
        accelerate(theirs)
    return theirs.to(device)


def answer(
    model: nn.Module, clips: Tensor, labels: Tensor | None, kinds: Sequence[str] = ()
) -> dict[str, Tensor]:
    """Logits and, if there are labels, the gradients of each kind of parameter in one vector."""
    with torch.set_grad_enabled(labels is not None):
        logits = model(clips)
    if labels is None:
        return {"logits": logits}
    loss = F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels)
    grads = torch.autograd.grad(loss, list(model.parameters()))
    together: dict[str, list[Tensor]] = {}
    # Models of all providers have their parameters in the same order.
    for kind, grad in zip(kinds, grads, strict=True):
        together.setdefault(kind, []).append(grad.flatten())
    gradients = {f"gradients of {kind}": torch.cat(parts) for kind, parts in together.items()}
    return {"logits": logits.detach(), **gradients}


def kinds_of(model: nn.Module) -> list[str]:
    """What each parameter is in its block: "attn.qkv.weight", whatever the block."""
    return [re.sub(r".*\.\d+\.", "", name) for name, _ in model.named_parameters()]


class Judge:
    """What one clip gives in float64, and what plain PyTorch gives in the precision at hand.

    Gradients are judged by kinds of parameters: one that is small would not be seen among all.
    """

    def __init__(
        self,
        reference: nn.Module,
        clips: Tensor,
        labels: Tensor | None,
        precision: str = "float32",
    ) -> None:
        self.clips, self.labels, self.precision = clips[:1], None, precision
        self.eps = torch.finfo(PRECISIONS[precision]).eps
        self.kinds = kinds_of(reference)
        if labels is not None:
            self.labels = labels[:1]
        wide = copy.deepcopy(reference).double()
        self.exact = answer(wide, self.clips.double(), self.labels, self.kinds)
        self.naive = self.errors(reference)

    def errors(self, model: nn.Module) -> dict[str, float]:
        """The error of each result."""
        with mixed(self.clips.device, self.precision):
            got = answer(model, self.clips, self.labels, self.kinds)
        return {name: error(got[name], exact) for name, exact in self.exact.items()}

    def check(self, model: nn.Module) -> dict:
        """The items of a row: the largest error, and what is wrong if something is.

        The budget: twice the error of plain PyTorch, and one rounding.
        """
        errors = self.errors(model)
        return {"error": max(errors.values()), **self._said(errors, 1)}

    def agree(self, model: nn.Module, compiled: nn.Module, clips: Tensor, labels: Tensor) -> dict:
        """What is wrong with a compiled model, beside what it gives uncompiled.

        Called as it will be timed: for inference or, where the judge has labels, for gradients.
        """
        trains = self.labels is not None
        with torch.inference_mode(not trains), mixed(clips.device, self.precision):
            got, own = (
                answer(each, clips, labels if trains else None, self.kinds)
                for each in (compiled, model)
            )
            errors = {name: error(got[name], exact) for name, exact in own.items()}
        # Both may have their own error, and each that of the budget.
        return self._said(errors, 2)

    def _said(self, errors: dict[str, float], times: int) -> dict:
        """The item "wrong" of a row, where something is off by more than so many budgets."""
        wrong = []
        for name, off in errors.items():
            # Where plain PyTorch is off by everything, nobody is right.
            allowed = min(times * (2 * self.naive[name] + self.eps / 2), MOST_ERROR)
            if not off <= allowed:
                wrong.append(f"{name}: off by {off:.1e}, {allowed:.1e} is allowed")
        return {"wrong": "; ".join(wrong)} if wrong else {}


def compiled(
    model: nn.Module, provider: str, judge: Judge, clips: Tensor, labels: Tensor
) -> tuple[nn.Module, dict]:
    """(the model under torch.compile, items of its row), judged as it will be timed.

    Ours is one graph; torchvision's may be several for each block, so their number is told.
    """
    torch._dynamo.config.recompile_limit = MOST_GRAPHS
    before = counters["stats"]["unique_graphs"]
    called = torch.compile(model, dynamic=False, fullgraph=provider != "torchvision")
    items = judge.agree(model, called, clips, labels)
    return called, {**items, "graphs": counters["stats"]["unique_graphs"] - before}


def random_clips(batch: int, clip: Iterable[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Clips as they come out of normalisation, and labels."""
    generator = torch.Generator(device).manual_seed(1)
    clips = torch.randn(batch, *clip, generator=generator, device=device)
    return clips, torch.arange(batch, device=device) % CLASSES
