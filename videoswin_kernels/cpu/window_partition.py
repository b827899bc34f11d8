"""Partition gathers rows by `source`, its way back by `target`."""

from __future__ import annotations

from torch import Tensor

from videoswin_kernels.cpu._launch import library
from videoswin_kernels.ops._vectors import WindowVectors


def launch_window_partition(out: Tensor, x: Tensor, vectors: WindowVectors) -> None:
    library("window_partition").gather_rows(out, x, vectors.source, len(vectors.target))


def launch_window_reverse(out: Tensor, windows: Tensor, vectors: WindowVectors) -> None:
    library("window_reverse").gather_rows(out, windows, vectors.target, len(vectors.source))
