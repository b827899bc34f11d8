"""The bias table as a bias for each pair of places, and the gradient of that gathered back.

A gather from the table for each score would cost more than the score, so it is expanded once a
call to [heads, N, N]. For the gradient a program owns a tile of pairs and walks over all windows;
then each row of the table asks every place for the one partner at that relative position, if there
is one. Nothing is sorted, nothing added atomically.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from videoswin_kernels.ops._vectors import WindowVectors
from videoswin_kernels.triton._compiler import blocks, launch, power_of_2
from videoswin_kernels.triton.attention_tiles import (
    exponential,
    load_keys,
    load_queries,
    scores_of,
)


@triton.jit(do_not_specialize=["offset", "tokens"])
def expand_bias_kernel(
    table,
    code,
    bias,
    offset,
    tokens,
    stride,
    num_heads,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
):
    """bias[head, i, j] = table[code[i] - code[j] + offset, head], -inf for j >= N."""
    query = tl.program_id(0)
    key = tl.program_id(1) * BLOCK_KEYS + tl.arange(0, BLOCK_KEYS)
    head = tl.arange(0, BLOCK_HEADS)
    is_head = (head < num_heads)[None, :]
    is_key = key < tokens
    row = tl.load(code + query) - tl.load(code + key, mask=is_key, other=0) + offset
    at = row.to(tl.int64)[:, None] * num_heads + head[None, :]
    value = tl.load(table + at, mask=is_key[:, None] & is_head, other=0).to(tl.float32)
    value = tl.where(is_key[:, None], value, float("-inf"))
    at = (head.to(tl.int64)[None, :] * tokens + query) * stride + key[:, None]
    tl.store(bias + at, value, mask=(key < stride)[:, None] & is_head)


@triton.jit(do_not_specialize=["num_grid", "num_windows", "tokens", "windows_of_all"])
def bias_gradient_kernel(
    grad_out,
    qkv,
    pad_qkv,
    bias,
    log_sum_exp,
    row_sums,
    factors,
    source,
    region,
    mixed,
    grad_bias,
    num_grid,
    num_windows,
    tokens,
    bias_stride,
    num_heads,
    windows_of_all,
    scale,
    HAS_PADS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    PRECISION: tl.constexpr,
    HEAD_WIDTH: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
):
    """grad_bias[head, i, j] = sum over windows of grad_score[i, j], in the order of the windows."""
    head = tl.program_id(2)
    channels = num_heads * HEAD_WIDTH
    channel = head * HEAD_WIDTH + tl.arange(0, HEAD_WIDTH)
    query = tl.program_id(1) * BLOCK_QUERIES + tl.arange(0, BLOCK_QUERIES)
    key = tl.program_id(0) * BLOCK_KEYS + tl.arange(0, BLOCK_KEYS)
    is_query = (query < tokens)[:, None]
    place = head.to(tl.int64) * tokens + query
    pairs = tl.load(bias + place[:, None] * bias_stride + key[None, :], mask=is_query, other=0)
    total = tl.zeros((BLOCK_QUERIES, BLOCK_KEYS), dtype=tl.float32)
    for window_of_all in range(windows_of_all):
        clip = (window_of_all // num_windows).to(tl.int64)
        window = window_of_all % num_windows
        places = source + window * tokens
        regions = region + window * tokens
        is_mixed = tl.load(mixed + window) != 0
        rows = qkv + clip * num_grid * 3 * channels
        grads = grad_out + clip * num_grid * channels
        row = (clip * num_heads + head) * num_grid
        token, q, grad, level = load_queries(
            rows, grads, log_sum_exp + row, places, query, tokens, channels, channel
        )
        row_sum = tl.load(row_sums + row + token, mask=token >= 0, other=0)
        _, k, v = load_keys(rows, pad_qkv, places, key, tokens, channels, channel, HAS_PADS)
        scores = scores_of(
            q, k, pairs, regions, query, key, tokens, is_mixed, scale, HAS_MASK, PRECISION
        )
        weights = exponential(scores, level[:, None])
        weights *= tl.load(factors + row + token, mask=token >= 0, other=0)[:, None]
        grad_weights = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
        total += weights * (grad_weights - row_sum[:, None])

    at = place[:, None] * tokens + key[None, :]
    tl.store(grad_bias + at, total, mask=is_query & (key < tokens)[None, :])


@triton.jit(do_not_specialize=["offset", "tokens", "places", "rows"])
def table_gradient_kernel(
    grad_bias,
    code,
    place,
    grad_table,
    offset,
    tokens,
    places,
    rows,
    num_heads,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """grad_table[r, head] = sum over i of grad_bias[head, i, place[code[i] + offset - r]]."""
    head = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    total = tl.zeros((BLOCK_QUERIES, BLOCK_ROWS), dtype=tl.float32)
    for start in range(0, tokens, BLOCK_QUERIES):
        query = start + tl.arange(0, BLOCK_QUERIES)
        is_query = (query < tokens)[:, None]
        partner = (
            tl.load(code + query, mask=query < tokens, other=0)[:, None] + offset - row[None, :]
        )
        is_place = (partner >= 0) & (partner < places) & is_query
        key = tl.load(place + partner, mask=is_place, other=-1)
        at = (head * tokens + query)[:, None] * tokens + key
        total += tl.load(grad_bias + at, mask=key >= 0, other=0)

    at = row.to(tl.int64) * num_heads + head
    tl.store(grad_table + at, tl.sum(total, axis=0), mask=row < rows)


def expand_bias(bias_table: Tensor, vectors: WindowVectors, block_keys: int) -> Tensor:
    """float32 [heads, N, N to whole tiles of keys], -inf beyond the window."""
    tokens, num_heads = vectors.tokens_per_window, bias_table.shape[1]
    stride = blocks(tokens, block_keys) * block_keys
    shape = (num_heads, tokens, stride)
    bias = torch.empty(shape, dtype=torch.float32, device=bias_table.device)
    block_heads = power_of_2(num_heads)
    block = max(16, 2048 // block_heads)
    launch(
        expand_bias_kernel,
        (tokens, blocks(stride, block)),
        bias_table,
        vectors.code,
        bias,
        vectors.offset,
        tokens,
        stride,
        num_heads,
        BLOCK_KEYS=block,
        BLOCK_HEADS=block_heads,
    )
    return bias


def gather_table_gradient(grad_table: Tensor, grad_bias: Tensor, vectors: WindowVectors) -> None:
    """Fills float32 [rows, heads] from the gradient of each pair's bias, [heads, N, N]."""
    rows, num_heads = grad_table.shape
    block_rows = 64
    launch(
        table_gradient_kernel,
        (blocks(rows, block_rows), num_heads),
        grad_bias,
        vectors.code,
        vectors.place,
        grad_table,
        vectors.offset,
        vectors.tokens_per_window,
        len(vectors.place),
        rows,
        num_heads,
        BLOCK_QUERIES=32,
        BLOCK_ROWS=block_rows,
    )
