"""The recipes by name: every released configuration, one for your own videos, and the demo.

Sources: upstream configs/recognition/swin/swin_*_patch244_window*.py at db018fb, which are built on
configs/_base_/models/swin/*.py; `update_interval` there divides `videos_per_gpu`, so that 8 GPUs
with 8 videos are 64 clips a step. Drop path rates are those files' own, also where the paper has
another (Swin-S: 0.2).
"""

from __future__ import annotations

from dataclasses import replace

from train.data import DataSettings
from train.optim import OptimSettings
from train.recipe import LoopSettings, ModelSettings, Recipe

_KINETICS = DataSettings(root="data/kinetics400")
_CONFIGS = "upstream configs/recognition/swin"


def _released(
    name: str,
    *,
    weights: str,
    drop_path_rate: float,
    lr: float,
    weight_decay: float,
    clips_per_pass: int = 1,
    views_per_pass: int = 4,
) -> Recipe:
    """What the released Kinetics configurations have in common, and what not."""
    return Recipe(
        model=ModelSettings(name=name, weights=weights, drop_path_rate=drop_path_rate),
        data=_KINETICS,
        optim=OptimSettings(lr=lr, weight_decay=weight_decay),
        # apex's O1 is float16 with a scaled loss.
        loop=LoopSettings(
            clips_per_pass=clips_per_pass, precision="float16", views_per_pass=views_per_pass
        ),
    )


_SWIN_B_22K = _released(
    "swin_b",
    weights="in22k",
    drop_path_rate=0.2,
    lr=3e-4,
    weight_decay=0.05,
    views_per_pass=2,
)

RECIPES: dict[str, Recipe] = {
    "swin_t_k400_1k": _released(
        "swin_t",
        weights="in1k",
        drop_path_rate=0.1,
        lr=1e-3,
        weight_decay=0.02,
        clips_per_pass=2,
    ),
    "swin_s_k400_1k": _released(
        "swin_s", weights="in1k", drop_path_rate=0.1, lr=1e-3, weight_decay=0.02
    ),
    "swin_b_k400_1k": _released(
        "swin_b", weights="in1k", drop_path_rate=0.3, lr=1e-3, weight_decay=0.05
    ),
    "swin_b_k400_22k": _SWIN_B_22K,
    "swin_b_k600_22k": replace(_SWIN_B_22K, data=DataSettings(root="data/kinetics600")),
    # One frame of each of 32 segments, one clip and three crops in testing. To push something from
    # left to right is another class than from right to left: nothing is meant to be flipped, and
    # half of all clips are, by upstream's RandAugment. `data.augment_flip=0` mends it.
    "swin_b_w1677_sthv2": Recipe(
        model=ModelSettings(
            name="swin_b_w1677", weights="k400_22k", fresh=("cls_head",), drop_path_rate=0.4
        ),
        data=DataSettings(
            root="data/sthv2",
            sampling="uniform",
            flip=0.0,
            augment="randaugment",
            augment_flip=0.5,
            erase=0.25,
            test_clips=1,
            workers=1,
        ),
        optim=OptimSettings(lr=3e-4, weight_decay=0.05, label_smoothing=0.1),
        loop=LoopSettings(epochs=60, clips_per_pass=1, precision="float16", views_per_pass=2),
    ),
    # No configuration of it was released; these are mmaction2's numbers.
    "swin_l_k400_22k": Recipe(
        model=ModelSettings(name="swin_l", weights="in22k", drop_path_rate=0.4),
        data=replace(_KINETICS, offsets="mmaction2"),
        optim=OptimSettings(lr=1e-3, weight_decay=0.05, groups="mmaction2"),
        loop=LoopSettings(clips_per_pass=8, precision="float16", evaluate_every=3),
    ),
    # Ours, for own videos: a trained model, a quarter of the clips a step at a quarter of the rate,
    # few epochs, tested after each. PyAV, as phones and cameras make files that decord misreads.
    "finetune": Recipe(
        model=ModelSettings(name="swin_t", weights="k400", fresh=("cls_head",)),
        data=DataSettings(root="data/own", reader="pyav"),
        optim=OptimSettings(lr=2.5e-4, schedule="cosine", warmup_epochs=1),
        loop=LoopSettings(
            epochs=15, batch_size=16, clips_per_pass=4, precision="bfloat16", evaluate_every=1
        ),
    ),
    # From scratch, on a CPU, in minutes: small clips, initial weights that suit a width of 64, and
    # a high rate for the bias tables, through which this model comes to see motion. No flip: it
    # would turn left into right.
    "demo": Recipe(
        model=ModelSettings(name="swin_nano", drop_path_rate=0.0, dropout=0.0, init_std=0.12),
        data=DataSettings(
            root="runs/demo-videos",
            clip_len=8,
            interval=4,
            short_side=36,
            crop=32,
            area=(0.6, 1.0),
            flip=0.0,
            test_clips=1,
            test_crops=1,
            test_short_side=36,
            val_short_side=36,
            workers=1,
        ),
        optim=OptimSettings(lr=1e-2, backbone_lr=0.05, warmup_epochs=1),
        loop=LoopSettings(epochs=16, batch_size=16, test_batch_size=32, evaluate_every=4),
    ),
}

# Where the numbers of each are from.
SOURCES: dict[str, str] = {
    "swin_t_k400_1k": f"{_CONFIGS}/swin_tiny_patch244_window877_kinetics400_1k.py",
    "swin_s_k400_1k": f"{_CONFIGS}/swin_small_patch244_window877_kinetics400_1k.py",
    "swin_b_k400_1k": f"{_CONFIGS}/swin_base_patch244_window877_kinetics400_1k.py",
    "swin_b_k400_22k": f"{_CONFIGS}/swin_base_patch244_window877_kinetics400_22k.py",
    "swin_b_k600_22k": f"{_CONFIGS}/swin_base_patch244_window877_kinetics600_22k.py",
    "swin_b_w1677_sthv2": f"{_CONFIGS}/swin_base_patch244_window1677_sthv2.py",
    "swin_l_k400_22k": (
        "mmaction2 1.x configs/recognition/swin/"
        "swin-large-p244-w877_in22k-pre_8xb8-amp-32x2x1-30e_kinetics400-rgb.py"
    ),
    "finetune": "ours, for own videos",
    "demo": "ours, for a CPU",
}


def listing() -> str:
    """A table of the recipes for `python -m train --list`."""
    head = ("recipe", "model", "begins with", "epochs", "clips a step", "rate", "numbers from")
    lines = [
        (
            name,
            recipe.model.name,
            recipe.model.weights or "-",
            f"{recipe.loop.epochs}",
            f"{recipe.loop.batch_size}",
            f"{recipe.optim.lr:g}",
            SOURCES[name],
        )
        for name, recipe in RECIPES.items()
    ]
    widths = [max(map(len, column)) for column in zip(head, *lines, strict=True)]
    return "\n".join(
        "  ".join(f"{word:<{width}}" for word, width in zip(line, widths, strict=True)).rstrip()
        for line in (head, *lines)
    )
