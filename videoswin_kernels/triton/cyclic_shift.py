"""A roll is a gather of rows by `shift_index`."""

from __future__ import annotations

from torch import Tensor

from videoswin_kernels.triton.gather_rows import gather_rows


def launch_cyclic_shift(out: Tensor, x: Tensor, index: Tensor) -> None:
    gather_rows(out, x, index, num_x=len(index))
