"""`torch.roll` under its name in the paper."""

import torch
from torch import Tensor

from videoswin_kernels.geometry import Triple


def cyclic_shift(x: Tensor, shift: Triple) -> Tensor:
    return torch.roll(x, shift, (1, 2, 3))
