"""Attention backward: the launcher of csrc/cpu/attention_backward.cpp."""

from __future__ import annotations

from torch import Tensor

from videoswin_kernels.cpu._launch import library
from videoswin_kernels.ops._vectors import WindowVectors
from videoswin_kernels.ops.attention import give_to_values


def launch_window_attention_backward(
    grad_qkv: Tensor,
    grad_table: Tensor,
    grad_pad: Tensor,
    grad_out: Tensor,
    qkv: Tensor,
    bias_table: Tensor,
    pad_qkv: Tensor | None,
    out: Tensor,
    log_sum_exp: Tensor,
    num_heads: int,
    scale: float,
    needs_qkv: bool,
    needs_table: bool,
    needs_pad: bool,
    vectors: WindowVectors,
) -> None:
    operators = library("window_attention_backward")
    if vectors.tokens_per_window == 1:
        give_to_values(grad_qkv, grad_table, grad_pad, grad_out)
        return
    operators.attention_backward(
        *(grad_qkv, grad_table, grad_pad, grad_out, qkv, bias_table, pad_qkv, log_sum_exp),
        *(vectors.source, vectors.region, vectors.mixed, vectors.code),
        *(num_heads, vectors.offset, scale),
    )
