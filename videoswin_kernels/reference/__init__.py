"""The meaning of every operator in plain PyTorch, on any device and in any floating-point dtype.

Written from the formulas of the paper and of upstream (pad, roll, rearrange, index table, mask,
softmax), not from the vectors of `geometry.py`, so that the two can judge each other.
"""

from videoswin_kernels.reference.attention import window_attention
from videoswin_kernels.reference.cyclic_shift import cyclic_shift
from videoswin_kernels.reference.patch_merging import patch_merging
from videoswin_kernels.reference.residual_norm import residual_norm
from videoswin_kernels.reference.window_partition import window_partition, window_reverse

__all__ = [
    "cyclic_shift",
    "patch_merging",
    "residual_norm",
    "window_attention",
    "window_partition",
    "window_reverse",
]
