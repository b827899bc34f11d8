"""Naive judges: the composition of upstream in plain PyTorch, one operation after the other.

In float64 they are the exact result; in a lower precision their error is the measure of a kernel
set's own. They share no code with the reference, and run on the device of their inputs.
"""

import loops
import torch
from torch.nn import functional as F


def partition(x, window, shift, pad=None):
    """[B, D, H, W, C] -> [B*M, N, C] as upstream: pad, roll, view, permute."""
    window, shift, padded = loops.clamp(x.shape[1:4], window, shift)
    far = _far_ends(x.shape[1:4], padded)
    full = F.pad(x, (0, 0, *far))
    if pad is not None:
        inside = F.pad(torch.ones(x.shape[1:4], dtype=torch.bool, device=x.device), far)
        full = torch.where(inside[..., None], full, pad)
    full = full.roll([-step for step in shift], (1, 2, 3))
    (d, h, w), counts = window, [padded[axis] // window[axis] for axis in range(3)]
    full = full.view(x.shape[0], counts[0], d, counts[1], h, counts[2], w, -1)
    return full.permute(0, 1, 3, 5, 2, 4, 6, 7).reshape(
        x.shape[0] * counts[0] * counts[1] * counts[2], d * h * w, x.shape[-1]
    )


def reverse(windows, grid, window, shift):
    """[B*M, N, C] -> [B, D, H, W, C] as upstream: view, permute, roll back, crop."""
    window, shift, padded = loops.clamp(grid, window, shift)
    counts = [padded[axis] // window[axis] for axis in range(3)]
    batch = windows.shape[0] // (counts[0] * counts[1] * counts[2])
    full = windows.view(batch, *counts, *window, windows.shape[-1])
    full = full.permute(0, 1, 4, 2, 5, 3, 6, 7).reshape(batch, *padded, windows.shape[-1])
    return full.roll(shift, (1, 2, 3))[:, : grid[0], : grid[1], : grid[2]]


def attention(qkv, bias_table, *, window, shift=(0, 0, 0), num_heads, **options):
    """Upstream in the dtype of qkv: low-precision products, float32 bias, mask and softmax.

    The options are those of `scores`.
    """
    score, v = scores(qkv, bias_table, window, shift, num_heads, **options)
    probabilities = score.softmax(-1).to(v.dtype)
    result = (probabilities @ v).transpose(1, 2).flatten(2)
    return reverse(result, tuple(qkv.shape[1:4]), window, shift)


def log_sum_exp(qkv, bias_table, *, window, shift=(0, 0, 0), num_heads, **options):
    """[B, heads, D*H*W]: of each token, the logarithm of the sum that its softmax divides by."""
    score, _ = scores(qkv, bias_table, window, shift, num_heads, **options)
    result = score.logsumexp(-1).transpose(1, 2)
    return reverse(result, tuple(qkv.shape[1:4]), window, shift).flatten(1, 3).transpose(1, 2)


def scores(
    qkv,
    bias_table,
    window,
    shift,
    num_heads,
    *,
    pad_qkv=None,
    scale=None,
    masked=-100.0,
    rows=None,
    low_bias=False,
):
    """(biased and masked scores [B*M, heads, N, N], values [B*M, heads, N, E]).

    `masked` and `rows` replace the mask's value and the table rows; `low_bias` adds the bias in
    the dtype of qkv. They make the wrong results that the tests must tell from the right one.
    """
    grid, width = tuple(qkv.shape[1:4]), qkv.shape[-1] // 3 // num_heads
    tokens = partition(qkv, window, shift, pad_qkv)
    q, k, v = tokens.unflatten(-1, (3, num_heads, width)).permute(2, 0, 3, 1, 4)
    q = q * (scale or width**-0.5)
    result = q @ k.transpose(-2, -1)
    if not low_bias and result.dtype.itemsize == 2:
        result = result.float()
    rows = loops.relative_rows(grid, window) if rows is None else rows
    bias = bias_table[torch.from_numpy(rows).to(qkv.device)].permute(2, 0, 1)
    result = result + bias.to(result.dtype)
    region = torch.from_numpy(loops.regions(grid, window, shift)).to(qkv.device)
    mask = torch.where(region[:, :, None] != region[:, None, :], masked, 0.0).to(result.dtype)
    result = result.view(-1, *mask.shape[:1], *result.shape[1:]) + mask[:, None]
    return result.flatten(0, 1), v


def merging(x, weight, bias, eps=1e-5):
    """Upstream: pad to even, concatenate four slices, LayerNorm in the dtype of x."""
    x = F.pad(x, (0, 0, 0, x.shape[3] % 2, 0, x.shape[2] % 2))
    slices = [x[:, :, h::2, w::2] for w in (0, 1) for h in (0, 1)]
    return F.layer_norm(torch.cat(slices, -1), weight.shape, weight, bias, eps)


def residual_norm(x, branch, weight, bias, eps=1e-5, branch_scale=None):
    """Plain sum, rounded once, and LayerNorm of it, in the dtype of x."""
    wide = torch.promote_types(x.dtype, torch.float32)
    step = branch.to(wide)
    if branch_scale is not None:
        step = step * branch_scale.to(wide).view(-1, *[1] * (x.dim() - 1))
    total = (x.to(wide) + step).to(x.dtype)
    return total, F.layer_norm(total, weight.shape, weight.to(x.dtype), bias.to(x.dtype), eps)


def _far_ends(grid, padded):
    """F.pad's argument for the three grid axes, last axis first."""
    missing = [padded[axis] - grid[axis] for axis in range(3)]
    return 0, missing[2], 0, missing[1], 0, missing[0]
