"""Attention backward: the launcher of csrc/cuda/attention_backward.cu and bias_gradient.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from videoswin_kernels.cuda._launch import PARTS, library
from videoswin_kernels.cuda.attention import empty_tables
from videoswin_kernels.ops._vectors import WindowVectors
from videoswin_kernels.ops.attention import give_to_values

# Of all windows, each with a [heads, N, N] of its own: blocks for twice as many multiprocessors.
BIAS_PARTS = 2


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
    operators = library("window_attention_backward", qkv)
    if vectors.tokens_per_window == 1:
        give_to_values(grad_qkv, grad_table, grad_pad, grad_out)
        return
    windows, tokens = len(qkv) * vectors.num_windows, vectors.tokens_per_window
    reach, has_pads = len(vectors.place) - 1, needs_pad and vectors.has_padding
    # Keys are owned in tiles of 64, of which a window that is smaller has one.
    tiles = -(-tokens // 64)
    # Pads of all windows have one gradient, of which few partial sums shall remain.
    parts = max(1, min(windows, PARTS // tiles)) if has_pads else windows
    operators.attention_backward(
        *(grad_qkv, grad_table, grad_pad, empty_tables(bias_table, reach)),
        *(torch.empty_like(log_sum_exp), torch.empty_like(log_sum_exp)),
        log_sum_exp.new_empty((min(BIAS_PARTS, windows) * needs_table, num_heads, tokens, tokens)),
        log_sum_exp.new_empty((parts * tiles * has_pads, 2, out.shape[-1])),
        *(grad_out, qkv, bias_table, pad_qkv, out, log_sum_exp),
        *(vectors.source, vectors.region, vectors.mixed, vectors.code, vectors.place),
        *(num_heads, vectors.offset, reach, parts, scale),
    )
    if needs_pad:
        # Pads give no queries; those of no grid have no gradient at all.
        grad_pad[: out.shape[-1] if has_pads else None] = 0
