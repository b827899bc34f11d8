"""A tile of whole rows in registers: read once, added, normalised, written once."""

from __future__ import annotations

from math import prod

import torch
import triton
import triton.language as tl
from torch import Tensor

from videoswin_kernels.triton._compiler import blocks, launch, power_of_2
from videoswin_kernels.triton.column_sums import column_sums, empty_partial, split


def tile(channels: int) -> tuple[int, int, int]:
    """(rows of a tile, channels of a tile, warps): about 16 elements a thread."""
    block = power_of_2(channels)
    rows = max(1, 2048 // block)
    return rows, block, min(16, max(4, rows * block // 512))


@triton.jit(do_not_specialize=["rows", "tokens"])
def residual_norm_forward_kernel(
    x,
    branch,
    weight,
    bias,
    branch_scale,
    total,
    norm,
    mean,
    rstd,
    rows,
    tokens,
    channels,
    eps,
    HAS_SCALE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """total = x + branch_scale * branch; norm = LayerNorm(total)."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.arange(0, BLOCK_CHANNELS)
    is_row, is_column = row < rows, (column < channels)[None, :]
    at, inside = row[:, None] * channels + column[None, :], is_row[:, None] & is_column
    step = tl.load(branch + at, mask=inside, other=0).to(tl.float32)
    if HAS_SCALE:
        factor = tl.load(branch_scale + row // tokens, mask=is_row, other=0)
        step *= factor.to(tl.float32)[:, None]
    rounded = (tl.load(x + at, mask=inside, other=0).to(tl.float32) + step).to(
        total.dtype.element_ty
    )
    w = tl.load(weight + column, mask=column < channels, other=0).to(tl.float32)[None, :]
    b = tl.load(bias + column, mask=column < channels, other=0).to(tl.float32)[None, :]

    value = rounded.to(tl.float32)
    centre = tl.sum(value, axis=1) / channels
    centred = tl.where(is_column, value - centre[:, None], 0.0)
    scale = 1 / tl.sqrt_rn(tl.sum(centred * centred, axis=1) / channels + eps)
    normed = centred * scale[:, None] * w + b

    tl.store(total + at, rounded, mask=inside)
    tl.store(norm + at, normed.to(norm.dtype.element_ty), mask=inside)
    tl.store(mean + row, centre, mask=is_row)
    tl.store(rstd + row, scale, mask=is_row)


@triton.jit(do_not_specialize=["rows", "tokens", "steps"])
def residual_norm_backward_kernel(
    grad_total,
    grad_norm,
    total,
    weight,
    mean,
    rstd,
    branch_scale,
    grad_x,
    grad_branch,
    partial,
    rows,
    tokens,
    channels,
    steps,
    HAS_TOTAL: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    NEEDS_X: tl.constexpr,
    NEEDS_BRANCH: tl.constexpr,
    NEEDS_AFFINE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """Gradients of x and branch, and this program's share of those of weight and bias."""
    first = tl.program_id(0).to(tl.int64) * steps * BLOCK_ROWS
    column = tl.arange(0, BLOCK_CHANNELS)
    is_column = column < channels
    w = tl.load(weight + column, mask=is_column, other=0).to(tl.float32)[None, :]
    grad_weight = tl.zeros((BLOCK_CHANNELS,), dtype=tl.float32)
    grad_bias = tl.zeros((BLOCK_CHANNELS,), dtype=tl.float32)
    for step in range(steps):
        row = first + step * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        is_row = row < rows
        at = row[:, None] * channels + column[None, :]
        inside = is_row[:, None] & is_column[None, :]
        grad = tl.zeros((BLOCK_ROWS, BLOCK_CHANNELS), dtype=tl.float32)
        if HAS_NORM:
            up = tl.load(grad_norm + at, mask=inside, other=0).to(tl.float32)
            value = tl.load(total + at, mask=inside, other=0).to(tl.float32)
            scale = tl.load(rstd + row, mask=is_row, other=0)[:, None]
            normed = (value - tl.load(mean + row, mask=is_row, other=0)[:, None]) * scale

            weighted = up * w
            along = tl.sum(weighted * normed, axis=1) / channels
            grad = weighted - tl.sum(weighted, axis=1)[:, None] / channels - along[:, None] * normed
            grad *= scale
            grad_weight += tl.sum(up * normed, axis=0)
            grad_bias += tl.sum(up, axis=0)
        if HAS_TOTAL:
            grad += tl.load(grad_total + at, mask=inside, other=0).to(tl.float32)

        if NEEDS_X:
            tl.store(grad_x + at, grad.to(grad_x.dtype.element_ty), mask=inside)
        if NEEDS_BRANCH:
            if HAS_SCALE:
                factor = tl.load(branch_scale + row // tokens, mask=is_row, other=0)
                grad *= factor.to(tl.float32)[:, None]
            tl.store(grad_branch + at, grad.to(grad_branch.dtype.element_ty), mask=inside)
    if NEEDS_AFFINE:
        at = 2 * tl.program_id(0).to(tl.int64) * channels + column
        tl.store(partial + at, grad_weight, mask=is_column)
        tl.store(partial + at + channels, grad_bias, mask=is_column)


def launch_residual_norm(
    total: Tensor,
    norm: Tensor,
    mean: Tensor,
    rstd: Tensor,
    x: Tensor,
    branch: Tensor,
    weight: Tensor,
    bias: Tensor,
    branch_scale: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> None:
    channels, tokens = x.shape[-1], prod(x.shape[1:4])
    rows = len(x) * tokens
    block_rows, block, warps = tile(channels)
    launch(
        residual_norm_forward_kernel,
        (blocks(rows, block_rows),),
        x,
        branch,
        weight,
        bias,
        branch_scale,
        total,
        norm,
        mean,
        rstd,
        rows,
        tokens,
        channels,
        eps,
        HAS_SCALE=branch_scale is not None,
        BLOCK_ROWS=block_rows,
        BLOCK_CHANNELS=block,
        num_warps=warps,
    )


def launch_residual_norm_backward(
    grad_x: Tensor,
    grad_branch: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor,
    grad_total: Tensor | None,
    grad_norm: Tensor | None,
    total: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    branch_scale: Tensor | None,
    branch_dtype: torch.dtype,
    needs_x: bool,
    needs_branch: bool,
    needs_affine: bool,
) -> None:
    channels, tokens = total.shape[-1], prod(total.shape[1:4])
    rows = len(total) * tokens
    block_rows, block, warps = tile(channels)
    steps, programs = split(blocks(rows, block_rows))
    partial = empty_partial(total, programs if needs_affine else 0, channels)
    launch(
        residual_norm_backward_kernel,
        (programs,),
        grad_total,
        grad_norm,
        total,
        weight,
        mean,
        rstd,
        branch_scale,
        grad_x,
        grad_branch,
        partial,
        rows,
        tokens,
        channels,
        steps,
        HAS_TOTAL=grad_total is not None,
        HAS_NORM=grad_norm is not None,
        HAS_SCALE=branch_scale is not None,
        NEEDS_X=needs_x,
        NEEDS_BRANCH=needs_branch,
        NEEDS_AFFINE=needs_affine,
        BLOCK_ROWS=block_rows,
        BLOCK_CHANNELS=block,
        num_warps=warps,
    )
    if needs_affine:
        column_sums(grad_weight, grad_bias, partial)
