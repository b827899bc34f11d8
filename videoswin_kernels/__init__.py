"""Kernels of Video Swin Transformer: 3-D shifted windows, attention in them, patch merging.

Every operator takes `kernels=`, the word that says which implementation runs; `explain` and
`python -m videoswin_kernels` tell what that is on this machine.
"""

from videoswin_kernels.accelerate import accelerate
from videoswin_kernels.geometry import WindowGeometry
from videoswin_kernels.ops.attention import window_attention
from videoswin_kernels.ops.cyclic_shift import cyclic_shift
from videoswin_kernels.ops.patch_merging import patch_merging
from videoswin_kernels.ops.residual_norm import residual_norm
from videoswin_kernels.ops.window_partition import window_partition, window_reverse
from videoswin_kernels.selection import explain

__version__ = "0.1.0"
__all__ = [
    "WindowGeometry",
    "accelerate",
    "cyclic_shift",
    "explain",
    "patch_merging",
    "residual_norm",
    "window_attention",
    "window_partition",
    "window_reverse",
]
