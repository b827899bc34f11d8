"""The optimiser: AdamW with the published parameter groups and learning rates over time."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import cos, inf, pi
from typing import Literal

import torch
from torch import Tensor, nn

# Whose parameter groups: `name_factors` says in what they differ.
Groups = Literal["official", "mmaction2"]


@dataclass(frozen=True)
class OptimSettings:
    """Settings of AdamW and its schedule; the defaults are upstream's for Swin-T on Kinetics-400.

    Attributes:
        lr: base learning rate, for the head and, in the official groups, the bias tables.
        backbone_lr: factor of `lr` for the other parameters of the backbone.
        weight_decay: decoupled weight decay.
        betas: AdamW's averaging factors.
        groups: whose parameter groups, the official ones or mmaction2 1.x's (`name_factors`).
        schedule: the cosine after `warmup_epochs`: "official" stands still within an epoch,
            "cosine" moves at every step.
        warmup_epochs: epochs of linear warm-up.
        warmup_start: factor of the learning rate at the first step.
        clip_norm: longer gradients, of all parameters together, are cut to this; 0 cuts none.
        label_smoothing: share of the target that all classes have in common.
    """

    lr: float = 1e-3
    backbone_lr: float = 0.1
    weight_decay: float = 0.02
    betas: tuple[float, float] = (0.9, 0.999)
    groups: Groups = "official"
    schedule: Literal["official", "cosine"] = "official"
    warmup_epochs: float = 2.5
    warmup_start: float = 0.1
    clip_norm: float = 0.0
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        names = ("lr", "backbone_lr", "weight_decay", "warmup_epochs", "warmup_start", "clip_norm")
        for name in names:
            if not 0 <= getattr(self, name) < inf:
                raise ValueError(f"optim.{name} must be 0 or more, got {getattr(self, name)}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optim.betas must be at least 0 and below 1, got {self.betas}")
        if not 0 <= self.label_smoothing < 1:
            got = self.label_smoothing
            raise ValueError(f"optim.label_smoothing must be at least 0 and below 1, got {got}")


def name_factors(name: str, backbone_lr: float, groups: Groups = "official") -> tuple[float, float]:
    """(factor of the learning rate, factor of the weight decay) of a parameter by its name.

    "official": only the longest key that the name contains counts. So bias tables keep the full
    rate, and the norms of the backbone, which contain "backbone" too, do decay: both are what
    upstream trained. "mmaction2": the factors of all keys that the name contains, multiplied. So
    bias tables have the backbone's rate, and norms do not decay.

    Source: upstream configs (`paramwise_cfg`) with mmcv 1.3.3 `DefaultOptimizerConstructor`;
    mmaction2 1.x `SwinOptimWrapperConstructor`.
    """
    keys = {
        "absolute_pos_embed": (1.0, 0.0),
        "relative_position_bias_table": (1.0, 0.0),
        "norm": (1.0, 0.0),
        "backbone": (backbone_lr, 1.0),
    }
    found = [keys[key] for key in sorted(keys, key=len, reverse=True) if key in name]
    rate, decay = 1.0, 1.0
    for factors in found[:1] if groups == "official" else found:
        rate, decay = rate * factors[0], decay * factors[1]
    return rate, decay


def build_optimizer(model: nn.Module, settings: OptimSettings) -> torch.optim.AdamW:
    """AdamW over the parameters that require grad, one group for each pair of factors.

    Each group keeps its `lr_factor`; `set_learning_rate` multiplies it in. On a GPU it is fused.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            factors = name_factors(name, settings.backbone_lr, settings.groups)
            groups.setdefault(factors, []).append(parameter)
    return torch.optim.AdamW(
        [
            {"params": params, "lr_factor": lr, "weight_decay": settings.weight_decay * decay}
            for (lr, decay), params in groups.items()
        ],
        lr=settings.lr,
        betas=settings.betas,
        fused=True if next(model.parameters()).is_cuda else None,
    )


def clip_gradients(parameters: Iterable[Tensor], limit: float) -> float:
    """The length of all gradients together, which are cut to `limit` if that is not 0.

    Not a finite number where one of them is none; they stay as they are then.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    length = nn.utils.get_total_norm(gradients)
    # Of sharded parameters each process has a part.
    length = length.full_tensor() if hasattr(length, "full_tensor") else length
    number = length.item()
    if limit and limit < number < inf:
        torch._foreach_mul_(gradients, limit / number)
    return number


def learning_rate_factor(
    step: int, steps_per_epoch: int, epochs: int, settings: OptimSettings
) -> float:
    """Factor of the learning rate at a step: a cosine under a linear warm-up.

    The official cosine stands still within an epoch; the warm-up moves at every step, and ends
    where it should: mmcv goes on with its last factor to the end of the epoch where
    `warmup_epochs` times the steps of an epoch is no whole number. mmaction2's is the same but for
    the last step of the warm-up.

    Source: mmcv 1.3.3 `CosineAnnealingLrUpdaterHook` (by_epoch) with linear warm-up by epoch.
    """
    is_stairs = settings.schedule == "official"
    epoch = step // steps_per_epoch if is_stairs else step / steps_per_epoch
    cosine = 0.5 * (1 + cos(pi * epoch / epochs))
    warmup_steps = settings.warmup_epochs * steps_per_epoch
    if step >= warmup_steps:
        return cosine
    start = settings.warmup_start
    return cosine * (start + (1 - start) * step / warmup_steps)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group `lr` times its own factor."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_factor"]
