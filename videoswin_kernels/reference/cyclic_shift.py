"""`torch.roll` under its name in the paper."""

import torch
from torch import Tensor

from videoswin_kernels.geometry import Triple


def cyclic_shift(x: Tensor, shift: Triple) -> Tensor:
    # Within the grid first: torch takes no integer beyond 64 bits, and a shift may be any.
    shift = [s % size for s, size in zip(shift, x.shape[1:4], strict=True)]
    return torch.roll(x, shift, (1, 2, 3))
