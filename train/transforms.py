"""From decoded frames to the clips a model reads: resize, crop, flip, normalise.

Frames are uint8 [T, 3, H, W]; clips are uint8 [3, T, H, W]. One box and one flip serve all frames
of a clip. Source: mmaction/datasets/pipelines/augmentations.py and formating.py of mmaction2 0.15.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType

import numpy as np
import torch

MEAN = (123.675, 116.28, 103.53)
"""Mean of R, G, B over ImageNet on the scale 0..255."""
STD = (58.395, 57.12, 57.375)
"""Standard deviation of R, G, B over ImageNet on the scale 0..255."""


def resize(frames: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Return `frames` scaled to `height` x `width` pixels, whatever their aspect.

    By OpenCV, as upstream: bilinear, pixel centres aligned, no antialiasing, weights of 11 bits. In
    floating point an eighth of all pixels would be another by 1.

    Args:
        frames: uint8 [T, 3, H, W]; those of a decoder, [T, H, W, 3] in memory, are not copied.
        height: pixels.
        width: pixels.

    Returns:
        uint8 [T, 3, height, width], [T, height, width, 3] in memory; `frames` itself if it has
        this size.

    Source: `Resize`.
    """
    if frames.shape[-2:] == (height, width):
        return frames
    cv2 = _opencv()
    scaled = np.empty((len(frames), height, width, 3), dtype=np.uint8)
    for frame, out in zip(frames.permute(0, 2, 3, 1).numpy(), scaled, strict=True):
        cv2.resize(frame, (width, height), dst=out, interpolation=cv2.INTER_LINEAR)
    return torch.from_numpy(scaled).permute(0, 3, 1, 2)


def _opencv() -> ModuleType:
    """OpenCV, imported at the first use: what runs on batches does without."""
    import cv2

    # Processes read side by side; and its threads would not survive a fork.
    cv2.setNumThreads(0)
    return cv2


def resize_short_side(frames: torch.Tensor, size: int) -> torch.Tensor:
    """Return `frames` scaled so that the shorter side has `size` pixels, keeping the aspect.

    Both sides are multiplied by ``size / min(H, W)`` and rounded half up.

    Args:
        frames: uint8 [T, 3, H, W].
        size: pixels.

    Returns:
        uint8 [T, 3, h, w] with min(h, w) = size.

    Source: `Resize` with scale=(-1, size).
    """
    height, width = frames.shape[-2:]
    factor = size / min(height, width)
    return resize(frames, int(height * factor + 0.5), int(width * factor + 0.5))


def random_resized_crop_box(
    height: int,
    width: int,
    generator: np.random.Generator,
    area: tuple[float, float] = (0.08, 1.0),
    aspect: tuple[float, float] = (3 / 4, 4 / 3),
) -> tuple[int, int, int, int]:
    """Return a random box inside a frame of `height` x `width` pixels.

    Ten candidates are drawn, their share of the frame's area uniform over `area`, their width /
    height log-uniform over `aspect`; the first that fits is placed uniformly. If none fits, the
    box is the centred square of the shorter side.

    Returns:
        (top, left, height, width) in pixels.

    Source: `RandomResizedCrop.get_crop_bbox`.
    """
    aspects = np.exp(generator.uniform(math.log(aspect[0]), math.log(aspect[1]), size=10))
    areas = generator.uniform(*area, size=10) * height * width
    widths = np.round(np.sqrt(areas * aspects)).astype(np.int64)
    heights = np.round(np.sqrt(areas / aspects)).astype(np.int64)
    for box_height, box_width in zip(heights.tolist(), widths.tolist(), strict=True):
        # Rounding can leave nothing of a box in a frame of a few pixels.
        if 1 <= box_height <= height and 1 <= box_width <= width:
            left = int(generator.integers(width - box_width, endpoint=True))
            top = int(generator.integers(height - box_height, endpoint=True))
            return top, left, box_height, box_width
    side = min(height, width)
    return (height - side) // 2, (width - side) // 2, side, side


def center_crop(frames: torch.Tensor, size: int) -> torch.Tensor:
    """Return the central `size` x `size` pixels of `frames` as a view; odd rests go right, below.

    Args:
        frames: [T, 3, H, W] with H and W at least `size`.
        size: pixels.

    Raises:
        ValueError: if the frames are smaller than the crop.

    Source: `CenterCrop`.
    """
    height, width = frames.shape[-2:]
    _check_crop("center_crop", height, width, size)
    return _crop(frames, (height - size) // 2, (width - size) // 2, size, size)


def three_crop(frames: torch.Tensor, size: int) -> list[torch.Tensor]:
    """Return three `size` x `size` crops along the longer side: first end, last end, middle.

    The order, left, right, middle (or top, bottom, middle), is upstream's, as is the step of
    ``(length - size) // 2``: an odd rest leaves the last column or row unused.

    Args:
        frames: [T, 3, H, W], one side equal to `size`, the other at least `size`.
        size: pixels.

    Returns:
        three views [T, 3, size, size].

    Raises:
        ValueError: if the frames are smaller than the crop, or no side equals it.

    Source: `ThreeCrop`.
    """
    height, width = frames.shape[-2:]
    _check_crop("three_crop", height, width, size)
    if size not in (height, width):
        raise ValueError(
            f"three_crop: one side of the frames must equal the crop of {size}, "
            f"got {height} x {width}"
        )
    if size == height:
        step = (width - size) // 2
        return [_crop(frames, 0, left, size, size) for left in (0, 2 * step, step)]
    step = (height - size) // 2
    return [_crop(frames, top, 0, size, size) for top in (0, 2 * step, step)]


def normalize(
    clips: torch.Tensor,
    mean: Sequence[float] = MEAN,
    std: Sequence[float] = STD,
) -> torch.Tensor:
    """Return ``(clips - mean) * (1 / std)`` per channel, the reciprocal rounded from float64.

    Args:
        clips: uint8 [..., 3, T, H, W], on any device.
        mean: one value per channel, on the scale 0..255.
        std: one value per channel, on the scale 0..255.

    Returns:
        float32 [..., 3, T, H, W] on the device of `clips`.

    Source: `Normalize` (mmcv.imnormalize_).
    """
    constants = np.array([mean, 1 / np.array(std, dtype=np.float64)], dtype=np.float32)
    center, scale = torch.from_numpy(constants).to(clips.device)[:, :, None, None, None]
    return clips.to(torch.float32).sub_(center).mul_(scale)


@dataclass(frozen=True)
class TrainTransform:
    """One randomly cropped and flipped clip from the frames of a video.

    Attributes:
        short_side: pixels of the shorter side before the box is drawn.
        crop: pixels of both sides of the result.
        area: least and largest share of the frame the box covers.
        aspect: least and largest width / height of the box.
        flip: probability of a left-right flip; 0 where direction is part of the label.
        augment: what is done to the frames then, uint8 [T, 3, H, W]; None nothing.
    """

    short_side: int = 256
    crop: int = 224
    area: tuple[float, float] = (0.08, 1.0)
    aspect: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    augment: Callable[[torch.Tensor, np.random.Generator], torch.Tensor] | None = None

    def __call__(self, frames: torch.Tensor, generator: np.random.Generator) -> torch.Tensor:
        """Return one clip, uint8 [3, T, crop, crop], of `frames`, uint8 [T, 3, H, W]."""
        frames = resize_short_side(frames, self.short_side)
        box = random_resized_crop_box(*frames.shape[-2:], generator, self.area, self.aspect)
        frames = resize(_crop(frames, *box), self.crop, self.crop)
        if generator.random() < self.flip:
            frames = frames.flip(-1)
        if self.augment:
            frames = self.augment(frames, generator)
        return frames.transpose(0, 1).contiguous()


@dataclass(frozen=True)
class EvalTransform:
    """The views of a video that a prediction is averaged over; nothing is random.

    The official recipes: 256 with one crop of 224 for validation, and 224 with three for testing.

    Attributes:
        short_side: pixels of the shorter side after resizing; equal to `crop` for three crops.
        crop: pixels of both sides of a view.
        crops: views per clip, 1 (centre) or 3 (`three_crop`).
    """

    short_side: int = 256
    crop: int = 224
    crops: int = 1

    def __post_init__(self) -> None:
        """Raise ValueError for a number of crops, or a size, that no frame can serve."""
        if self.crops not in (1, 3):
            raise ValueError(f"EvalTransform: crops must be 1 or 3, got {self.crops}")
        if self.short_side < self.crop:
            raise ValueError(
                f"EvalTransform: short_side must be at least the crop of {self.crop}, "
                f"got {self.short_side}"
            )
        if self.crops == 3 and self.short_side != self.crop:
            raise ValueError(
                f"EvalTransform: short_side must equal the crop of {self.crop} for 3 crops, "
                f"got {self.short_side}"
            )

    def __call__(self, clips: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return all views of `clips`, the frames of each clip being uint8 [T, 3, H, W].

        Returns:
            uint8 [crops * len(clips), 3, T, crop, crop], the first crop of every clip first.
        """
        cut = three_crop if self.crops == 3 else lambda frames, size: [center_crop(frames, size)]
        views = [cut(resize_short_side(frames, self.short_side), self.crop) for frames in clips]
        crop_major = [views[clip][crop] for crop in range(self.crops) for clip in range(len(clips))]
        return torch.stack(crop_major).transpose(1, 2).contiguous()


def _crop(frames: torch.Tensor, top: int, left: int, height: int, width: int) -> torch.Tensor:
    """Return the box of `frames` as a view."""
    return frames[..., top : top + height, left : left + width]


def _check_crop(function: str, height: int, width: int, size: int) -> None:
    """Raise ValueError unless a frame of `height` x `width` holds a square of `size`."""
    if min(height, width) < size:
        raise ValueError(
            f"{function}: frames must be at least as large as the crop of {size}, "
            f"got {height} x {width}"
        )
