"""A roll is a gather of rows by `shift_index`."""

from __future__ import annotations

from torch import Tensor

from videoswin_kernels.cpu._launch import library


def launch_cyclic_shift(out: Tensor, x: Tensor, index: Tensor) -> None:
    library("cyclic_shift").gather_rows(out, x, index, len(index))
