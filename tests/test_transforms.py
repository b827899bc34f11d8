"""Transforms against plain loops in float64, counts of what they draw, and upstream's orders."""

import math

import numpy as np
import pytest
import torch

from train.transforms import (
    MEAN,
    STD,
    EvalTransform,
    TrainTransform,
    center_crop,
    normalize,
    random_resized_crop_box,
    resize,
    resize_short_side,
    three_crop,
)


def frames_of(count: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    """Return random frames, uint8 [count, 3, height, width], strided as a decoder leaves them."""
    generator = np.random.default_rng(seed)
    pixels = generator.integers(256, size=(count, height, width, 3), dtype=np.uint8)
    return torch.from_numpy(pixels).permute(0, 3, 1, 2)


def bilinear(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    """Return `picture`, [H, W], scaled pixel by pixel in float64: the judge of `resize`."""
    old_height, old_width = picture.shape
    result = np.empty((height, width))
    for row in range(height):
        y = min(max((row + 0.5) * old_height / height - 0.5, 0), old_height - 1)
        top = int(y)
        below = min(top + 1, old_height - 1)
        for column in range(width):
            x = min(max((column + 0.5) * old_width / width - 0.5, 0), old_width - 1)
            left = int(x)
            right = min(left + 1, old_width - 1)
            upper = picture[top, left] * (1 - (x - left)) + picture[top, right] * (x - left)
            lower = picture[below, left] * (1 - (x - left)) + picture[below, right] * (x - left)
            result[row, column] = upper * (1 - (y - top)) + lower * (y - top)
    return result


@pytest.mark.parametrize(
    ("old", "new"),
    [((5, 7), (9, 4)), ((7, 5), (3, 11)), ((1, 3), (4, 5)), ((12, 13), (5, 5)), ((4, 4), (9, 9))],
)
@pytest.mark.parametrize("strided", [True, False])
def test_resize_is_the_bilinear_of_loops(old, new, strided):
    frames = frames_of(5, *old)
    result = resize(frames if strided else frames.contiguous(), *new)
    assert result.dtype == torch.uint8
    assert result.shape == (5, 3, *new)
    for frame, got in zip(frames.flatten(0, 1), result.flatten(0, 1), strict=True):
        exact = bilinear(frame.numpy().astype(np.float64), *new)
        # Half a step of rounding, and what is lost of weights of 11 bits and sums of 19.
        assert np.abs(got.numpy() - exact).max() < 0.5 + 0.5


def fixed_point(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    """Return `picture`, [H, W], scaled in the integers that upstream's OpenCV scales in."""

    def weights(old: int, new: int) -> tuple[np.ndarray, ...]:
        place = ((np.arange(new) + 0.5) * (old / new) - 0.5).astype(np.float32)
        first = np.floor(place).astype(np.int64)
        ones, others = (
            np.rint(2048 * w).astype(np.int64) for w in (1 + first - place, place - first)
        )
        return first.clip(0, old - 1), (first + 1).clip(0, old - 1), ones, others

    left, right, ones, others = weights(picture.shape[1], width)
    rows = picture[:, left].astype(np.int64) * ones + picture[:, right] * others
    top, below, ones, others = weights(picture.shape[0], height)
    sums = (ones[:, None] * (rows[top] >> 4) >> 16) + (others[:, None] * (rows[below] >> 4) >> 16)
    return (sums + 2 >> 2).astype(np.uint8)


@pytest.mark.parametrize(
    ("old", "new"),
    [((256, 340), (224, 298)), ((190, 230), (224, 224)), ((97, 131), (36, 49)), ((7, 5), (3, 4))],
)
def test_resize_has_the_bits_of_upstream(old, new):
    (frame,) = frames_of(1, *old)
    (result,) = resize(frame[None], *new)
    for channel, got in zip(frame.numpy(), result.numpy(), strict=True):
        np.testing.assert_array_equal(got, fixed_point(channel, *new))


def test_resize_does_not_smooth_when_shrinking():
    frames = torch.zeros(1, 3, 9, 9, dtype=torch.uint8)
    frames[..., 4, 4] = 255
    # The centre of a 3 x 3 result is the centre of the frame: antialiasing would spread it.
    assert resize(frames, 3, 3)[0, 0].tolist() == [[0, 0, 0], [0, 255, 0], [0, 0, 0]]


def test_resize_to_the_same_size_keeps_the_frames():
    frames = frames_of(2, 6, 8)
    assert resize(frames, 6, 8) is frames


@pytest.mark.parametrize(
    ("height", "width", "size", "expected"),
    [
        (256, 340, 224, (224, 298)),  # 297.5 rounds up
        (340, 256, 224, (298, 224)),
        (240, 320, 256, (256, 341)),
        (5, 5, 8, (8, 8)),
        (96, 128, 64, (64, 85)),
        (49, 67, 49, (49, 67)),
    ],
)
def test_short_side_becomes_the_size(height, width, size, expected):
    assert resize_short_side(frames_of(1, height, width), size).shape[-2:] == expected


def test_boxes_lie_inside_the_frame():
    generator = np.random.default_rng(0)
    for height, width in [(256, 340), (340, 256), (7, 400), (1, 1), (2, 3), (97, 31)]:
        for _ in range(300):
            box = random_resized_crop_box(height, width, generator)
            assert all(isinstance(value, int) for value in box)
            top, left, box_height, box_width = box
            assert top >= 0
            assert left >= 0
            assert box_height >= 1
            assert box_width >= 1
            assert top + box_height <= height
            assert left + box_width <= width


def test_boxes_are_uniform_in_area_and_log_uniform_in_aspect():
    generator = np.random.default_rng(0)
    # At most half of the frame, so that every candidate fits and nothing is selected away.
    boxes = np.array(
        [random_resized_crop_box(800, 800, generator, area=(0.1, 0.5)) for _ in range(4000)]
    )
    top, left, height, width = boxes.T
    area = (height * width / 800**2 - 0.1) / 0.4
    aspect = (np.log(width / height) - math.log(3 / 4)) / math.log(16 / 9)
    for share in (area, aspect, top / (800 - height), left / (800 - width)):
        # Kolmogorov's distance of 4000 uniform draws stays below 0.031 with 99.9 %.
        steps = np.arange(1, len(share) + 1) / len(share)
        assert np.abs(np.sort(share) - steps).max() < 0.035


def test_boxes_touch_all_four_sides():
    generator = np.random.default_rng(0)
    boxes = np.array([random_resized_crop_box(12, 10, generator) for _ in range(2000)])
    top, left, height, width = boxes.T
    assert top.min() == left.min() == 0
    assert (top + height).max() == 12
    assert (left + width).max() == 10


def test_no_fitting_box_leaves_the_central_square():
    generator = np.random.default_rng(0)
    for _ in range(20):
        box = random_resized_crop_box(10, 101, generator, area=(0.9, 1.0))
        assert box == (0, 45, 10, 10)
        box = random_resized_crop_box(101, 10, generator, area=(0.9, 1.0))
        assert box == (45, 0, 10, 10)


@pytest.mark.parametrize(("height", "width", "top", "left"), [(8, 8, 0, 0), (11, 14, 1, 3)])
def test_center_crop_leaves_odd_rests_below_and_right(height, width, top, left):
    frames = frames_of(2, height, width)
    expected = frames[:, :, top : top + 8, left : left + 8]
    assert torch.equal(center_crop(frames, 8), expected)


@pytest.mark.parametrize(
    ("width", "lefts"), [(8, [0, 0, 0]), (9, [0, 0, 0]), (13, [0, 4, 2]), (14, [0, 6, 3])]
)
def test_three_crops_are_first_last_middle(width, lefts):
    frames = frames_of(2, 8, width)
    crops = three_crop(frames, 8)
    assert len(crops) == 3
    for crop, left in zip(crops, lefts, strict=True):
        assert torch.equal(crop, frames[..., left : left + 8])
    upright = frames.transpose(-1, -2)
    for crop, top in zip(three_crop(upright, 8), lefts, strict=True):
        assert torch.equal(crop, upright[..., top : top + 8, :])


def test_crops_larger_than_the_frames_are_refused():
    for crop in (center_crop, three_crop):
        with pytest.raises(ValueError, match=r"at least as large as the crop of 9, got 8 x 12$"):
            crop(frames_of(1, 8, 12), 9)
    with pytest.raises(ValueError, match="one side of the frames must equal the crop of 7"):
        three_crop(frames_of(1, 8, 12), 7)


def test_normalize_is_float64_to_the_roundings_of_float32():
    clips = torch.arange(256, dtype=torch.uint8).repeat(2, 3, 1, 1, 1)
    result = normalize(clips)
    assert result.dtype == torch.float32
    assert result.shape == (2, 3, 1, 1, 256)
    values = np.arange(256)
    for channel in range(3):
        got = result[1, channel, 0, 0].numpy()
        # Upstream's own arithmetic, bit for bit ...
        scale = np.float32(1 / np.float64(STD[channel]))
        expected = (values.astype(np.float32) - np.float32(MEAN[channel])) * scale
        assert np.array_equal(got, expected)
        # ... which is one rounding of a number up to 256, in units of std, from the exact value.
        exact = (values - MEAN[channel]) / STD[channel]
        assert np.abs(got - exact).max() <= (2**-24 * 256 + 2**-23 * 256) / STD[channel]


def test_normalize_takes_other_constants_and_any_leading_dimensions():
    clip = frames_of(4, 5, 6).transpose(0, 1)
    result = normalize(clip, mean=(0, 1, 2), std=(1, 2, 4))
    expected = torch.stack([clip[0].float(), (clip[1].float() - 1) / 2, (clip[2].float() - 2) / 4])
    assert torch.equal(result, expected)
    assert clip.dtype == torch.uint8


def test_train_transform_returns_one_clip():
    frames = frames_of(6, 48, 64)
    transform = TrainTransform(short_side=40, crop=28)
    clip = transform(frames, np.random.default_rng(0))
    assert clip.shape == (3, 6, 28, 28)
    assert clip.dtype == torch.uint8
    assert clip.is_contiguous()
    assert torch.equal(clip, transform(frames, np.random.default_rng(0)))
    assert not torch.equal(clip, transform(frames, np.random.default_rng(1)))


def test_one_box_and_one_flip_serve_the_whole_clip():
    frames = frames_of(1, 48, 64).expand(6, -1, -1, -1)
    generator = np.random.default_rng(0)
    for _ in range(10):
        clip = TrainTransform(40, 28)(frames, generator)
        assert (clip == clip[:, :1]).all()


def test_flip_mirrors_the_clip_it_would_have_been():
    frames = frames_of(3, 48, 64)
    flipped = TrainTransform(40, 28, flip=1.0)(frames, np.random.default_rng(3))
    plain = TrainTransform(40, 28, flip=0.0)(frames, np.random.default_rng(3))
    assert torch.equal(flipped, plain.flip(-1))


def test_flip_comes_with_its_probability():
    # Brightness falls from left to right, so the first column tells.
    frames = torch.arange(255, 0, -4, dtype=torch.uint8).expand(1, 3, 64, 64)
    generator = np.random.default_rng(0)
    transform = TrainTransform(64, 16, area=(0.5, 1.0), flip=0.25)
    flips = [
        bool(clip[0, 0, 0, 0] < clip[0, 0, 0, -1])
        for clip in (transform(frames, generator) for _ in range(600))
    ]
    assert np.mean(flips) == pytest.approx(0.25, abs=0.07)


def test_whole_area_and_square_aspect_crop_nothing():
    frames = frames_of(2, 32, 32)
    transform = TrainTransform(32, 32, area=(1.0, 1.0), aspect=(1.0, 1.0), flip=0.0)
    assert torch.equal(transform(frames, np.random.default_rng(0)), frames.transpose(0, 1))


def test_views_are_ordered_by_crop_and_then_by_clip():
    clips = [frames_of(4, 8, 13, seed) for seed in range(2)]
    views = EvalTransform(short_side=8, crop=8, crops=3)(clips)
    assert views.shape == (6, 3, 4, 8, 8)
    assert views.dtype == torch.uint8
    expected = [clip[..., left : left + 8].transpose(0, 1) for left in (0, 4, 2) for clip in clips]
    assert torch.equal(views, torch.stack(expected))


def test_one_crop_is_the_centre_of_the_resized_frames():
    clips = [frames_of(4, 30, 40, seed) for seed in range(3)]
    views = EvalTransform(short_side=16, crop=14)(clips)
    expected = [center_crop(resize(clip, 16, 21), 14).transpose(0, 1) for clip in clips]
    assert torch.equal(views, torch.stack(expected))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ((256, 224, 2), "crops must be 1 or 3, got 2"),
        ((112, 224, 1), "short_side must be at least the crop of 224, got 112"),
        ((256, 224, 3), "short_side must equal the crop of 224 for 3 crops, got 256"),
    ],
)
def test_impossible_views_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        EvalTransform(*settings)
