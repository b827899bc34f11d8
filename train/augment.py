"""What the recipe for Something-Something v2 does to a clip beside crop and resize.

`RandAugment` works on decoded frames, uint8 [T, 3, H, W]; `erase` on normalised clips, on any
device, with the boxes that `erasing_box` draws. One draw serves all frames of a clip.
Source: `RandAugment` of imgaug 0.4.0, and `RandomErasing` of timm 0.3.2, as
configs/recognition/swin/swin_base_patch244_window1677_sthv2.py of Video-Swin-Transformer has them.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from train.transforms import resize

MAGNITUDES = 30
"""The largest magnitude."""
GRAY = (128, 128, 128)
"""R, G, B of a pixel that comes from outside the frame, or is cut out."""

Operation = Callable[[Image.Image], Image.Image]


class Setting(NamedTuple):
    """What an operation may depend on, the same for all frames of a clip."""

    magnitude: int  # 0 to MAGNITUDES
    sign: int  # -1 or 1, the direction of what has two
    center: tuple[float, float]  # x and y of the square of "cutout", shares of width and height
    height: int  # pixels of a frame
    width: int

    def scaled(self, largest: float) -> float:
        """Return the share of `largest` that the magnitude stands for."""
        # imgaug rounds this quotient to float32, and a pixel can depend on it.
        return self.magnitude * float(np.float32(largest / MAGNITUDES))

    def signed(self, largest: float) -> float:
        """Return `scaled` in the direction of the sign."""
        return self.sign * self.scaled(largest)


def _equalize(image: Image.Image) -> Image.Image:
    """Return `image` with the histogram of every channel flattened.

    imgaug's step leaves out the pixels of 255, `ImageOps.equalize` those of the largest value there
    is. (Below 4096 values imgaug calls the latter; no clip is so small.)
    """
    counts = np.array(image.histogram()).reshape(3, 256)
    step = counts[:, :-1].sum(axis=1, keepdims=True) // 255
    below = counts.cumsum(axis=1) - counts
    table = np.minimum((step // 2 + below) // np.maximum(step, 1), 255)
    is_kept = (step == 0) | (np.count_nonzero(counts, axis=1, keepdims=True) == 1)
    return image.point(np.where(is_kept, np.arange(256), table).ravel().tolist())


def _enhance(kind: type, setting: Setting) -> Operation:
    """Return the `kind` of enhancement by a factor of at most 0.9 above or below 1."""
    factor = 1 + setting.signed(0.9)
    return lambda image: kind(image).enhance(factor)


def _warp(forward: list[list[float]] | np.ndarray) -> Operation:
    """Return the move of pixels from (x, y, 1) to `forward` @ (x, y, 1); the nearest is taken."""
    # In float32, as imgaug's: the last bits can decide which pixel is nearest.
    inverse = np.linalg.inv(np.array(forward, dtype=np.float32))[:2].ravel().tolist()
    affine = Image.Transform.AFFINE
    return lambda image: image.transform(image.size, affine, inverse, fillcolor=GRAY)


def _rotate(setting: Setting) -> Operation:
    """Return a turn by at most 30 degrees about the centre, clockwise if the sign is positive."""
    angle = math.radians(setting.signed(30))
    cos, sin = math.cos(angle), math.sin(angle)
    turn = np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]], dtype=np.float32)
    there, back = np.eye(3, dtype=np.float32), np.eye(3, dtype=np.float32)
    back[:2, 2] = setting.width / 2, setting.height / 2
    there[:2, 2] = -back[:2, 2]
    return _warp(back @ (turn @ there))


def _slope(setting: Setting) -> float:
    """Return pixels of shear per pixel from the top left: tanh of at most 0.3, and not tan."""
    return math.tanh(math.radians(setting.signed(math.degrees(0.3))))


def _cutout(setting: Setting) -> Operation:
    """Return the greying of a square, its side at most 5/8 of the height, where it is in frame."""
    half = setting.scaled(20 / 32) * setting.height / 2
    x, y = setting.center[0] * setting.width, setting.center[1] * setting.height
    box = int(x - half), int(y - half), int(x + half), int(y + half)

    def cut(image: Image.Image) -> Image.Image:
        image = image.copy()
        image.paste(GRAY, box)
        return image

    return cut


OPERATIONS: dict[str, Callable[[Setting], Operation]] = {
    "identity": lambda s: lambda image: image,
    "autocontrast": lambda s: ImageOps.autocontrast,
    "equalize": lambda s: _equalize,
    "invert": lambda s: ImageOps.invert,
    "rotate": _rotate,
    "posterize": lambda s: partial(ImageOps.posterize, bits=8 - int(s.scaled(6))),
    "solarize": lambda s: partial(ImageOps.solarize, threshold=256 - int(s.scaled(256))),
    "color": partial(_enhance, ImageEnhance.Color),
    "contrast": partial(_enhance, ImageEnhance.Contrast),
    "brightness": partial(_enhance, ImageEnhance.Brightness),
    "sharpness": partial(_enhance, ImageEnhance.Sharpness),
    "shear_x": lambda s: _warp([[1, _slope(s), 0], [0, 1, 0], [0, 0, 1]]),
    "shear_y": lambda s: _warp([[1, 0, 0], [_slope(s), 1, 0], [0, 0, 1]]),
    "translate_x": lambda s: _warp([[1, 0, s.signed(0.33) * s.width], [0, 1, 0], [0, 0, 1]]),
    "translate_y": lambda s: _warp([[1, 0, 0], [0, 1, s.signed(0.33) * s.height], [0, 0, 1]]),
    "cutout": _cutout,
    "blur": lambda s: lambda image: image.filter(ImageFilter.BLUR),
    "smooth": lambda s: lambda image: image.filter(ImageFilter.SMOOTH),
}
"""Name -> setting -> operation on a frame: those of imgaug's RandAugment, in its order."""


class Draw(NamedTuple):
    """What is done to one clip, in this order."""

    flip: bool
    box: tuple[int, int, int, int]  # top, left, height, width of what is kept, in pixels
    operations: dict[str, Operation]  # by name, in their order


@dataclass(frozen=True)
class RandAugment:
    """Frames flipped, cropped by a few pixels, and changed by some of 18 operations.

    imgaug's RandAugment begins with a flip and a crop that nobody asked for. So the official recipe
    flips half of the clips and keeps their labels, although its config says flip_ratio=0 and some
    labels name left and right. Both can be turned off here.

    Attributes:
        count: operations per clip, each at most once, in random order.
        magnitude: strength of those that have one, and pixels of 224 that the crop may take from
            each side, 0 to 30.
        flip: probability of a left-right flip; 0 where direction is part of the label.
        crop: whether up to magnitude / 224 of each side is cut off, and the rest resized back.

    Raises:
        ValueError: if a number is out of its range.

    Source: `RandAugment(n=count, m=magnitude)` of imgaug, called once per frame of a clip by
    mmaction2's `Imgaug` with the same random numbers.
    """

    count: int = 4
    magnitude: int = 7
    flip: float = 0.5
    crop: bool = True

    def __post_init__(self) -> None:
        """Raise ValueError for a number out of its range."""
        limits = {"count": len(OPERATIONS), "magnitude": MAGNITUDES, "flip": 1}
        for name, largest in limits.items():
            value = getattr(self, name)
            if not 0 <= value <= largest:
                raise ValueError(f"RandAugment: {name} must be in 0..{largest}, got {value}")

    def __call__(self, frames: torch.Tensor, generator: np.random.Generator) -> torch.Tensor:
        """Return `frames` augmented, all of them in the same way, in new memory.

        Args:
            frames: uint8 [T, 3, H, W], in the memory of the host; not changed.
            generator: source of all that is random, as `draw` takes it.

        Returns:
            uint8 [T, 3, H, W], with the channels of a pixel side by side in memory.

        Raises:
            TypeError: if the frames are not uint8.
            ValueError: if they have another shape.
        """
        if frames.dtype != torch.uint8:
            raise TypeError(
                f"RandAugment: frames must be uint8, got {frames.dtype}; augment before normalize"
            )
        if frames.ndim != 4 or frames.shape[1] != 3 or 0 in frames.shape:
            raise ValueError(
                f"RandAugment: frames must be [T, 3, H, W] and not empty, got {list(frames.shape)}"
            )
        height, width = frames.shape[-2:]
        flip, (top, left, box_height, box_width), operations = self.draw(height, width, generator)
        if flip:
            frames = frames.flip(-1)
        frames = frames[..., top : top + box_height, left : left + box_width]
        pixels = resize(frames, height, width).permute(0, 2, 3, 1).numpy()
        result = np.empty_like(pixels, order="C")
        for frame, place in zip(pixels, result, strict=True):
            image = Image.fromarray(frame)
            for operation in operations.values():
                image = operation(image)
            place[...] = image
        return torch.from_numpy(result).permute(0, 3, 1, 2)

    def draw(self, height: int, width: int, generator: np.random.Generator) -> Draw:
        """Return what is done to a clip of frames of `height` x `width` pixels.

        The same numbers are drawn whatever comes of them: one for the flip; four for the pixels
        off the top, right, bottom and left; an order of all operations, of which the first `count`
        are done; a sign for each of these; x and y of the square of "cutout".
        """
        flip = generator.random() < self.flip
        shares = generator.uniform(0, self.magnitude / 224, size=4) * self.crop
        pixels = np.rint(shares * (height, width, height, width)).astype(int)
        top, right, bottom, left = pixels.tolist()
        order = generator.permutation(list(OPERATIONS))[: self.count].tolist()
        signs = generator.choice((-1, 1), size=self.count).tolist()
        center = tuple(generator.random(2).tolist())
        operations = {
            name: OPERATIONS[name](Setting(self.magnitude, sign, center, height, width))
            for name, sign in zip(order, signs, strict=True)
        }
        return Draw(flip, (top, left, height - top - bottom, width - left - right), operations)


def erasing_box(
    height: int,
    width: int,
    generator: np.random.Generator,
    *,
    probability: float = 0.25,
    area: tuple[float, float] = (0.02, 1 / 3),
    aspect: tuple[float, float] = (0.3, 1 / 0.3),
    attempts: int = 10,
) -> tuple[int, int, int, int] | None:
    """Return a random box smaller than a frame of `height` x `width` pixels, or None.

    It is None with 1 - `probability`. Else boxes are drawn, their share of the frame's area
    uniform over `area`, their height / width log-uniform over `aspect`; the first whose rounded
    sides are both shorter than the frame's is placed uniformly. It is None again if none is. In
    frames of a few pixels a side can round to 0: nothing is then erased.

    Returns:
        (top, left, height, width) in pixels.

    Raises:
        ValueError: if a number is out of its range.

    Source: `RandomErasing._erase` with mode="const" and count=1.
    """
    if not 0 <= probability <= 1:
        raise ValueError(f"erasing_box: probability must be in 0..1, got {probability}")
    for name, (least, most) in {"area": area, "aspect": aspect}.items():
        if not 0 < least <= most:
            raise ValueError(
                f"erasing_box: {name} must be two positive numbers in order, got {(least, most)}"
            )
    if generator.random() >= probability:
        return None
    areas = generator.uniform(*area, size=attempts) * height * width
    aspects = np.exp(generator.uniform(math.log(aspect[0]), math.log(aspect[1]), size=attempts))
    heights = np.rint(np.sqrt(areas * aspects)).astype(int).tolist()
    widths = np.rint(np.sqrt(areas / aspects)).astype(int).tolist()
    for box_height, box_width in zip(heights, widths, strict=True):
        if box_height < height and box_width < width:
            top = int(generator.integers(height - box_height, endpoint=True))
            left = int(generator.integers(width - box_width, endpoint=True))
            return top, left, box_height, box_width
    return None


def erase(clips: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
    """Return `clips` itself with 0, after `normalize` the mean colour, in the box of each clip.

    Equivalent to:
        for clip, (top, left, height, width) in zip(clips, boxes.tolist()):
            clip[..., top : top + height, left : left + width] = 0

    without waiting for the device to tell the boxes.

    Args:
        clips: floating [B, 3, T, H, W], normalised; changed in place.
        boxes: int64 [B, 4] on the device of `clips`: top, left, height and width in pixels;
            a height or width of 0 erases nothing.

    Raises:
        TypeError: if the clips are not floating, or the boxes not int64.
        ValueError: if a shape is another.
    """
    if not clips.is_floating_point():
        raise TypeError(
            f"erase: clips must be floating, got {clips.dtype}; use normalize first, 0 is its mean"
        )
    if boxes.dtype != torch.int64:
        raise TypeError(f"erase: boxes must be int64, got {boxes.dtype}")
    if clips.ndim != 5:
        raise ValueError(f"erase: clips must be [B, 3, T, H, W], got {list(clips.shape)}")
    if boxes.shape != (len(clips), 4):
        raise ValueError(f"erase: boxes must be [{len(clips)}, 4], got {list(boxes.shape)}")
    rows, columns = (torch.arange(length, device=clips.device) for length in clips.shape[-2:])
    top, left, height, width = boxes.unsqueeze(-1).unbind(1)  # each [B, 1]
    is_row = (top <= rows) & (rows < top + height)  # [B, H]
    is_column = (left <= columns) & (columns < left + width)  # [B, W]
    return clips.masked_fill_((is_row[:, :, None] & is_column[:, None])[:, None, None], 0)
