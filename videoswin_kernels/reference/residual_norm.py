"""Add, round, LayerNorm."""

import torch
import torch.nn.functional as F
from torch import Tensor


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """LayerNorm over the last axis, computed and returned in at least float32."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return F.layer_norm(x.to(dtype), x.shape[-1:], weight.to(dtype), bias.to(dtype), eps)


def residual_norm(
    x: Tensor,
    branch: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    branch_scale: Tensor | None,
    norm_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(x.dtype, torch.float32)
    branch = branch.to(dtype)
    if branch_scale is not None:
        branch = branch * branch_scale.to(dtype).view(-1, 1, 1, 1, 1)
    total = (x.to(dtype) + branch).to(x.dtype)
    return total, layer_norm(total, weight, bias, eps).to(norm_dtype)
