"""Peers of window attention that torch.compile makes: eager PyTorch compiled, and FlexAttention."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bench.attention_peers import Problem, Windows, eager
from videoswin_kernels.selection import UnavailableError


def compiled(problem: Problem) -> Callable[[], Tensor]:
    """`eager` under torch.compile."""
    return torch.compile(eager(problem), dynamic=False, fullgraph=True)


def flex(problem: Problem, *, trains_table: bool) -> Callable[[], Tensor]:
    """FlexAttention, compiled together with the windows around it.

    The score is modified by the row of the table that the two tokens' codes name; blocks of pairs
    that the shift separates are left out, and the pairs of other blocks by the same mask: theirs is
    infinite, where the model's is -100. Codes, regions and blocks are made once.

    Raises:
        UnavailableError: there is no backward of FlexAttention on a CPU.
    """
    if trains_table and problem.qkv.device.type == "cpu":
        raise UnavailableError("FlexAttention has no backward on a CPU")
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    own, heads, device = Windows.of(problem), problem.heads, problem.qkv.device
    num_windows, tokens = own.geometry.num_windows, own.geometry.tokens_per_window
    code = torch.from_numpy(own.geometry.code.copy()).to(device)
    region = torch.from_numpy(own.geometry.region.copy()).to(device).view(num_windows, tokens)
    offset, table = own.geometry.offset, problem.bias_table

    def biased(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return score + table[code[query] - code[key] + offset, head]

    blocks = None
    if own.mask is not None:

        def together(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            window = batch % num_windows
            return region[window, query] == region[window, key]

        count = len(problem.qkv) * num_windows
        blocks = create_block_mask(together, count, None, tokens, tokens, device=device)

    def attention() -> Tensor:
        x = own.split(problem.qkv, problem.pad_qkv).permute(7, 0, 1, 3, 5, 8, 2, 4, 6, 9)
        batch, counts, window, width = x.shape[1], x.shape[2:5], x.shape[6:9], x.shape[9]
        q, k, v = x.reshape(3, batch * num_windows, heads, tokens, width)
        out = flex_attention(q, k, v, score_mod=biased, block_mask=blocks)
        out = out.view(batch, *counts, heads, *window, width)
        return own.join(out.permute(0, 1, 2, 3, 5, 6, 7, 4, 8).flatten(7))

    return torch.compile(attention, dynamic=False, fullgraph=True)
