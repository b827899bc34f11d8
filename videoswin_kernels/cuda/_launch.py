"""What the launchers share: the library that runs where a tensor is, and what its rows can be."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from videoswin_kernels import extension
from videoswin_kernels.selection import CURE, UnavailableError

# The widest rows that kernels hold in registers: where 8 divides a token's channels, and else.
# csrc/cuda/operators.h has the same numbers.
WIDEST = 8192
WIDEST_ODD = 5120
# Blocks of a first stage, about, or one a clip where clips are more; each has 32 rows or more.
# Not taken from the card: a gradient is to be the same bits on every one.
PARTS = 1024
ROWS_OF_A_PART = 32


def library(operator: str, x: Tensor) -> Any:
    """The launchers of the library that runs on the device of `x`.

    Raises UnavailableError where it cannot: exported programs, and calls of `torch.ops`, come here
    without asking `selection.py`.
    """
    name = "_ops" if x.is_cuda else "_emulated"
    reason = extension.why_not(name)
    if reason is not None:
        raise UnavailableError(f"{operator}: kernels='cuda' cannot run: {reason}; {CURE}")
    return extension.operators(name)


def check_row(operator: str, width: int, piece: int) -> None:
    """Raises UnavailableError where a row of `width` channels, made of pieces, is too wide."""
    widest = WIDEST if piece % 8 == 0 else WIDEST_ODD
    if width > widest:
        raise UnavailableError(
            f"{operator}: kernels='cuda' cannot run: its kernels normalise at most {WIDEST} "
            f"channels, {WIDEST_ODD} where 8 does not divide those of a token, got {width}; {CURE}"
        )


def empty_partial(like: Tensor, rows: int, clips: int, channels: int) -> Tensor:
    """Memory for the sums of each block: float32 [parts, 2, channels], as many parts a clip."""
    parts = max(1, min(-(-rows // ROWS_OF_A_PART), PARTS // clips))
    return torch.empty((clips * parts, 2, channels), dtype=torch.float32, device=like.device)
