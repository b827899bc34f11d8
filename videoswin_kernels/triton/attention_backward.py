"""Three passes over the tiles of a window's scores, each recomputed from the log-sum-exp.

The first program owns queries and sums over keys, the second owns keys and sums over queries, the
third (`bias_table.py`) owns pairs and sums over windows. What each owns it writes once, so nothing
is added atomically, and sums have one order, the same on every run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from videoswin_kernels.ops._vectors import WindowVectors
from videoswin_kernels.ops.attention import give_to_values
from videoswin_kernels.triton._compiler import architecture, blocks, dot_precision, launch
from videoswin_kernels.triton.attention import Configuration, configuration
from videoswin_kernels.triton.attention_tiles import (
    exponential,
    load_keys,
    load_queries,
    place_of,
    scores_of,
)
from videoswin_kernels.triton.bias_table import (
    bias_gradient_kernel,
    expand_bias,
    gather_table_gradient,
)
from videoswin_kernels.triton.column_sums import PARTS, column_sums, empty_partial


def query_configuration(
    architecture: int, dtype: torch.dtype, tokens: int, head_width: int
) -> Configuration:
    """Of the kernel that owns queries: the forward kernel's, with fewer keys in wide heads."""
    chosen = configuration(architecture, dtype, tokens, head_width)
    keys = min(chosen.block_keys, 32) if head_width > 32 else chosen.block_keys
    return chosen._replace(block_keys=keys)


def key_configuration(
    architecture: int, dtype: torch.dtype, tokens: int, head_width: int
) -> Configuration:
    """Of the kernel that owns keys: it keeps most in registers, so tiles are small, one stage."""
    if dtype == torch.float32:
        chosen = Configuration(32, 32 if head_width <= 32 else 16, num_warps=4, num_stages=1)
    else:
        chosen = Configuration(32, 64 if architecture >= 90 else 32, num_warps=4, num_stages=1)
    return chosen.within(tokens, dtype)


def bias_configuration(
    architecture: int, dtype: torch.dtype, tokens: int, head_width: int
) -> Configuration:
    """Of the kernel that owns pairs: the forward kernel's, but two stages spill before Hopper."""
    chosen = configuration(architecture, dtype, tokens, head_width)
    has_one = dtype == torch.float32 or architecture < 90
    return chosen._replace(num_stages=1) if has_one else chosen


@triton.jit(do_not_specialize=["num_grid", "num_windows", "tokens", "windows_of_all", "tiles"])
def query_gradient_kernel(
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
    out,
    grad_qkv,
    num_grid,
    num_windows,
    tokens,
    bias_stride,
    num_heads,
    windows_of_all,
    tiles,
    scale,
    NEEDS_QKV: tl.constexpr,
    HAS_PADS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    PRECISION: tl.constexpr,
    HEAD_WIDTH: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
):
    """grad_q[i] = scale * sum over j of grad_score[i, j] * k[j]; row_sum[i] and factor[i].

    row_sum[i] = sum over j of weight[i, j] * (grad[i] . v[j]), by which softmax lowers the
    gradients of a row. It is grad[i] . out[i] but for the rounding of `out`, which leaves them a
    sum that is not zero: that `rest` is taken away at the end. Likewise the log-sum-exp is rounded,
    and the weights of a row do not quite sum to 1: factor[i] makes them.
    """
    tile, head, clip, window = place_of(tl.program_id(0), tiles, windows_of_all, num_windows)
    channels = num_heads * HEAD_WIDTH
    channel = head * HEAD_WIDTH + tl.arange(0, HEAD_WIDTH)
    source += window * tokens
    region += window * tokens
    is_mixed = tl.load(mixed + window) != 0
    qkv += clip * num_grid * 3 * channels
    grad_out += clip * num_grid * channels
    row = (clip * num_heads + head) * num_grid
    query = tile * BLOCK_QUERIES + tl.arange(0, BLOCK_QUERIES)
    token, q, grad, level = load_queries(
        qkv, grad_out, log_sum_exp + row, source, query, tokens, channels, channel
    )
    is_token = (token >= 0)[:, None]
    at = (clip * num_grid + token)[:, None] * channels + channel[None, :]
    value = tl.load(out + at, mask=is_token, other=0).to(tl.float32)
    row_sum = tl.sum(grad.to(tl.float32) * value, axis=1)
    is_query = (query < tokens)[:, None]
    bias += (head.to(tl.int64) * tokens + query)[:, None] * bias_stride

    rest = tl.zeros((BLOCK_QUERIES,), dtype=tl.float32)
    total = tl.zeros((BLOCK_QUERIES,), dtype=tl.float32)
    mean_k = tl.zeros((BLOCK_QUERIES, HEAD_WIDTH), dtype=tl.float32)
    grad_q = tl.zeros((BLOCK_QUERIES, HEAD_WIDTH), dtype=tl.float32)
    for start in range(0, tokens, BLOCK_KEYS):
        key = start + tl.arange(0, BLOCK_KEYS)
        _, k, v = load_keys(qkv, pad_qkv, source, key, tokens, channels, channel, HAS_PADS)
        pairs = tl.load(bias + key[None, :], mask=is_query, other=0)
        scores = scores_of(
            q, k, pairs, region, query, key, tokens, is_mixed, scale, HAS_MASK, PRECISION
        )
        weights = exponential(scores, level[:, None])
        grad_weights = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
        grad_scores = weights * (grad_weights - row_sum[:, None])
        total += tl.sum(weights, axis=1)
        rest += tl.sum(grad_scores, axis=1)
        mean_k += tl.dot(weights.to(k.dtype), k, input_precision=PRECISION)
        grad_q += tl.dot(grad_scores.to(k.dtype), k, input_precision=PRECISION)

    # What is no token has weights of 0 alone, and is not stored.
    factor = 1 / tl.where(token >= 0, total, 1.0)
    rest *= factor
    tl.store(factors + row + token, factor, mask=token >= 0)
    tl.store(row_sums + row + token, row_sum + rest, mask=token >= 0)
    if NEEDS_QKV:
        at = (clip * num_grid + token)[:, None] * (3 * channels) + channel[None, :]
        grad_q = (grad_q - rest[:, None] * mean_k) * (factor * scale)[:, None]
        tl.store(grad_qkv + at, grad_q.to(grad_qkv.dtype.element_ty), mask=is_token)


@triton.jit(
    do_not_specialize=[
        "num_grid",
        "num_windows",
        "tokens",
        "windows_of_all",
        "parts",
        "tiles",
        "steps",
    ]
)
def key_value_gradient_kernel(
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
    grad_qkv,
    partial,
    num_grid,
    num_windows,
    tokens,
    bias_stride,
    num_heads,
    windows_of_all,
    parts,
    tiles,
    steps,
    scale,
    NEEDS_QKV: tl.constexpr,
    NEEDS_PAD: tl.constexpr,
    HAS_PADS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    PRECISION: tl.constexpr,
    HEAD_WIDTH: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
):
    """grad_v[j] = sum over i of weight[i, j] * grad[i], and grad_k[j] likewise of scores and q.

    A program takes `steps` windows, one after the other, and leaves the sum over their pads.
    """
    tile = tl.program_id(0) % tiles
    part = tl.program_id(0) // tiles % parts
    head = tl.program_id(0) // tiles // parts
    channels = num_heads * HEAD_WIDTH
    channel = head * HEAD_WIDTH + tl.arange(0, HEAD_WIDTH)
    key = tile * BLOCK_KEYS + tl.arange(0, BLOCK_KEYS)
    # Scores stand transposed: what a key sums over queries is then a plain product.
    bias += head.to(tl.int64) * tokens * bias_stride + key[:, None]
    pad_k = tl.zeros((HEAD_WIDTH,), dtype=tl.float32)
    pad_v = tl.zeros((HEAD_WIDTH,), dtype=tl.float32)
    first = part * steps
    for window_of_all in range(first, tl.minimum(first + steps, windows_of_all)):
        clip = (window_of_all // num_windows).to(tl.int64)
        window = window_of_all % num_windows
        places = source + window * tokens
        regions = region + window * tokens
        is_mixed = tl.load(mixed + window) != 0
        rows = qkv + clip * num_grid * 3 * channels
        grads = grad_out + clip * num_grid * channels
        row = (clip * num_heads + head) * num_grid
        token, k, v = load_keys(rows, pad_qkv, places, key, tokens, channels, channel, HAS_PADS)

        grad_k = tl.zeros((BLOCK_KEYS, HEAD_WIDTH), dtype=tl.float32)
        grad_v = tl.zeros((BLOCK_KEYS, HEAD_WIDTH), dtype=tl.float32)
        for start in range(0, tokens, BLOCK_QUERIES):
            query = start + tl.arange(0, BLOCK_QUERIES)
            query_token, q, grad, level = load_queries(
                rows, grads, log_sum_exp + row, places, query, tokens, channels, channel
            )
            row_sum = tl.load(row_sums + row + query_token, mask=query_token >= 0, other=0)
            pairs_at = query.to(tl.int64)[None, :] * bias_stride
            pairs = tl.load(bias + pairs_at, mask=(query < tokens)[None, :], other=0)
            scores = scores_of(
                k, q, pairs, regions, key, query, tokens, is_mixed, scale, HAS_MASK, PRECISION
            )
            weights = exponential(scores, level[None, :])
            factor = tl.load(factors + row + query_token, mask=query_token >= 0, other=0)
            weights *= factor[None, :]
            grad_v += tl.dot(weights.to(v.dtype), grad, input_precision=PRECISION)
            grad_weights = tl.dot(v, tl.trans(grad), input_precision=PRECISION)
            grad_scores = weights * (grad_weights - row_sum[None, :])
            grad_k += tl.dot(grad_scores.to(q.dtype), q, input_precision=PRECISION)

        grad_k *= scale
        if NEEDS_QKV:
            at = (clip * num_grid + token)[:, None] * (3 * channels) + channels + channel[None, :]
            is_token = (token >= 0)[:, None]
            tl.store(grad_qkv + at, grad_k.to(grad_qkv.dtype.element_ty), mask=is_token)
            tl.store(grad_qkv + at + channels, grad_v.to(grad_qkv.dtype.element_ty), mask=is_token)
        if NEEDS_PAD:
            # Beyond the window weights are 0, so what is no token and adds anything is a pad.
            is_pad = (token < 0)[:, None]
            pad_k += tl.sum(tl.where(is_pad, grad_k, 0.0), axis=0)
            pad_v += tl.sum(tl.where(is_pad, grad_v, 0.0), axis=0)
    if NEEDS_PAD:
        at = 2 * (part * tiles + tile).to(tl.int64) * channels + channel
        tl.store(partial + at, pad_k)
        tl.store(partial + at + channels, pad_v)


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
    clips, num_grid, tokens = len(qkv), len(vectors.target), vectors.tokens_per_window
    if tokens == 1:
        give_to_values(grad_qkv, grad_table, grad_pad, grad_out)
        return
    channels = out.shape[-1]
    head_width = channels // num_heads
    asked = (architecture(qkv), qkv.dtype, tokens, head_width)
    by_query, by_key = query_configuration(*asked), key_configuration(*asked)
    by_pair = bias_configuration(*asked)
    windows = clips * vectors.num_windows
    widest = max(chosen.block_keys for chosen in (by_query, by_key, by_pair))
    bias = expand_bias(bias_table, vectors, widest)
    row_sums = torch.empty_like(log_sum_exp)
    factors = torch.empty_like(log_sum_exp)
    read = (grad_out, qkv, pad_qkv, bias, log_sum_exp, row_sums, factors)
    read += (vectors.source, vectors.region, vectors.mixed)
    sizes = (num_grid, vectors.num_windows, tokens, bias.shape[-1], num_heads, windows)
    options = {
        "HAS_PADS": vectors.has_padding and pad_qkv is not None,
        "HAS_MASK": vectors.has_mask,
        "PRECISION": dot_precision() if qkv.dtype == torch.float32 else "ieee",
        "HEAD_WIDTH": head_width,
    }

    queries = blocks(tokens, by_query.block_queries)
    launch(
        query_gradient_kernel,
        (num_heads * windows * queries,),
        *read,
        out,
        grad_qkv,
        *sizes,
        queries,
        scale,
        NEEDS_QKV=needs_qkv,
        **options,
        **by_query.options(),
    )
    has_pads = needs_pad and vectors.has_padding
    if needs_qkv or has_pads:
        keys = blocks(tokens, by_key.block_keys)
        # Pads of all windows have one gradient, of which few partial sums shall remain.
        steps = blocks(windows * keys, PARTS) if has_pads else 1
        parts = blocks(windows, steps)
        partial = empty_partial(qkv, parts * keys if has_pads else 0, channels)
        launch(
            key_value_gradient_kernel,
            (num_heads * parts * keys,),
            *read,
            grad_qkv,
            partial,
            *sizes,
            parts,
            keys,
            steps,
            scale,
            NEEDS_QKV=needs_qkv,
            NEEDS_PAD=has_pads,
            **options,
            **by_key.options(),
        )
    if needs_pad:
        grad_pad.zero_()
    if has_pads:
        column_sums(grad_pad[channels : 2 * channels], grad_pad[2 * channels :], partial)
        del partial
    if needs_table:
        grad_bias = bias.new_empty((num_heads, tokens, tokens))
        queries, keys = (blocks(tokens, size) for size in by_pair[:2])
        grid = (keys, queries, num_heads)
        options |= by_pair.options()
        launch(bias_gradient_kernel, grid, *read, grad_bias, *sizes, scale, **options)
        gather_table_gradient(grad_table, grad_bias, vectors)
