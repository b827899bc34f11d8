"""What the attention kernels share: places of a tile gathered, its scores, their exponential."""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
MASKED = tl.constexpr(-100.0)


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
def load_queries(qkv, grad_out, log_sum_exp, source, query, tokens, channels, channel):
    """(token, q, grad, level) of places of a window; the log-sum-exp is of this clip and head.

    What is no token has given out nothing: its level of +inf makes each of its weights 0.
    """
    token = tl.load(source + query, mask=query < tokens, other=-1)
    is_token = token >= 0
    row = token.to(tl.int64)[:, None] * channels
    q = tl.load(qkv + 3 * row + channel[None, :], mask=is_token[:, None], other=0)
    grad = tl.load(grad_out + row + channel[None, :], mask=is_token[:, None], other=0)
    level = tl.load(log_sum_exp + token, mask=is_token, other=float("inf"))
    return token, q, grad, level


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
