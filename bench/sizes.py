"""Stages of the released models on a clip, from their configurations alone."""

from __future__ import annotations

from model.variants import VARIANTS
from videoswin_kernels.testing import Case, Stage, Triple

# Channels, frames, height and width of the clip that the released models were trained on.
CLIP = (3, 32, 224, 224)


def stages(model: str, clip: tuple[int, ...] = CLIP, window: Triple | None = None) -> list[Stage]:
    """The stages of a model, each with the shift of its odd blocks.

    Args:
        model: a name of `model.variants`.
        clip: channels, frames, height and width.
        window: in place of the model's own.
    """
    config = VARIANTS[model]
    window = window or config["window_size"]
    shift = tuple(size // 2 for size in window)
    depth, height, width = (-(-n // p) for n, p in zip(clip[1:], config["patch_size"], strict=True))
    found = []
    for number, heads in enumerate(config["num_heads"]):
        case = Case((depth, height, width), window, shift)
        found.append(Stage(case, config["embed_dim"] << number, heads))
        height, width = -(-height // 2), -(-width // 2)
    return found


def depths(model: str) -> tuple[int, ...]:
    """Blocks of each stage, of which every other one is shifted."""
    return VARIANTS[model]["depths"]
