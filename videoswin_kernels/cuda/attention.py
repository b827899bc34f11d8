"""Attention forward: the launcher of csrc/cuda/attention_canonical.cu and attention_forward.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from videoswin_kernels.cuda._launch import library
from videoswin_kernels.ops._vectors import WindowVectors


def empty_tables(bias_table: Tensor, reach: int) -> Tensor:
    """Memory for each head's rows of the table that a call can read: float32 [heads, rows].

    `reach` is the largest code of a place. Rows are whole vectors of 4.
    """
    rows = -(-(2 * reach + 1) // 4) * 4
    return torch.empty((bias_table.shape[1], rows), dtype=torch.float32, device=bias_table.device)


def launch_window_attention(
    out: Tensor,
    log_sum_exp: Tensor,
    qkv: Tensor,
    bias_table: Tensor,
    pad_qkv: Tensor | None,
    num_heads: int,
    scale: float,
    vectors: WindowVectors,
) -> None:
    reach = len(vectors.place) - 1
    library("window_attention", qkv).attention(
        *(out, log_sum_exp, empty_tables(bias_table, reach), qkv, bias_table, pad_qkv),
        *(vectors.source, vectors.region, vectors.mixed, vectors.code),
        *(num_heads, vectors.offset, reach, vectors.canonical_depth, scale),
    )
