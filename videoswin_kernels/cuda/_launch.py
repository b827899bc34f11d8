"""What the launchers share: the library that runs where a tensor is, and memory for sums."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from videoswin_kernels import extension
from videoswin_kernels.selection import CURE, UnavailableError

# Blocks of a first stage, about, or one a clip where clips are more. Not taken from the card: a
# gradient is to be the same bits on every one.
PARTS = 1024
# Rows of a block, at least; of a wider row a block has one at a time, and each waits for the last.
ROWS_OF_A_PART, ROWS_IF_WIDE, WIDE = 32, 8, 1024


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


def empty_partial(like: Tensor, rows: int, clips: int, channels: int) -> Tensor:
    """Memory for the sums of each block: float32 [parts, 2, channels], as many parts a clip."""
    least = ROWS_IF_WIDE if channels > WIDE else ROWS_OF_A_PART
    parts = max(1, min(-(-rows // least), PARTS // clips))
    return torch.empty((clips * parts, 2, channels), dtype=torch.float32, device=like.device)
