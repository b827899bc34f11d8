"""One program a (head, window, tile of queries): rows gathered by `source`, softmax on the fly.

Programs run head by head, so that one head's expanded bias stays in the L2 cache while all windows
pass. It is read from there for each window, 4 bytes a score, which is more than all else that is
read.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from videoswin_kernels.ops._vectors import WindowVectors
from videoswin_kernels.triton._compiler import (
    architecture,
    blocks,
    dot_precision,
    launch,
    power_of_2,
)
from videoswin_kernels.triton.bias_table import expand_bias

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


@triton.jit
def place_of(program, tiles, windows_of_all, num_windows):
    """(tile, head, clip, window) of a program; one head's programs follow each other."""
    window_of_all = program // tiles % windows_of_all
    clip = (window_of_all // num_windows).to(tl.int64)
    return program % tiles, program // tiles // windows_of_all, clip, window_of_all % num_windows


@triton.jit
def load_keys(qkv, pad_qkv, source, key, tokens, channels, channel, HAS_PADS: tl.constexpr):
    """(token, k, v) of places of a window; token -1 is a pad, or beyond it, where k = v = 0."""
    is_key = key < tokens
    token = tl.load(source + key, mask=is_key, other=-1)
    at = token.to(tl.int64)[:, None] * (3 * channels) + channels + channel[None, :]
    is_token = (token >= 0)[:, None]
    k = tl.load(qkv + at, mask=is_token, other=0)
    v = tl.load(qkv + at + channels, mask=is_token, other=0)
    if HAS_PADS:
        is_pad = ((token < 0) & is_key)[:, None]
        k = tl.where(is_pad, tl.load(pad_qkv + channels + channel)[None, :], k)
        v = tl.where(is_pad, tl.load(pad_qkv + 2 * channels + channel)[None, :], v)
    return token, k, v


@triton.jit
def scores_of(
    left,
    right,
    bias,
    region,
    left_place,
    right_place,
    tokens,
    is_mixed,
    scale,
    HAS_MASK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """scale * left . right + bias + mask; queries stand left, or keys."""
    scores = tl.dot(left, tl.trans(right), input_precision=PRECISION) * scale + bias
    # Nested: without a mask the inner condition would not be there to compile.
    if HAS_MASK:  # noqa: SIM102
        if is_mixed:
            left_region = tl.load(region + left_place, mask=left_place < tokens, other=0)
            right_region = tl.load(region + right_place, mask=right_place < tokens, other=0)
            differs = left_region[:, None] != right_region[None, :]
            scores += tl.where(differs, MASKED, 0.0)
    return scores


@triton.jit
def exponential(scores, level):
    """exp(scores - level), by the exponential that there is an instruction for."""
    return tl.exp2((scores - level) * LOG2_E)


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
    HAS_PADS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    PRECISION: tl.constexpr,
    HEAD_WIDTH: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
):
    """out[i] = sum over j of softmax(scale * q[i] . k[j] + bias[i, j] + mask[i, j]) * v[j]."""
    tile, head, clip, window = place_of(tl.program_id(0), tiles, windows_of_all, num_windows)
    channels = num_heads * HEAD_WIDTH
    channel = head * HEAD_WIDTH + tl.arange(0, HEAD_WIDTH)
    source += window * tokens
    region += window * tokens
    qkv += clip * num_grid * 3 * channels
    is_mixed = tl.load(mixed + window) != 0

    # A padded query's output is dropped, so nothing stands for it.
    query = tile * BLOCK_QUERIES + tl.arange(0, BLOCK_QUERIES)
    is_query = query < tokens
    token = tl.load(source + query, mask=is_query, other=-1)
    is_kept = token >= 0
    q_at = token.to(tl.int64)[:, None] * (3 * channels) + channel[None, :]
    q = tl.load(qkv + q_at, mask=is_kept[:, None], other=0)
    bias += (head.to(tl.int64) * tokens + query)[:, None] * bias_stride

    highest = tl.full((BLOCK_QUERIES,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_QUERIES,), dtype=tl.float32)
    result = tl.zeros((BLOCK_QUERIES, HEAD_WIDTH), dtype=tl.float32)
    for start in range(0, tokens, BLOCK_KEYS):
        key = start + tl.arange(0, BLOCK_KEYS)
        _, k, v = load_keys(qkv, pad_qkv, source, key, tokens, channels, channel, HAS_PADS)
        # -inf beyond the window, where there is no key, so the tile needs no mask of its own.
        pairs = tl.load(bias + key[None, :], mask=is_query[:, None], other=0)
        scores = scores_of(
            q, k, pairs, region, query, key, tokens, is_mixed, scale, HAS_MASK, PRECISION
        )

        before = highest
        highest = tl.maximum(before, tl.max(scores, axis=1))
        # A tile may hold nothing but scores of -inf, and -inf - -inf is not a number.
        level = tl.where(highest == float("-inf"), 0.0, highest)
        weights = exponential(scores, level[:, None])
        fading = exponential(before, level)
        total = total * fading + tl.sum(weights, axis=1)
        result *= fading[:, None]
        result += tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)

    result = result / total[:, None]
    out_at = (clip * num_grid + token)[:, None] * channels + channel[None, :]
    tl.store(out + out_at, result.to(out.dtype.element_ty), mask=is_kept[:, None])
    row = (clip * num_heads + head) * num_grid + token
    tl.store(log_sum_exp + row, highest + tl.log2(total) * LN_2, mask=is_kept)


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
        HAS_PADS=vectors.has_padding and pad_qkv is not None,
        HAS_MASK=vectors.has_mask,
        PRECISION=dot_precision() if qkv.dtype == torch.float32 else "ieee",
        HEAD_WIDTH=head_width,
        BLOCK_QUERIES=chosen.block_queries,
        BLOCK_KEYS=chosen.block_keys,
        num_warps=chosen.num_warps,
        num_stages=chosen.num_stages,
    )
