"""Released weights by name.

Sources: the tables of upstream's README at db018fb, of microsoft/Swin-Transformer's, and of
mmaction2 1.x; torchvision `models/video/swin_transformer.py`.
"""

from __future__ import annotations

import re

_UPSTREAM = "https://github.com/SwinTransformer/storage/releases/download"
_TORCHVISION = "https://download.pytorch.org/models"
_MMACTION = "https://download.openmmlab.com/mmaction/v1.0/recognition/swin"
_LARGE = "swin-large-p244-w877_in22k-pre_{}-amp-32x2x1-30e_{}-rgb"
_LARGE_K400 = _LARGE.format("8xb8", "kinetics400")
_LARGE_K700 = _LARGE.format("16xb8", "kinetics700")

# Data trained on, then data of the 2-D weights it began with where there are two such files; in1k
# and in22k are the 2-D weights themselves. Upstream released no video weights of swin_l.
CATALOGUE: dict[str, dict[str, str]] = {
    "swin_t": {
        "k400": f"{_UPSTREAM}/v1.0.4/swin_tiny_patch244_window877_kinetics400_1k.pth",
        "k400_torchvision": f"{_TORCHVISION}/swin3d_t-7615ae03.pth",
        "in1k": f"{_UPSTREAM}/v1.0.0/swin_tiny_patch4_window7_224.pth",
        "in22k": f"{_UPSTREAM}/v1.0.8/swin_tiny_patch4_window7_224_22k.pth",
    },
    "swin_s": {
        "k400": f"{_UPSTREAM}/v1.0.4/swin_small_patch244_window877_kinetics400_1k.pth",
        "k400_torchvision": f"{_TORCHVISION}/swin3d_s-da41c237.pth",
        "in1k": f"{_UPSTREAM}/v1.0.0/swin_small_patch4_window7_224.pth",
        "in22k": f"{_UPSTREAM}/v1.0.8/swin_small_patch4_window7_224_22k.pth",
    },
    "swin_b": {
        "k400": f"{_UPSTREAM}/v1.0.4/swin_base_patch244_window877_kinetics400_1k.pth",
        "k400_22k": f"{_UPSTREAM}/v1.0.4/swin_base_patch244_window877_kinetics400_22k.pth",
        "k600_22k": f"{_UPSTREAM}/v1.0.4/swin_base_patch244_window877_kinetics600_22k.pth",
        "k400_torchvision": f"{_TORCHVISION}/swin3d_b_1k-24f7c7c6.pth",
        "k400_22k_torchvision": f"{_TORCHVISION}/swin3d_b_22k-7c6ae6fa.pth",
        "in1k": f"{_UPSTREAM}/v1.0.0/swin_base_patch4_window7_224.pth",
        "in22k": f"{_UPSTREAM}/v1.0.0/swin_base_patch4_window7_224_22k.pth",
    },
    "swin_b_w1677": {
        "ssv2": f"{_UPSTREAM}/v1.0.4/swin_base_patch244_window1677_sthv2.pth",
        "k400_22k": f"{_UPSTREAM}/v1.0.4/swin_base_patch244_window1677_kinetics400_22k.pth",
        "in1k": f"{_UPSTREAM}/v1.0.0/swin_base_patch4_window7_224.pth",
        "in22k": f"{_UPSTREAM}/v1.0.0/swin_base_patch4_window7_224_22k.pth",
    },
    "swin_l": {
        "k400_22k": f"{_MMACTION}/{_LARGE_K400}/{_LARGE_K400}_20220930-78ad8b11.pth",
        "k700_22k": f"{_MMACTION}/{_LARGE_K700}/{_LARGE_K700}_20220930-f8d74db7.pth",
        "in22k": f"{_UPSTREAM}/v1.0.0/swin_large_patch4_window7_224_22k.pth",
    },
}


def is_known(url: str) -> bool:
    """Whether a name leads to this URL; the files of all of them have different names."""
    return any(url in names.values() for names in CATALOGUE.values())


def digest_of(url: str) -> str | None:
    """The beginning of a file's SHA-256 that torchvision and mmaction2 put into its name."""
    found = re.search(r"-([0-9a-f]{8})\.pth$", url)
    return found[1] if found and url.startswith((_TORCHVISION, _MMACTION)) else None
