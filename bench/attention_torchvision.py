"""torchvision's own window attention as a peer, without the two Linears at its ends.

Its function pads, rolls and cuts what comes before the qkv Linear, computes, and puts together what
comes behind the proj Linear. Both Linears are inside of it, and nobody else's are measured: so here
the first gives what it would have given, made once before the clock, and the second what it gets.
All else is torchvision's own code, run on a copy of its globals.
"""

from __future__ import annotations

import importlib
from contextlib import nullcontext
from types import FunctionType, SimpleNamespace

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.attention_peers import Problem, Windows
from videoswin_kernels.selection import UnavailableError


class _Linear(torch.autograd.Function):
    """Stands for the qkv Linear: its output, and backwards a gradient as wide as its input."""

    @staticmethod
    def forward(ctx: object, x: Tensor, qkv: Tensor) -> Tensor:
        ctx.channels = x.shape[-1]
        return qkv.view_as(qkv)

    @staticmethod
    def backward(ctx: object, upstream: Tensor) -> tuple[Tensor, Tensor]:
        return upstream[..., : ctx.channels], upstream


class Torchvision:
    """The function that is timed.

    Attributes:
        leaves: whose gradients are asked for under the clock, once `isolate` was called.

    Raises:
        UnavailableError: torchvision, or its function, is not there.
    """

    def __init__(self, problem: Problem) -> None:
        try:
            video = importlib.import_module("torchvision.models.video.swin_transformer")
            whole, self.bias = video.shifted_window_attention_3d, video._get_relative_position_bias
        except (ImportError, AttributeError):
            raise UnavailableError("torchvision has no shifted_window_attention_3d here") from None
        ends = SimpleNamespace(**{**vars(F), "linear": self._linear})
        self.function = FunctionType(
            whole.__code__, {**whole.__globals__, "F": ends}, argdefs=whole.__defaults__
        )
        own, qkv = Windows.of(problem), problem.qkv
        x = torch.randn_like(qkv[..., : qkv.shape[-1] // 3], memory_format=torch.contiguous_format)
        cut = own.split(qkv, problem.pad_qkv).permute(0, 1, 3, 5, 2, 4, 6, 7, 8, 9)
        tokens = own.geometry.tokens_per_window
        windows = cut.reshape(-1, tokens, qkv.shape[-1])
        self.leaves = (x.requires_grad_(qkv.requires_grad), windows, problem.bias_table)
        self.index = own.index.view(tokens, tokens)
        self.sizes = {
            "window_size": list(own.geometry.window),
            "num_heads": problem.heads,
            "shift_size": list(own.geometry.shift),
        }

    def isolate(self) -> None:
        """Cuts the windows off the problem's qkv: no cutting of it is under the clock."""
        x, windows, table = self.leaves
        self.leaves = (x, windows.detach().requires_grad_(windows.requires_grad), table)

    def _linear(self, x: Tensor, weight: str, bias: None) -> Tensor:
        return _Linear.apply(x, self.leaves[1]) if weight == "qkv" else x

    def __call__(self) -> Tensor:
        x, _, table = self.leaves
        is_mixed = x.dtype != table.dtype
        with torch.autocast(x.device.type, x.dtype) if is_mixed else nullcontext():
            bias = self.bias(table, self.index, self.sizes["window_size"])
            return self.function(x, "qkv", "proj", bias, **self.sizes)
