"""One program a (head, window, tile of queries): rows gathered by `source`, softmax on the fly.

The bias is expanded once per call to [heads, N, N], in units of log 2: a gather from the table for
each score would cost more than the score. Programs run head by head, so that one head's bias stays
in the L2 cache while all windows pass. It is read from there for each window, 4 bytes a score,
which is more than all else that is read.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from videoswin_kernels.ops._vectors import WindowVectors
from videoswin_kernels.selection import CURE, UnavailableError
from videoswin_kernels.triton._compiler import (
    architecture,
    blocks,
    dot_precision,
    launch,
    power_of_2,
)

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
MASKED = tl.constexpr(-100.0)


class Configuration(NamedTuple):
    """How the forward kernel divides a window, and Triton's two knobs."""

    block_queries: int
    block_keys: int
    num_warps: int
    num_stages: int


def configuration(
    architecture: int, dtype: torch.dtype, tokens: int, head_width: int
) -> Configuration:
    """The forward kernel's configuration, a plain function of what is asked, so runs repeat.

    A tile is no larger than the window needs, and at least 16 x 16, as the tensor cores ask.
    float32 has none of those ("ieee") and small tiles, since its operands lie in registers.
    """
    if dtype == torch.float32:
        queries, keys = 32, 32 if head_width <= 32 else 16
    else:
        # 64 keys spill before Hopper, by the count of Triton 3.9's compiler (2026-11-22).
        queries, keys = 64, 64 if architecture >= 90 else 32
    most = max(16, power_of_2(tokens))
    return Configuration(min(queries, most), min(keys, most), num_warps=4, num_stages=2)


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
    """bias[head, i, j] = table[code[i] - code[j] + offset, head] * log2(e), -inf for j >= N."""
    query = tl.program_id(0)
    key = tl.program_id(1) * BLOCK_KEYS + tl.arange(0, BLOCK_KEYS)
    head = tl.arange(0, BLOCK_HEADS)
    is_head = (head < num_heads)[None, :]
    is_key = key < tokens
    row = tl.load(code + query) - tl.load(code + key, mask=is_key, other=0) + offset
    at = row.to(tl.int64)[:, None] * num_heads + head[None, :]
    value = tl.load(table + at, mask=is_key[:, None] & is_head, other=0).to(tl.float32) * LOG2_E
    value = tl.where(is_key[:, None], value, float("-inf"))
    at = (head.to(tl.int64)[None, :] * tokens + query) * stride + key[:, None]
    tl.store(bias + at, value, mask=(key < stride)[:, None] & is_head)


@triton.jit(do_not_specialize=["num_grid", "num_windows", "tokens", "windows_of_all", "tiles"])
def attention_forward_kernel(
    qkv,
    pad_qkv,
    bias,
    source,
    region,
    mixed,
    out,
    log_sum_exp,
    num_grid,
    num_windows,
    tokens,
    bias_stride,
    num_heads,
    windows_of_all,
    tiles,
    scale,
    HAS_PADDING: tl.constexpr,
    HAS_PAD_QKV: tl.constexpr,
    HAS_MASK: tl.constexpr,
    PRECISION: tl.constexpr,
    HEAD_WIDTH: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
):
    """out[i] = sum over j of softmax(scale * q[i] . k[j] + bias[i, j] + mask[i, j]) * v[j]."""
    tile = tl.program_id(0) % tiles
    head = tl.program_id(0) // tiles // windows_of_all
    window_of_all = tl.program_id(0) // tiles % windows_of_all
    clip = (window_of_all // num_windows).to(tl.int64)
    window = window_of_all % num_windows
    channels = num_heads * HEAD_WIDTH
    source += window * tokens
    region += window * tokens
    qkv += clip * num_grid * 3 * channels
    channel = head * HEAD_WIDTH + tl.arange(0, HEAD_WIDTH)

    # A padded query's output is dropped, so nothing stands for it.
    query = tile * BLOCK_QUERIES + tl.arange(0, BLOCK_QUERIES)
    is_query = query < tokens
    token = tl.load(source + query, mask=is_query, other=-1)
    is_kept = token >= 0
    q_at = token.to(tl.int64)[:, None] * (3 * channels) + channel[None, :]
    q = tl.load(qkv + q_at, mask=is_kept[:, None], other=0)
    bias += (head.to(tl.int64) * tokens + query)[:, None] * bias_stride
    if HAS_PADDING and HAS_PAD_QKV:
        pad_k = tl.load(pad_qkv + channels + channel)[None, :]
        pad_v = tl.load(pad_qkv + 2 * channels + channel)[None, :]
    if HAS_MASK:
        is_mixed = tl.load(mixed + window) != 0
        query_region = tl.load(region + query, mask=is_query, other=0)

    highest = tl.full((BLOCK_QUERIES,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_QUERIES,), dtype=tl.float32)
    result = tl.zeros((BLOCK_QUERIES, HEAD_WIDTH), dtype=tl.float32)
    for start in range(0, tokens, BLOCK_KEYS):
        key = start + tl.arange(0, BLOCK_KEYS)
        is_key = key < tokens
        key_token = tl.load(source + key, mask=is_key, other=-1)
        k_at = key_token.to(tl.int64)[:, None] * (3 * channels) + channels + channel[None, :]
        is_token = (key_token >= 0)[:, None]
        k = tl.load(qkv + k_at, mask=is_token, other=0)
        v = tl.load(qkv + k_at + channels, mask=is_token, other=0)
        if HAS_PADDING and HAS_PAD_QKV:
            is_pad = (key_token < 0) & is_key
            k = tl.where(is_pad[:, None], pad_k, k)
            v = tl.where(is_pad[:, None], pad_v, v)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2_E)
        # -inf beyond the window, where there is no key, so the tile needs no mask of its own.
        scores += tl.load(bias + key[None, :], mask=is_query[:, None], other=0)
        # Nested: without a mask the inner condition would not be there to compile.
        if HAS_MASK:  # noqa: SIM102
            if is_mixed:
                key_region = tl.load(region + key, mask=is_key, other=0)
                differs = query_region[:, None] != key_region[None, :]
                scores += tl.where(differs, MASKED * LOG2_E, 0.0)

        before = highest
        highest = tl.maximum(before, tl.max(scores, axis=1))
        # A tile may hold nothing but scores of -inf, and -inf - -inf is not a number.
        level = tl.where(highest == float("-inf"), 0.0, highest)
        weights = tl.exp2(scores - level[:, None])
        fading = tl.exp2(before - level)
        total = total * fading + tl.sum(weights, axis=1)
        result *= fading[:, None]
        result += tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)

    result = result / total[:, None]
    out_at = (clip * num_grid + token)[:, None] * channels + channel[None, :]
    tl.store(out + out_at, result.to(out.dtype.element_ty), mask=is_kept[:, None])
    row = (clip * num_heads + head) * num_grid + token
    tl.store(log_sum_exp + row, (highest + tl.log2(total)) * LN_2, mask=is_kept)


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
    clips, head_width, tokens = len(qkv), out.shape[-1] // num_heads, vectors.tokens_per_window
    chosen = configuration(architecture(qkv), qkv.dtype, tokens, head_width)
    bias = expand_bias(bias_table, vectors, chosen.block_keys)
    windows, tiles = clips * vectors.num_windows, blocks(tokens, chosen.block_queries)
    launch(
        attention_forward_kernel,
        (num_heads * windows * tiles,),
        qkv,
        pad_qkv,
        bias,
        vectors.source,
        vectors.region,
        vectors.mixed,
        out,
        log_sum_exp,
        len(vectors.target),
        vectors.num_windows,
        tokens,
        bias.shape[-1],
        num_heads,
        windows,
        tiles,
        scale,
        HAS_PADDING=vectors.has_padding,
        HAS_PAD_QKV=pad_qkv is not None,
        HAS_MASK=vectors.has_mask,
        PRECISION=dot_precision() if qkv.dtype == torch.float32 else "ieee",
        HEAD_WIDTH=head_width,
        BLOCK_QUERIES=chosen.block_queries,
        BLOCK_KEYS=chosen.block_keys,
        num_warps=chosen.num_warps,
        num_stages=chosen.num_stages,
    )


def expand_bias(bias_table: Tensor, vectors: WindowVectors, block_keys: int) -> Tensor:
    """float32 [heads, N, N to whole tiles of keys] in units of log 2, -inf beyond the window."""
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


def launch_window_attention_backward(*arguments: Tensor) -> None:
    raise UnavailableError(f"window_attention: the Triton attention has no backward yet; {CURE}")
