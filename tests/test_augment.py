"""Operations against loops over pixels and worked numbers, draws by count, boxes by bounds."""

import itertools
import math

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from train import augment
from train.augment import GRAY, OPERATIONS, RandAugment, Setting
from train.transforms import resize

# imgaug's order; a test of ours would not see it if the names were taken from the table.
NAMES = [
    *("identity", "autocontrast", "equalize", "invert", "rotate", "posterize", "solarize"),
    *("color", "contrast", "brightness", "sharpness", "shear_x", "shear_y"),
    *("translate_x", "translate_y", "cutout", "blur", "smooth"),
]
CENTER = (0.5, 0.25)


def picture_of(height=23, width=31, seed=0, least=0, most=255):
    """Return random pixels, uint8 [height, width, 3]."""
    generator = np.random.default_rng(seed)
    return generator.integers(least, most + 1, size=(height, width, 3), dtype=np.uint8)


def frames_of(count, height, width, seed=0):
    """Return random frames, uint8 [count, 3, height, width], strided as a decoder leaves them."""
    pixels = np.stack([picture_of(height, width, seed + index) for index in range(count)])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2)


def applied(name, picture, magnitude=7, sign=1, center=CENTER):
    """Return `picture` after one operation."""
    operation = OPERATIONS[name](Setting(magnitude, sign, center, *picture.shape[:2]))
    return np.asarray(operation(Image.fromarray(picture)))


def weighted(picture, kernel):
    """Return the weighted mean of neighbours, rounded; pixels without all neighbours are kept."""
    reach = len(kernel) // 2
    result = picture.copy()
    height, width, _ = picture.shape
    for y, x, c in itertools.product(
        range(reach, height - reach), range(reach, width - reach), range(3)
    ):
        area = picture[y - reach : y + reach + 1, x - reach : x + reach + 1, c]
        result[y, x, c] = math.floor((area * kernel).sum() / kernel.sum() + 0.5)
    return result


def smoothed(picture):
    return weighted(picture, np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]]))


def gray(picture):
    """Return the luma of ITU-R 601, rounded, as [H, W, 1]."""
    return np.floor(picture @ np.array([0.299, 0.587, 0.114]) + 0.5)[..., None]


def equalized(channel):
    """Return `channel` spread by its histogram, with loops over values and pixels."""
    counts = [int((channel == value).sum()) for value in range(256)]
    step = sum(counts[:255]) // 255
    if step == 0 or sum(count > 0 for count in counts) == 1:
        return channel
    table = [min((step // 2 + sum(counts[:value])) // step, 255) for value in range(256)]
    return np.array([[table[value] for value in row] for row in channel])


def is_cut_down(got, exact):
    """Whether `got` is `exact` without its fraction; float32 may stand just below a whole one."""
    return bool(np.all((got > exact - 1 - 1e-3) & (got <= exact + 1e-3)))


# The operations.


def test_the_operations_are_the_18_of_imgaug():
    assert list(OPERATIONS) == NAMES


def test_identity_changes_nothing():
    picture = picture_of()
    assert np.array_equal(applied("identity", picture), picture)


def test_invert_counts_down_from_255():
    picture = picture_of()
    assert np.array_equal(applied("invert", picture), 255 - picture)


@pytest.mark.parametrize(
    ("magnitude", "unit"), [(0, 1), (4, 1), (5, 2), (7, 2), (10, 4), (15, 8), (29, 32), (30, 64)]
)
def test_posterize_keeps_multiples(magnitude, unit):
    picture = picture_of()
    assert np.array_equal(applied("posterize", picture, magnitude), picture // unit * unit)


@pytest.mark.parametrize(
    ("magnitude", "threshold"), [(0, 256), (1, 248), (7, 197), (15, 128), (29, 9), (30, 0)]
)
def test_solarize_inverts_from_its_threshold_on(magnitude, threshold):
    picture = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    expected = [v if v < threshold else 255 - v for v in range(256)]
    got = applied("solarize", picture, magnitude)
    assert all(got[..., channel].ravel().tolist() == expected for channel in range(3))


def test_autocontrast_spreads_every_channel_by_itself():
    picture = picture_of(least=40, most=180)
    picture[..., 1] //= 2
    least, most = picture.min(axis=(0, 1)), picture.max(axis=(0, 1))
    exact = (picture - least.astype(float)) * 255 / (most - least.astype(float))
    got = applied("autocontrast", picture)
    assert is_cut_down(got, exact)
    assert got.min() == 0


@pytest.mark.parametrize("most", [255, 120])
def test_equalize_is_that_of_loops(most):
    picture = picture_of(37, 41).clip(30, most)
    expected = np.stack([equalized(picture[..., channel]) for channel in range(3)], axis=-1)
    assert np.array_equal(applied("equalize", picture), expected)
    # Pillow's own step leaves out the largest value there is, imgaug's always 255.
    pillow = np.asarray(ImageOps.equalize(Image.fromarray(picture)))
    assert np.array_equal(pillow, expected) == (most == 255)


def test_equalize_keeps_a_channel_of_one_value_and_one_of_few_pixels_below_255():
    picture = np.full((29, 31, 3), 255, dtype=np.uint8)
    picture[..., 0] = 90
    picture[:8, :, 1] = 17  # 248 pixels
    picture[:9, :, 2] = 17  # 279 pixels: a step of 1, and 255 stays above all
    got = applied("equalize", picture)
    assert np.array_equal(got[..., :2], picture[..., :2])
    assert got[..., 2].tolist() == [[0] * 31] * 9 + [[255] * 31] * 20


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(("magnitude", "change"), [(7, 0.21), (30, 0.9), (0, 0.0)])
@pytest.mark.parametrize("name", ["color", "contrast", "brightness", "sharpness"])
def test_enhancements_go_away_from_or_towards_a_dull_picture(name, magnitude, change, sign):
    picture = picture_of()
    dull = {
        "color": gray(picture),
        "contrast": np.floor(gray(picture).mean() + 0.5),
        "brightness": np.zeros(()),
        "sharpness": smoothed(picture),
    }[name]
    exact = np.clip(dull + (1 + sign * change) * (picture - dull.astype(float)), 0, 255)
    assert is_cut_down(applied(name, picture, magnitude, sign), exact)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("magnitude", [7, 30])
@pytest.mark.parametrize("name", ["rotate", "shear_x", "shear_y", "translate_x", "translate_y"])
def test_moves_take_the_nearest_pixel_or_gray(name, magnitude, sign):
    picture = picture_of(33, 45)
    height, width, _ = picture.shape
    share = sign * magnitude / 30
    turn, slope = share * math.pi / 6, math.tanh(share * 0.3)
    got = applied(name, picture, magnitude, sign)
    judged = 0
    for row, column in itertools.product(range(height), range(width)):
        x, y = column + 0.5, row + 0.5
        right, down = x - width / 2, y - height / 2
        # Where the pixel comes from: what is at the right goes down in a turn by a positive angle.
        x, y = {
            "rotate": (
                width / 2 + math.cos(turn) * right + math.sin(turn) * down,
                height / 2 - math.sin(turn) * right + math.cos(turn) * down,
            ),
            "shear_x": (x - slope * y, y),
            "shear_y": (x, y - slope * x),
            "translate_x": (x - share * 0.33 * width, y),
            "translate_y": (x, y - share * 0.33 * height),
        }[name]
        if min(abs(x - round(x)), abs(y - round(y))) < 1e-3:
            continue  # on an edge between two pixels, rounding decides
        judged += 1
        is_in_frame = 0 <= x < width and 0 <= y < height
        expected = picture[int(y), int(x)].tolist() if is_in_frame else list(GRAY)
        assert got[row, column].tolist() == expected
    assert judged > 0.95 * height * width


@pytest.mark.parametrize(
    ("magnitude", "center", "box"),
    [
        # 7 / 30 * 5 / 8 of 40 rows are 5.83: half of it, 2.92, to all sides of (30, 10).
        (7, (0.5, 0.25), (27, 7, 32, 12)),
        (7, (0.01, 0.99), (0, 36, 3, 40)),
        # Cut down, not rounded: from (27.8, 7.56) to (33.64, 13.4).
        (7, (0.512, 0.262), (27, 7, 33, 13)),
        (30, (0.5, 0.5), (17, 7, 42, 32)),
        (7, (0.0, 0.0), (0, 0, 2, 2)),
        (0, (0.5, 0.5), (0, 0, 0, 0)),
    ],
)
def test_cutout_is_a_gray_square_of_a_share_of_the_height(magnitude, center, box):
    picture = picture_of(40, 60, most=100)
    expected = picture.copy()
    left, top, right, bottom = box
    expected[top:bottom, left:right] = GRAY
    assert np.array_equal(applied("cutout", picture, magnitude, center=center), expected)


def test_blur_is_the_mean_of_a_ring_of_16_and_smooth_of_9_weighted():
    picture = picture_of(9, 12)
    ring = np.ones((5, 5), dtype=int)
    ring[1:4, 1:4] = 0
    assert np.array_equal(applied("blur", picture), weighted(picture, ring))
    assert np.array_equal(applied("smooth", picture), smoothed(picture))


def test_magnitude_0_and_pictures_without_anything_to_change():
    picture = picture_of()
    for name in sorted(set(NAMES) - {"autocontrast", "equalize", "invert", "blur", "smooth"}):
        assert np.array_equal(applied(name, picture, magnitude=0), picture), name
    plain = np.full((37, 41, 3), 128, dtype=np.uint8)
    for name in sorted(set(NAMES) - {"invert", "brightness"}):
        assert np.array_equal(applied(name, plain), plain), name


@pytest.mark.parametrize("name", NAMES)
def test_no_operation_changes_what_it_is_given(name):
    picture = picture_of()
    image = Image.fromarray(picture)
    OPERATIONS[name](Setting(7, 1, CENTER, *picture.shape[:2]))(image)
    assert np.array_equal(np.asarray(image), picture)


# What is drawn.


@pytest.fixture
def settings(monkeypatch):
    """Let `draw` return the setting of each operation in place of the operation."""
    for name in NAMES:
        monkeypatch.setitem(augment.OPERATIONS, name, lambda setting: setting)


@pytest.fixture
def draws(settings):
    """Return 3,000 draws of the recipe at 224 x 224, of one generator."""
    generator = np.random.default_rng(0)
    return [RandAugment().draw(224, 224, generator) for _ in range(3000)]


def is_likely(count, trials, probability):
    """Whether `count` is within five standard deviations of what `probability` says."""
    spread = math.sqrt(trials * probability * (1 - probability))
    return abs(count - trials * probability) < 5 * spread


def test_every_operation_is_drawn_equally_often_and_in_every_place(draws):
    assert all(len(draw.operations) == 4 for draw in draws)
    orders = [list(draw.operations) for draw in draws]
    for name in NAMES:
        for place in range(4):
            count = sum(order[place] == name for order in orders)
            assert is_likely(count, len(draws), 1 / 18), (name, place)


def test_signs_and_centers_are_those_of_a_coin_and_a_square(draws):
    for name in NAMES:
        drawn = [draw.operations[name] for draw in draws if name in draw.operations]
        assert {(s.magnitude, s.height, s.width) for s in drawn} == {(7, 224, 224)}
        assert is_likely(sum(s.sign == 1 for s in drawn), len(drawn), 0.5), name
        assert {s.sign for s in drawn} == {-1, 1}
    pairs = [list(draw.operations.values())[:2] for draw in draws]
    assert is_likely(sum(a.sign == b.sign for a, b in pairs), len(draws), 0.5)
    centers = np.array([a.center for a, _ in pairs])
    for quarter in itertools.product((False, True), repeat=2):
        count = int(((centers > 0.5) == quarter).all(axis=1).sum())
        assert is_likely(count, len(draws), 0.25)
    assert 0 <= centers.min() < 0.01
    assert 0.99 < centers.max() < 1


def test_the_flip_is_a_coin_and_sure_at_0_and_1(draws):
    assert is_likely(sum(draw.flip for draw in draws), len(draws), 0.5)
    for flip in (0, 1):
        generator = np.random.default_rng(0)
        draw = RandAugment(flip=flip).draw
        assert {draw(9, 9, generator).flip for _ in range(100)} == {bool(flip)}


def test_the_crop_takes_0_to_7_of_224_pixels_from_each_side_by_itself(draws):
    boxes = np.array([draw.box for draw in draws])
    top, left = boxes[:, 0], boxes[:, 1]
    sides = [top, left, 224 - top - boxes[:, 2], 224 - left - boxes[:, 3]]
    for side in sides:
        for pixels in range(8):
            # Rounded: the two ends get half of what the others do.
            probability = 1 / 14 if pixels in (0, 7) else 1 / 7
            assert is_likely(int((side == pixels).sum()), len(draws), probability)
        assert side.max() == 7
    for one, other in itertools.combinations(sides, 2):
        assert is_likely(int(((one > 3) & (other > 3)).sum()), len(draws), 0.25)


def test_the_crop_is_a_share_of_each_side_and_leaves_something(settings):
    generator = np.random.default_rng(0)
    boxes = np.array([RandAugment().draw(448, 22, generator).box for _ in range(500)])
    top, left = boxes[:, 0], boxes[:, 1]
    bottom, right = 448 - top - boxes[:, 2], 22 - left - boxes[:, 3]
    assert [side.max() for side in (top, bottom, left, right)] == [14, 14, 1, 1]
    for size in range(1, 12):
        draw = RandAugment(magnitude=30).draw
        assert min(draw(size, 12 - size, generator).box[2:]) >= 1
    assert RandAugment(crop=False).draw(20, 30, generator).box == (0, 0, 20, 30)


def test_turning_flip_or_crop_off_leaves_the_other_choices(settings):
    official, plain = (
        [augmentation.draw(50, 70, np.random.default_rng(seed)) for seed in range(20)]
        for augmentation in (RandAugment(flip=1), RandAugment(flip=0, crop=False))
    )
    for one, other in zip(official, plain, strict=True):
        assert list(one.operations.items()) == list(other.operations.items())


class Told:
    """A generator that gives what it is told to, and remembers what it was asked for."""

    def __init__(self):
        self.asked = []

    def random(self, size=None):
        self.asked.append(("random", size))
        return 0.3 if size is None else np.array([0.25, 0.75])

    def uniform(self, low, high, size):
        self.asked.append(("uniform", low, high * 224, size))
        return np.array([1, 2, 3, 4]) / 224

    def permutation(self, names):
        self.asked.append(("permutation", *names))
        return np.array(names[::-1])

    def choice(self, values, size):
        self.asked.append(("choice", *values, size))
        return np.array([-1, 1])


def test_what_is_drawn_and_in_which_order(settings):
    generator = Told()
    flip, box, operations = RandAugment(count=2).draw(224, 448, generator)
    assert generator.asked == [
        ("random", None),
        ("uniform", 0, 7, 4),
        ("permutation", *NAMES),
        ("choice", -1, 1, 2),
        ("random", 2),
    ]
    assert flip
    # Off the top 1, right 2, bottom 3, left 4 of 224.
    assert box == (1, 8, 220, 448 - 4 - 8)
    assert list(operations.items()) == [
        ("smooth", Setting(7, -1, (0.25, 0.75), 224, 448)),
        ("blur", Setting(7, 1, (0.25, 0.75), 224, 448)),
    ]


@pytest.mark.parametrize("count", [0, 1, 18])
def test_count_operations_are_drawn(settings, count):
    drawn = RandAugment(count=count).draw(9, 9, np.random.default_rng(0)).operations
    assert len(drawn) == count
    assert set(drawn) <= set(NAMES)


# The clip.


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("contiguous", [True, False])
def test_a_clip_is_flipped_then_cropped_then_changed_in_order(seed, contiguous):
    frames = frames_of(3, 45, 68, seed)
    frames = frames.contiguous() if contiguous else frames
    before = frames.clone()
    augmentation = RandAugment(magnitude=20)
    flip, (top, left, height, width), operations = augmentation.draw(
        45, 68, np.random.default_rng(seed)
    )
    result = augmentation(frames, np.random.default_rng(seed))
    assert result.dtype == torch.uint8
    assert result.shape == frames.shape
    assert torch.equal(frames, before)
    for frame, got in zip(frames, result, strict=True):
        mirrored = torch.tensor(frame.numpy()[..., ::-1].copy()) if flip else frame
        kept = mirrored[None, :, top : top + height, left : left + width]
        image = Image.fromarray(resize(kept, 45, 68)[0].permute(1, 2, 0).numpy())
        for operation in operations.values():
            image = operation(image)
        assert np.array_equal(got.permute(1, 2, 0).numpy(), np.asarray(image))


def test_a_frame_is_the_same_whatever_stands_beside_it():
    frames = frames_of(4, 37, 41)
    for seed in range(20):
        together = RandAugment()(frames, np.random.default_rng(seed))
        alone = RandAugment()(frames[2:3], np.random.default_rng(seed))
        assert torch.equal(together[2:3], alone)


def test_the_generator_decides_everything():
    frames = frames_of(2, 37, 41)
    np.random.seed(0)
    first = RandAugment()(frames, np.random.default_rng(3))
    np.random.seed(1)
    torch.manual_seed(1)
    assert torch.equal(first, RandAugment()(frames, np.random.default_rng(3)))
    clips = {
        RandAugment()(frames, np.random.default_rng(seed)).numpy().tobytes() for seed in range(10)
    }
    assert len(clips) == 10


def test_without_operations_a_clip_is_flipped_or_copied():
    frames = frames_of(2, 5, 7)
    generator = np.random.default_rng(0)
    flipped = RandAugment(count=0, flip=1, crop=False)(frames, generator)
    assert torch.equal(flipped, frames.flip(-1))
    copied = RandAugment(count=0, flip=0, crop=False)(frames, generator)
    assert torch.equal(copied, frames)
    copied.zero_()
    assert frames.any()


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"count": 19}, r"count must be in 0\.\.18, got 19"),
        ({"count": -1}, r"count must be in 0\.\.18, got -1"),
        ({"magnitude": 31}, r"magnitude must be in 0\.\.30, got 31"),
        ({"magnitude": -1}, r"magnitude must be in 0\.\.30, got -1"),
        ({"flip": 1.5}, r"flip must be in 0\.\.1, got 1\.5"),
        ({"flip": math.nan}, r"flip must be in 0\.\.1, got nan"),
    ],
)
def test_numbers_out_of_range_are_refused(argument, message):
    with pytest.raises(ValueError, match=f"^RandAugment: {message}$"):
        RandAugment(**argument)


@pytest.mark.parametrize("shape", [(3, 4, 5), (2, 1, 4, 5), (0, 3, 4, 5), (2, 3, 0, 5)])
def test_other_shapes_of_frames_are_refused(shape):
    with pytest.raises(ValueError, match=r"^RandAugment: frames must be \[T, 3, H, W\]"):
        RandAugment()(torch.zeros(shape, dtype=torch.uint8), np.random.default_rng(0))


def test_frames_of_other_dtypes_are_refused():
    with pytest.raises(TypeError, match=r"must be uint8, got torch\.float32; augment before"):
        RandAugment()(torch.zeros(2, 3, 4, 5), np.random.default_rng(0))
