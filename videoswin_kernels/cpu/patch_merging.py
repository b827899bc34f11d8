"""Patch merging: the launchers of csrc/cpu/patch_merging.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from videoswin_kernels.cpu._launch import library


def launch_patch_merging(
    out: Tensor,
    mean: Tensor,
    rstd: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dtype: torch.dtype,
    index: Tensor,
) -> None:
    library("patch_merging").patch_merging(out, mean, rstd, x, index, weight, bias, eps)


def launch_patch_merging_backward(
    grad_x: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor,
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    needs_x: bool,
    needs_affine: bool,
    index: Tensor,
) -> None:
    library("patch_merging").patch_merging_backward(
        grad_x, grad_weight, grad_bias, grad, x, index, weight, mean, rstd
    )
