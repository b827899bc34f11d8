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
from videoswin_kernels.triton.attention_tiles import exponential, load_keys, place_of, scores_of
from videoswin_kernels.triton.bias_table import expand_bias

LN_2 = tl.constexpr(0.6931471805599453)


class Configuration(NamedTuple):
    """How a kernel divides a window, and Triton's two knobs."""

    block_queries: int
    block_keys: int
    num_warps: int
    num_stages: int

    def within(self, tokens: int, dtype: torch.dtype) -> Configuration:
        """With tiles no larger than the window needs, at least 16, as the tensor cores ask."""
        most = max(16, power_of_2(tokens))
        return Configuration(
            min(self.block_queries, most),
            min(self.block_keys, most),
            # In half precision more than one warp for the least tile spills a few bytes.
            self.num_warps if most > 16 or dtype == torch.float32 else 1,
            self.num_stages,
        )

    def options(self) -> dict[str, int]:
        """As a launch takes them."""
        queries, keys, warps, stages = self
        tile = {"BLOCK_QUERIES": queries, "BLOCK_KEYS": keys}
        return {**tile, "num_warps": warps, "num_stages": stages}


def configuration(
    architecture: int, dtype: torch.dtype, tokens: int, head_width: int
) -> Configuration:
    """The forward kernel's configuration, a plain function of what is asked, so runs repeat.

    float32 has no tensor cores ("ieee") and small tiles, since its operands lie in registers.
    """
    if dtype == torch.float32:
        queries, keys = 32, 32 if head_width <= 32 else 16
    else:
        # 64 keys spill before Hopper, by the count of Triton 3.9's compiler (2026-11-22).
        queries, keys = 64, 64 if architecture >= 90 else 32
    return Configuration(queries, keys, num_warps=4, num_stages=2).within(tokens, dtype)


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
        **chosen.options(),
    )
