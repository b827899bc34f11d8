"""Partition gathers rows by `source`, its way back by `target`."""

from __future__ import annotations

from torch import Tensor

from videoswin_kernels.ops._vectors import WindowVectors
from videoswin_kernels.triton.gather_rows import gather_rows


def launch_window_partition(out: Tensor, x: Tensor, vectors: WindowVectors) -> None:
    gather_rows(out, x, vectors.source, num_x=len(vectors.target))


def launch_window_reverse(out: Tensor, windows: Tensor, vectors: WindowVectors) -> None:
    gather_rows(out, windows, vectors.target, num_x=len(vectors.source))
