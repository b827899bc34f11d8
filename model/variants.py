"""The released sizes of Video Swin by name, and one small enough for a CPU."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from model.video_swin import SwinTransformer3D, VideoSwin
from model.weights import load_weights
from model.weights.download import locate

# Every released model: patches of 2x4x4 with a norm, head width 32.
# Sources: upstream configs/_base_/models/swin/*.py and configs/recognition/swin/*.py at db018fb.
_COMMON = dict(patch_size=(2, 4, 4), patch_norm=True, window_size=(8, 7, 7))
VARIANTS: dict[str, dict[str, Any]] = {
    "swin_t": dict(
        _COMMON, embed_dim=96, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24), drop_path_rate=0.1
    ),
    "swin_s": dict(
        _COMMON, embed_dim=96, depths=(2, 2, 18, 2), num_heads=(3, 6, 12, 24), drop_path_rate=0.1
    ),
    "swin_b": dict(
        _COMMON, embed_dim=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32), drop_path_rate=0.3
    ),
    # No training configuration was released for swin_l; its rate is mmaction2's.
    "swin_l": dict(
        _COMMON, embed_dim=192, depths=(2, 2, 18, 2), num_heads=(6, 12, 24, 48), drop_path_rate=0.4
    ),
    # Something-Something V2: a window of 16 frames' tokens.
    "swin_b_w1677": dict(
        _COMMON,
        embed_dim=128,
        depths=(2, 2, 18, 2),
        num_heads=(4, 8, 16, 32),
        window_size=(16, 7, 7),
        drop_path_rate=0.4,
    ),
    # Ours, for demos and tests: two stages, trained in minutes on a CPU.
    "swin_nano": dict(
        _COMMON,
        embed_dim=64,
        depths=(2, 2),
        num_heads=(2, 4),
        window_size=(4, 4, 4),
        drop_path_rate=0.0,
    ),
}


def create(
    name: str,
    *,
    num_classes: int | None = None,
    weights: str | Path | Mapping[str, Any] | None = None,
    fresh: Collection[str] = (),
    interpolate_time: bool = False,
    kernels: str = "auto",
    **overrides: Any,
) -> SwinTransformer3D | VideoSwin:
    """A model by name: the backbone, or with `num_classes` the classifier over it.

    Args:
        name: "swin_t", "swin_s", "swin_b", "swin_l", "swin_b_w1677" or "swin_nano".
        num_classes: classes of the head; None returns the bare backbone.
        weights: what to begin with: a name of `model.weights.catalogue`, such as "k400" (upstream's
            Kinetics-400) or "in1k" (2-D ImageNet), which is downloaded once; a URL; a file; or a
            state dict. None draws them.
        fresh, interpolate_time: as `load_weights` takes them; `fresh=("cls_head",)` for weights
            of other classes.
        kernels: which implementation runs the operators (`videoswin_kernels.selection`).
        overrides: further arguments of `SwinTransformer3D`; `dropout` goes to the head (0.5).

    Raises:
        ValueError: an unknown name, of a model or of weights, or a value the model refuses.
        WeightsError: the weights cannot be had, read or used.
        TypeError: an override the model does not have.
    """
    if name not in VARIANTS:
        raise ValueError(f"create: name must be one of {', '.join(VARIANTS)}, got {name!r}")
    if weights is None and (fresh or interpolate_time):
        raise TypeError("create: fresh and interpolate_time belong to weights, which are None")
    if isinstance(weights, (str, Path)):
        weights = locate(name, weights)
    head = {"dropout": overrides.pop("dropout")} if "dropout" in overrides else {}
    if head and num_classes is None:
        raise TypeError("create: dropout belongs to the head, which needs num_classes")
    backbone = SwinTransformer3D(**{**VARIANTS[name], "kernels": kernels, **overrides})
    model = backbone if num_classes is None else VideoSwin(backbone, num_classes, **head)
    if weights is not None:
        load_weights(model, weights, fresh=fresh, interpolate_time=interpolate_time)
    return model
