"""Residual and norm: the launchers of csrc/cpu/residual_norm.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from videoswin_kernels.cpu._launch import library


def launch_residual_norm(
    total: Tensor,
    norm: Tensor,
    mean: Tensor,
    rstd: Tensor,
    x: Tensor,
    branch: Tensor,
    weight: Tensor,
    bias: Tensor,
    branch_scale: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> None:
    library("residual_norm").residual_norm(
        total, norm, mean, rstd, x, branch, weight, bias, branch_scale, eps
    )


def launch_residual_norm_backward(
    grad_x: Tensor,
    grad_branch: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor,
    grad_total: Tensor | None,
    grad_norm: Tensor | None,
    total: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    branch_scale: Tensor | None,
    branch_dtype: torch.dtype,
    needs_x: bool,
    needs_branch: bool,
    needs_affine: bool,
) -> None:
    library("residual_norm").residual_norm_backward(
        *(grad_x, grad_branch, grad_weight, grad_bias, grad_total, grad_norm),
        *(total, weight, mean, rstd, branch_scale),
    )
