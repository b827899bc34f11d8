"""What a user would run instead of `window_attention`: eager PyTorch and its fused attention.

Each maker takes a problem and returns the function that is timed. It prepares what a model would
prepare once: the index into the table and the mask of the shift. All else, from the output of the
qkv Linear to the input of the proj Linear, is inside the function.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from videoswin_kernels.geometry import WindowGeometry, table_rows
from videoswin_kernels.testing import Case, Stage


class Problem(NamedTuple):
    """Inputs of `window_attention`: a case, its heads, and the tensors in the operator's layout."""

    case: Case
    heads: int
    qkv: Tensor
    bias_table: Tensor
    pad_qkv: Tensor

    @classmethod
    def random(
        cls, stage: Stage, batch: int, dtype: torch.dtype, device: torch.device, seed: int = 0
    ) -> Problem:
        """Normal values: those of the products spread by 1, those of the bias by a half."""
        generator = torch.Generator(device).manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device=device)

        return cls(
            stage.case,
            stage.heads,
            normal(batch, *stage.case.grid, 3 * stage.channels).to(dtype),
            normal(table_rows(stage.case.window), stage.heads) / 2,
            normal(3 * stage.channels).to(dtype),
        )

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """qkv, bias_table and pad_qkv, which have gradients."""
        return self.qkv, self.bias_table, self.pad_qkv

    def first_clips(self) -> Problem:
        """The same with two clips: enough for what is wrong between clips, in little memory."""
        return self._replace(qkv=self.qkv[:2])

    def leaves(self, dtype: torch.dtype | None = None, *, trains: bool = True) -> Problem:
        """The same values as leaves, in another dtype if one is named; `trains`: with gradients."""
        tensors = (each.detach().to(dtype or each.dtype).clone() for each in self.tensors)
        return Problem(self.case, self.heads, *(each.requires_grad_(trains) for each in tensors))


@dataclass(frozen=True)
class Windows:
    """Views, copies and constants of a case on a device, as plain PyTorch makes them."""

    geometry: WindowGeometry
    heads: int
    index: Tensor  # int64 [N * N], rows of the table
    mask: Tensor | None  # float32 [M, N, N], 0 or -100; None without a shift
    inside: Tensor | None  # bool [1, padded grid, 1], False where padded; None without padding

    @classmethod
    def of(cls, problem: Problem) -> Windows:
        """Those of a problem."""
        geometry, device = WindowGeometry.build(*problem.case), problem.qkv.device
        code, region = (
            torch.from_numpy(vector.copy()).to(device)
            for vector in (geometry.code, geometry.region)
        )
        index = (code[:, None] - code[None, :] + geometry.offset).long().flatten()
        region = region.view(geometry.num_windows, -1)
        mask = (region[:, :, None] != region[:, None, :]) * -100.0
        inside = None
        if geometry.padded != geometry.grid:
            inside = torch.ones(1, *geometry.grid, 1, dtype=torch.bool, device=device)
            inside = F.pad(inside, (0, 0, *_padding(geometry)))
        return cls(geometry, problem.heads, index, mask if any(geometry.shift) else None, inside)

    def split(self, qkv: Tensor, pad_qkv: Tensor) -> Tensor:
        """[B, D, H, W, 3C] -> a view [B, d's, d, h's, h, w's, w, 3, heads, E], after any roll."""
        if self.inside is not None:
            qkv = F.pad(qkv, (0, 0, *_padding(self.geometry)))
            qkv = torch.where(self.inside, qkv, pad_qkv)
        if any(self.geometry.shift):
            qkv = qkv.roll([-step for step in self.geometry.shift], (1, 2, 3))
        pairs = zip(self.geometry.padded, self.geometry.window, strict=True)
        axes = [part for size, w in pairs for part in (size // w, w)]
        return qkv.view(len(qkv), *axes, 3, self.heads, -1)

    def join(self, windows: Tensor) -> Tensor:
        """[B, d's, h's, w's, d, h, w, C] -> [B, D, H, W, C], rolled back and without padding."""
        batch, (depth, height, width) = len(windows), self.geometry.grid
        out = windows.permute(0, 1, 4, 2, 5, 3, 6, 7).reshape(batch, *self.geometry.padded, -1)
        if any(self.geometry.shift):
            out = out.roll(self.geometry.shift, (1, 2, 3))
        return out[:, :depth, :height, :width].contiguous()

    def bias(self, table: Tensor) -> Tensor:
        """[heads, N, N] from the table [rows, heads]."""
        tokens = self.geometry.tokens_per_window
        return table[self.index].view(tokens, tokens, -1).permute(2, 0, 1).contiguous()


def _padding(geometry: WindowGeometry) -> tuple[int, ...]:
    """F.pad's argument for the three axes of a grid, the last axis first."""
    missing = [full - size for full, size in zip(geometry.padded, geometry.grid, strict=True)]
    return 0, missing[2], 0, missing[1], 0, missing[0]


def eager(problem: Problem) -> Callable[[], Tensor]:
    """torchvision's operations, one after the other, under mixed precision as autocast makes it.

    Products in the dtype of qkv; bias, mask and softmax in float32.
    """
    own, heads = Windows.of(problem), problem.heads
    num_windows, tokens = own.geometry.num_windows, own.geometry.tokens_per_window

    def attention() -> Tensor:
        x = own.split(problem.qkv, problem.pad_qkv).permute(0, 1, 3, 5, 2, 4, 6, 7, 8, 9)
        batch, counts, window, width = len(x), x.shape[1:4], x.shape[4:7], x.shape[9]
        x = x.reshape(batch * num_windows, tokens, 3, heads, width)
        q, k, v = x.permute(2, 0, 3, 1, 4)
        scores = (q * width**-0.5) @ k.transpose(-2, -1) + own.bias(problem.bias_table)
        if own.mask is not None:
            scores = scores.view(batch, num_windows, heads, tokens, tokens) + own.mask[:, None]
            scores = scores.view(batch * num_windows, heads, tokens, tokens)
        out = scores.softmax(-1).to(v.dtype) @ v
        return own.join(out.transpose(1, 2).reshape(batch, *counts, *window, heads * width))

    return attention


def sdpa(problem: Problem, *, trains_table: bool) -> Callable[[], Tensor]:
    """`scaled_dot_product_attention` with bias and mask as one attn_mask, in its best form here.

    q, k and v are copied into windows at once. Where windows differ by their mask they stand
    beside the heads, so that attn_mask is never repeated for each clip. attn_mask is made outside
    what is timed, but inside where the table is trained.
    """
    own, heads = Windows.of(problem), problem.heads
    num_windows, tokens = own.geometry.num_windows, own.geometry.tokens_per_window

    def attn_mask() -> Tensor:
        bias = own.bias(problem.bias_table)  # [heads, N, N]
        if own.mask is not None:
            bias = (own.mask[:, None] + bias).flatten(0, 1)  # [M * heads, N, N]
        return bias[None].to(problem.qkv.dtype)

    constant = None if trains_table else attn_mask().detach()

    def attention() -> Tensor:
        mask = attn_mask() if constant is None else constant
        x = own.split(problem.qkv, problem.pad_qkv).permute(7, 0, 1, 3, 5, 8, 2, 4, 6, 9)
        batch, counts, window, width = x.shape[1], x.shape[2:5], x.shape[6:9], x.shape[9]
        lead = (batch * num_windows, heads) if own.mask is None else (batch, num_windows * heads)
        q, k, v = x.reshape(3, *lead, tokens, width)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        out = out.view(batch, *counts, heads, *window, width)
        return own.join(out.permute(0, 1, 2, 3, 5, 6, 7, 4, 8).flatten(7))

    return attention
