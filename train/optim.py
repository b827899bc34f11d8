"""The optimiser: AdamW with upstream's parameter groups and learning rate over time."""

from __future__ import annotations

from dataclasses import dataclass
from math import cos, inf, pi

import torch
from torch import nn


@dataclass(frozen=True)
class OptimSettings:
    """Settings of AdamW and its schedule; the defaults are upstream's for Swin-T on Kinetics-400.

    Attributes:
        lr: base learning rate, for the head and the bias tables.
        backbone_lr: factor of `lr` for the other parameters of the backbone.
        weight_decay: decoupled weight decay.
        betas: AdamW's averaging factors.
        warmup_epochs: epochs of linear warm-up.
        warmup_start: factor of the learning rate at the first step.
    """

    lr: float = 1e-3
    backbone_lr: float = 0.1
    weight_decay: float = 0.02
    betas: tuple[float, float] = (0.9, 0.999)
    warmup_epochs: float = 2.5
    warmup_start: float = 0.1

    def __post_init__(self) -> None:
        for name in ("lr", "backbone_lr", "weight_decay", "warmup_epochs", "warmup_start"):
            if not 0 <= getattr(self, name) < inf:
                raise ValueError(f"optim.{name} must be 0 or more, got {getattr(self, name)}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optim.betas must be at least 0 and below 1, got {self.betas}")


def name_factors(name: str, backbone_lr: float) -> tuple[float, float]:
    """(factor of the learning rate, factor of the weight decay) of a parameter by its name.

    Only the longest key that the name contains counts. So bias tables keep the full rate, and the
    norms of the backbone, which contain "backbone" too, do decay: both are what upstream trained.

    Source: upstream configs (`paramwise_cfg`) with mmcv 1.3.3 `DefaultOptimizerConstructor`.
    """
    keys = {
        "absolute_pos_embed": (1.0, 0.0),
        "relative_position_bias_table": (1.0, 0.0),
        "norm": (1.0, 0.0),
        "backbone": (backbone_lr, 1.0),
    }
    for key in sorted(keys, key=len, reverse=True):
        if key in name:
            return keys[key]
    return 1.0, 1.0


def build_optimizer(model: nn.Module, settings: OptimSettings) -> torch.optim.AdamW:
    """AdamW over the parameters that require grad, one group for each pair of factors.

    Each group keeps its `lr_factor`; `set_learning_rate` multiplies it in.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            factors = name_factors(name, settings.backbone_lr)
            groups.setdefault(factors, []).append(parameter)
    return torch.optim.AdamW(
        [
            {"params": params, "lr_factor": lr, "weight_decay": settings.weight_decay * decay}
            for (lr, decay), params in groups.items()
        ],
        lr=settings.lr,
        betas=settings.betas,
    )


def learning_rate_factor(
    step: int, steps_per_epoch: int, epochs: int, settings: OptimSettings
) -> float:
    """Factor of the learning rate at a step: a cosine by whole epochs, under a linear warm-up.

    Within an epoch the cosine stands still; the warm-up moves at every step, and ends where it
    should: mmcv goes on with its last factor to the end of the epoch where `warmup_epochs` times
    the steps of an epoch is no whole number.

    Source: mmcv 1.3.3 `CosineAnnealingLrUpdaterHook` (by_epoch) with linear warm-up by epoch.
    """
    cosine = 0.5 * (1 + cos(pi * (step // steps_per_epoch) / epochs))
    warmup_steps = settings.warmup_epochs * steps_per_epoch
    if step >= warmup_steps:
        return cosine
    start = settings.warmup_start
    return cosine * (start + (1 - start) * step / warmup_steps)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group `lr` times its own factor."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_factor"]
