"""Pad to even, concatenate, LayerNorm."""

import torch
import torch.nn.functional as F
from torch import Tensor

from videoswin_kernels.reference.residual_norm import layer_norm


def patch_merging(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, out_dtype: torch.dtype
) -> Tensor:
    height, width = x.shape[2:4]
    if height % 2 or width % 2:
        x = F.pad(x, (0, 0, 0, width % 2, 0, height % 2))
    corners = ((0, 0), (1, 0), (0, 1), (1, 1))
    x = torch.cat([x[:, :, h::2, w::2] for h, w in corners], dim=-1)
    return layer_norm(x, weight, bias, eps).to(out_dtype)
