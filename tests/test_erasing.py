"""Erased boxes: where and how large they are, and what becomes of the clips."""

import itertools
import math

import numpy as np
import pytest
import torch
from test_augment import is_likely
from torch._subclasses.fake_tensor import FakeTensorMode

from train.augment import erase, erasing_box


def test_a_quarter_of_the_clips_is_erased_and_none_or_all_at_0_and_1():
    generator = np.random.default_rng(0)
    boxes = [erasing_box(224, 224, generator) for _ in range(4000)]
    assert is_likely(sum(box is not None for box in boxes), len(boxes), 0.25)
    never = [erasing_box(224, 224, generator, probability=0) for _ in range(100)]
    assert never == [None] * 100
    always = [erasing_box(224, 224, generator, probability=1) for _ in range(100)]
    assert None not in always


@pytest.mark.parametrize(("height", "width"), [(224, 224), (57, 91), (91, 57)])
def test_boxes_are_inside_and_of_the_asked_area_and_aspect(height, width):
    generator = np.random.default_rng(0)
    boxes = [erasing_box(height, width, generator, probability=1) for _ in range(1500)]
    shares, aspects = [], []
    for top, left, box_height, box_width in filter(None, boxes):
        assert 0 <= top <= height - box_height
        assert 0 <= left <= width - box_width
        assert box_height < height
        assert box_width < width
        # Either side is rounded, by at most half a pixel.
        assert (box_height + 0.5) * (box_width + 0.5) >= 0.02 * height * width
        assert (box_height - 0.5) * (box_width - 0.5) <= height * width / 3
        assert (box_height + 0.5) / (box_width - 0.5) >= 0.3
        assert (box_height - 0.5) / (box_width + 0.5) <= 1 / 0.3
        shares.append(box_height * box_width / height / width)
        aspects.append(box_height / box_width)
    assert min(shares) < 0.025
    assert max(shares) > 0.32
    assert min(aspects) < 0.33
    assert max(aspects) > 3


def test_aspect_is_height_by_width_and_log_uniform():
    generator = np.random.default_rng(0)
    tall = [
        erasing_box(99, 99, generator, probability=1, aspect=(2, 3), area=(0.02, 0.1))
        for _ in range(100)
    ]
    assert all(height > width for _, _, height, width in tall)
    # So small that all candidates fit; a uniform aspect would be above 1 in three of four.
    boxes = [
        erasing_box(224, 224, generator, probability=1, area=(0.02, 0.05)) for _ in range(2000)
    ]
    higher = sum(height > width for _, _, height, width in boxes)
    wider = sum(height < width for _, _, height, width in boxes)
    assert is_likely(higher, higher + wider, 0.5)


def test_area_is_uniform():
    generator = np.random.default_rng(0)
    boxes = [
        erasing_box(224, 224, generator, probability=1, area=(0.1, 0.3), aspect=(1, 1))
        for _ in range(2000)
    ]
    below = sum(height * width < 0.2 * 224 * 224 for _, _, height, width in boxes)
    assert is_likely(below, len(boxes), 0.5)


def test_every_place_is_drawn_equally_often():
    generator = np.random.default_rng(0)
    settings = {"probability": 1, "area": (0.25, 0.25), "aspect": (1, 1)}
    boxes = [erasing_box(4, 4, generator, **settings) for _ in range(1800)]
    for top, left in itertools.product(range(3), repeat=2):
        assert is_likely(boxes.count((top, left, 2, 2)), len(boxes), 1 / 9)


class Scripted:
    """A generator that gives numbers from a list and says no more than it was asked."""

    def __init__(self, chance, areas, aspects, places):
        self.chance = chance
        self.arrays = [np.array(areas), np.log(aspects)]
        self.places = places

    def random(self):
        return self.chance

    def uniform(self, low, high, size):
        array = self.arrays.pop(0)
        assert len(array) == size
        assert np.all((low - 1e-9 <= array) & (array <= high + 1e-9))
        return array

    def integers(self, high, endpoint):
        assert endpoint
        expected, place = self.places.pop(0)
        assert high == expected
        return np.int64(place)


def test_a_worked_example_the_first_box_that_fits():
    # Of 100 x 80: 0.25 are 2000, 20 high and 100 wide: no; 0.32 are 2560, 80.95 high and 31.6 wide.
    areas, aspects = [0.25, 0.32, 0.02], [0.2, 2.56, 1]
    script = Scripted(0.2499, areas, aspects, [(19, 19), (48, 0)])
    box = erasing_box(100, 80, script, attempts=3, aspect=(0.2, 3))
    assert box == (19, 0, 81, 32)
    assert not script.places
    assert erasing_box(100, 80, Scripted(0.25, [], [], []), attempts=3) is None


def test_a_box_as_high_or_as_wide_as_the_frame_does_not_fit():
    settings = {"probability": 1, "area": (0.1, 0.1), "aspect": (1, 1)}
    for seed in range(20):
        # 10 x 10 pixels of 1000.
        assert erasing_box(10, 100, np.random.default_rng(seed), **settings) is None
        assert erasing_box(100, 10, np.random.default_rng(seed), **settings) is None
        assert erasing_box(11, 91, np.random.default_rng(seed), **settings)[2:] == (10, 10)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"probability": 1.5}, r"probability must be in 0\.\.1, got 1\.5"),
        ({"area": (0.5, 0.1)}, r"area must be two positive numbers in order, got \(0\.5, 0\.1\)"),
        ({"aspect": (0, 1)}, r"aspect must be two positive numbers in order, got \(0, 1\)"),
    ],
)
def test_bad_bounds_of_boxes_are_refused(argument, message):
    with pytest.raises(ValueError, match=f"^erasing_box: {message}$"):
        erasing_box(9, 9, np.random.default_rng(0), **argument)


BOXES = [(0, 0, 5, 7), (2, 3, 1, 4), (4, 6, 1, 1), (0, 0, 0, 0), (1, 2, 0, 3), (1, 2, 3, 0)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("strided", [True, False])
def test_erase_is_a_loop_over_boxes(dtype, strided):
    clips = torch.randn(len(BOXES), 5, 3, 2, 7).to(dtype).add_(9).permute(0, 2, 3, 1, 4)
    clips = clips if strided else clips.contiguous()
    clips[1, :, :, 2, 3] = math.nan  # inside: erased all the same
    clips[3, :, :, 2, 3] = math.nan  # outside: kept
    expected = clips.clone()
    for clip, (top, left, height, width) in zip(expected, BOXES, strict=True):
        clip[..., top : top + height, left : left + width] = 0
    result = erase(clips, torch.tensor(BOXES))
    assert result is clips
    assert torch.equal(result.nan_to_num(-1), expected.nan_to_num(-1))
    assert (result == 0).sum() == (35 + 4 + 1) * 6


def test_erase_reads_nothing_back_to_the_host():
    # Neither kind of tensor has values: whoever asked for one would fail.
    clips = torch.empty(2, 3, 4, 5, 7, device="meta")
    assert erase(clips, torch.empty(2, 4, dtype=torch.int64, device="meta")) is clips
    with FakeTensorMode():
        clips = torch.empty(2, 3, 4, 5, 7, device="cuda")
        assert erase(clips, torch.empty(2, 4, dtype=torch.int64, device="cuda")) is clips


def test_erase_of_no_clips():
    clips = torch.empty(0, 3, 2, 5, 7)
    assert erase(clips, torch.empty(0, 4, dtype=torch.int64)) is clips


@pytest.mark.parametrize(
    ("clips", "boxes", "error", "message"),
    [
        (torch.zeros(2, 3, 1, 4, 4).byte(), torch.zeros(2, 4).long(), TypeError, "clips must be"),
        (torch.zeros(2, 3, 1, 4, 4), torch.zeros(2, 4), TypeError, "boxes must be int64"),
        (torch.zeros(2, 3, 4, 4), torch.zeros(2, 4).long(), ValueError, r"clips must be \[B, 3"),
        (torch.zeros(2, 3, 1, 4, 4), torch.zeros(1, 4).long(), ValueError, r"must be \[2, 4\]"),
    ],
)
def test_erase_refuses(clips, boxes, error, message):
    with pytest.raises(error, match=f"^erase: .*{message}"):
        erase(clips, boxes)
