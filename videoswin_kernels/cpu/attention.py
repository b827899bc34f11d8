"""Attention forward: the launcher of csrc/cpu/attention_forward.cpp."""

from __future__ import annotations

from torch import Tensor

from videoswin_kernels.cpu._launch import library
from videoswin_kernels.ops._vectors import WindowVectors


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
    library("window_attention").attention(
        *(out, log_sum_exp, qkv, bias_table, pad_qkv),
        *(vectors.source, vectors.region, vectors.mixed, vectors.code),
        *(num_heads, vectors.offset, scale),
    )
