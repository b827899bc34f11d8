"""A tile of merged rows, four tokens each: gathered, normalised; backward scatters likewise."""

from __future__ import annotations

from math import prod

import torch
import triton
import triton.language as tl
from torch import Tensor

from videoswin_kernels.triton._compiler import blocks, launch, power_of_2
from videoswin_kernels.triton.column_sums import column_sums, empty_partial, split


def tile(channels: int) -> tuple[int, int, int]:
    """(merged rows of a tile, channels of a token, warps): about 16 elements a thread."""
    block = power_of_2(channels)
    rows = max(1, 2048 // (4 * block))
    return rows, block, min(16, max(4, rows * block // 128))


@triton.jit(do_not_specialize=["tokens", "rows", "blocks_per_clip"])
def patch_merging_forward_kernel(
    x,
    index,
    weight,
    bias,
    out,
    mean,
    rstd,
    tokens,
    rows,
    blocks_per_clip,
    channels,
    eps,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """out[row] = LayerNorm of the four tokens index[row] side by side; -1 is a token of zeros."""
    clip = (tl.program_id(0) // blocks_per_clip).to(tl.int64)
    row = (tl.program_id(0) % blocks_per_clip).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    corner = tl.arange(0, 4)
    column = tl.arange(0, BLOCK_CHANNELS)
    is_row, is_column = row < rows, column < channels
    quad = row[:, None] * 4 + corner[None, :]
    source = tl.load(index + quad, mask=is_row[:, None], other=-1)
    at = (clip * tokens + source)[:, :, None] * channels + column[None, None, :]
    inside = (source >= 0)[:, :, None] & is_column[None, None, :]
    value = tl.load(x + at, mask=inside, other=0).to(tl.float32)
    affine = corner[:, None] * channels + column[None, :]
    w = tl.load(weight + affine, mask=is_column[None, :], other=0).to(tl.float32)
    b = tl.load(bias + affine, mask=is_column[None, :], other=0).to(tl.float32)

    width = 4 * channels
    centre = tl.sum(tl.sum(value, axis=2), axis=1) / width
    centred = tl.where(is_column[None, None, :], value - centre[:, None, None], 0.0)
    variance = tl.sum(tl.sum(centred * centred, axis=2), axis=1) / width
    scale = 1 / tl.sqrt_rn(variance + eps)
    normed = centred * scale[:, None, None] * w[None, :, :] + b[None, :, :]

    at = (clip * rows * 4 + quad)[:, :, None] * channels + column[None, None, :]
    inside = is_row[:, None, None] & is_column[None, None, :]
    tl.store(out + at, normed.to(out.dtype.element_ty), mask=inside)
    tl.store(mean + clip * rows + row, centre, mask=is_row)
    tl.store(rstd + clip * rows + row, scale, mask=is_row)


@triton.jit(do_not_specialize=["tokens", "rows", "programs_per_clip", "steps"])
def patch_merging_backward_kernel(
    grad,
    x,
    index,
    weight,
    mean,
    rstd,
    grad_x,
    partial,
    tokens,
    rows,
    programs_per_clip,
    channels,
    steps,
    NEEDS_X: tl.constexpr,
    NEEDS_AFFINE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """Gradient of each token, which is in one row, and this program's share of the affine ones."""
    clip = (tl.program_id(0) // programs_per_clip).to(tl.int64)
    first = (tl.program_id(0) % programs_per_clip).to(tl.int64) * steps * BLOCK_ROWS
    corner = tl.arange(0, 4)
    column = tl.arange(0, BLOCK_CHANNELS)
    is_column = column < channels
    width = 4 * channels
    affine = corner[:, None] * channels + column[None, :]
    w = tl.load(weight + affine, mask=is_column[None, :], other=0).to(tl.float32)[None, :, :]
    grad_weight = tl.zeros((4, BLOCK_CHANNELS), dtype=tl.float32)
    grad_bias = tl.zeros((4, BLOCK_CHANNELS), dtype=tl.float32)
    for step in range(steps):
        row = first + step * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        is_row = row < rows
        quad = row[:, None] * 4 + corner[None, :]
        source = tl.load(index + quad, mask=is_row[:, None], other=-1)
        at = (clip * tokens + source)[:, :, None] * channels + column[None, None, :]
        is_token = (source >= 0)[:, :, None] & is_column[None, None, :]
        value = tl.load(x + at, mask=is_token, other=0).to(tl.float32)
        up_at = (clip * rows * 4 + quad)[:, :, None] * channels + column[None, None, :]
        inside = is_row[:, None, None] & is_column[None, None, :]
        up = tl.load(grad + up_at, mask=inside, other=0).to(tl.float32)
        centre = tl.load(mean + clip * rows + row, mask=is_row, other=0)[:, None, None]
        scale = tl.load(rstd + clip * rows + row, mask=is_row, other=0)[:, None, None]

        normed = (value - centre) * scale
        grad_weight += tl.sum(up * normed, axis=0)
        grad_bias += tl.sum(up, axis=0)
        weighted = up * w
        along = tl.sum(tl.sum(weighted * normed, axis=2), axis=1)[:, None, None] / width
        across = tl.sum(tl.sum(weighted, axis=2), axis=1)[:, None, None] / width

        if NEEDS_X:
            down = (weighted - across - along * normed) * scale
            tl.store(grad_x + at, down.to(grad_x.dtype.element_ty), mask=is_token)
    if NEEDS_AFFINE:
        at = 2 * tl.program_id(0).to(tl.int64) * width + affine
        tl.store(partial + at, grad_weight, mask=is_column[None, :])
        tl.store(partial + at + width, grad_bias, mask=is_column[None, :])


def launch_patch_merging(
    out: Tensor,
    mean: Tensor,
    rstd: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dtype: torch.dtype,
    index: Tensor,
) -> None:
    clips, channels, rows = len(x), x.shape[-1], len(index) // 4
    block_rows, block, warps = tile(channels)
    blocks_per_clip = blocks(rows, block_rows)
    launch(
        patch_merging_forward_kernel,
        (clips * blocks_per_clip,),
        x,
        index,
        weight,
        bias,
        out,
        mean,
        rstd,
        prod(x.shape[1:4]),
        rows,
        blocks_per_clip,
        channels,
        eps,
        BLOCK_ROWS=block_rows,
        BLOCK_CHANNELS=block,
        num_warps=warps,
    )


def launch_patch_merging_backward(
    grad_x: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor,
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    needs_x: bool,
    needs_affine: bool,
    index: Tensor,
) -> None:
    clips, channels, rows = len(x), x.shape[-1], len(index) // 4
    block_rows, block, warps = tile(channels)
    steps, programs = split(blocks(rows, block_rows), clips)
    partial = empty_partial(x, clips * programs if needs_affine else 0, 4 * channels)
    launch(
        patch_merging_backward_kernel,
        (clips * programs,),
        grad,
        x,
        index,
        weight,
        mean,
        rstd,
        grad_x,
        partial,
        prod(x.shape[1:4]),
        rows,
        programs,
        channels,
        steps,
        NEEDS_X=needs_x,
        NEEDS_AFFINE=needs_affine,
        BLOCK_ROWS=block_rows,
        BLOCK_CHANNELS=block,
        num_warps=warps,
    )
    if needs_affine:
        column_sums(grad_weight, grad_bias, partial)
