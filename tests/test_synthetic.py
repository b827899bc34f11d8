"""The synthetic data set: deterministic, uninformative frame by frame, and careful with files."""

import itertools
import json
import re

import numpy as np
import pytest

pytest.importorskip("PIL")
av = pytest.importorskip("av")

from train import synthetic  # noqa: E402
from train.synthetic import (  # noqa: E402
    ATTRIBUTES,
    CLASSES,
    OPPOSITE,
    main,
    render_clip,
    write_dataset,
)

SMALL = {"videos_per_class": 2, "test_videos_per_class": 1, "frames": 6, "width": 64, "height": 48}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    out = tmp_path_factory.mktemp("synthetic") / "set"
    assert write_dataset(out, **SMALL, seed=3, workers=1) == 8 * 3
    return out


def contents(folder) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def decoded(path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def paths_of(pair: int, split: str, seed: int, frames: int = 40) -> np.ndarray:
    """Return x, y, angle, radius over time of a clip, [4, frames]."""
    return np.stack(
        synthetic._draw_paths(pair, ATTRIBUTES[split], np.random.default_rng(seed), frames)
    )


def test_opposites_are_pairs():
    assert (
        *("left", "right", "up", "down"),
        *("clockwise", "counter-clockwise", "growing", "shrinking"),
    ) == CLASSES
    for label, other in enumerate(OPPOSITE):
        assert OPPOSITE[other] == label != other
        assert label // 2 == other // 2


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("label", range(0, 8, 2))
def test_the_opposite_is_the_clip_played_backwards(label, split):
    clip = render_clip(label, split, np.random.default_rng(4), frames=9, width=48, height=32)
    other = render_clip(
        OPPOSITE[label], split, np.random.default_rng(4), frames=9, width=48, height=32
    )
    assert clip.shape == (9, 32, 48, 3)
    assert clip.dtype == np.uint8
    assert np.array_equal(clip, other[::-1])
    assert not np.array_equal(clip, other)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("label", range(8))
def test_pixels_move_as_the_class_says(label, seed, monkeypatch):
    def white_on_black(attributes, generator, height, width):
        return np.zeros((height, width, 3), np.int32), np.full(3, 255, np.int32)

    # One fixed, lopsided shape that stays inside the frame, so that its moments can be measured.
    monkeypatch.setattr(synthetic, "_draw_colours", white_on_black)
    monkeypatch.setattr(synthetic, "_CENTER", (-0.3, 0.3))
    monkeypatch.setattr(synthetic, "_RADIUS", (0.07, 0.19))
    triangle = {"triangle": [(-1, -0.5), (1.6, 0), (-1, 0.5)]}
    monkeypatch.setitem(
        ATTRIBUTES,
        "train",
        synthetic.Attributes(**{**vars(ATTRIBUTES["train"]), "shapes": triangle}),
    )
    clip = render_clip(label, "train", np.random.default_rng(seed), width=256, height=192)
    masses = clip[..., 0] / 255
    total = masses.sum(axis=(1, 2))
    x = (masses * np.arange(256)).sum(axis=(1, 2)) / total
    y = (masses * np.arange(192)[:, None]).sum(axis=(1, 2)) / total
    # The tip of the triangle is the farthest point from its centre of mass.
    rows, columns = np.mgrid[:192, :256]
    far = np.stack(
        [np.argmax((m > 0) * np.hypot(columns - a, rows - b)) for m, a, b in zip(masses, x, y)]  # noqa: B905
    )
    angle = np.unwrap(np.arctan2(far // 256 - y, far % 256 - x))
    steps = {
        "left": -np.diff(x),
        "right": np.diff(x),
        "up": -np.diff(y),
        "down": np.diff(y),
        "clockwise": np.diff(angle[::3]),  # in steps larger than a pixel at the tip
        "counter-clockwise": -np.diff(angle[::3]),
        "growing": np.diff(np.sqrt(total)[::3]),
        "shrinking": -np.diff(np.sqrt(total)[::3]),
    }
    assert (steps[CLASSES[label]] > 0).all()
    still = {"left": x, "up": y, "clockwise": angle, "growing": np.sqrt(total)}
    for name, values in still.items():
        if CLASSES.index(name) // 2 != label // 2:
            assert np.ptp(values) < (0.2 if name == "clockwise" else 0.6)


@pytest.mark.parametrize("quantity", range(4))
def test_single_frames_have_one_distribution_in_all_classes(quantity):
    # One random frame each of many clips: place, angle and size must not tell the class.
    generator = np.random.default_rng(0)
    samples = []
    for pair in range(4):
        values = [
            paths_of(pair, "train", seed)[quantity, generator.integers(40)]
            for seed in range(pair * 1500, pair * 1500 + 1500)
        ]
        samples.append(np.sort(np.mod(values, 2 * np.pi) if quantity == 2 else values))
    grid = np.sort(np.concatenate(samples))
    for one, other in itertools.combinations(samples, 2):
        distance = np.abs(np.searchsorted(one, grid) - np.searchsorted(other, grid)).max() / 1500
        # Kolmogorov and Smirnov's distance of two such samples stays below 0.071 with 99.9 %.
        assert distance < 0.075


@pytest.mark.parametrize("split", ["train", "test"])
def test_one_quantity_moves_and_stays_in_range(split):
    attributes = ATTRIBUTES[split]
    for pair, seed in itertools.product(range(4), range(50)):
        paths = paths_of(pair, split, seed)
        moving = [bool(np.ptp(path) > 0) for path in paths]
        assert moving == [index == pair for index in range(4)]
        assert np.abs(paths[:2]).max() <= 0.33 + 1e-9
        assert paths[3].min() >= 0.22 - 1e-9
        assert paths[3].max() <= 0.5 + 1e-9
        velocity = np.diff(np.log(paths[3]) if pair == 3 else paths[pair])
        assert np.allclose(velocity, velocity[0])
        bands, total = {
            0: (attributes.travels, np.ptp(paths[0])),
            1: (attributes.travels, np.ptp(paths[1])),
            2: (attributes.turns, np.degrees(np.ptp(paths[2]))),
            3: (attributes.ratios, paths[3].max() / paths[3].min()),
        }[pair]
        assert any(low - 1e-9 <= total <= high + 1e-9 for low, high in bands)


def test_test_videos_share_nothing_with_training():
    train, test = ATTRIBUTES["train"], ATTRIBUTES["test"]
    assert not set(train.shapes) & set(test.shapes)
    assert not {str(corners) for corners in train.shapes.values()} & {
        str(corners) for corners in test.shapes.values()
    }
    assert not set(train.backgrounds) & set(test.backgrounds)
    for name in ("hues", "travels", "turns", "ratios"):
        for (low, high), (other_low, other_high) in itertools.product(
            getattr(train, name), getattr(test, name)
        ):
            assert high < other_low or other_high < low, name


def test_rendering_is_deterministic_and_draws_every_attribute():
    def render(seed):
        return render_clip(0, "train", np.random.default_rng(seed), frames=3, width=32, height=24)

    assert np.array_equal(render(1), render(1))
    assert not np.array_equal(render(1), render(2))
    for split, attributes in ATTRIBUTES.items():
        generator = np.random.default_rng(0)
        for name in attributes.backgrounds:
            pattern = synthetic._pattern(name, generator, 24, 32)
            assert pattern.shape == (24, 32), split
            assert pattern.min() >= 0
            assert pattern.max() <= 1


def test_lists_name_every_video_with_its_label(dataset):
    assert (dataset / "classes.txt").read_text().splitlines() == list(CLASSES)
    for split, count in (("train", 2), ("test", 1)):
        lines = (dataset / f"{split}.txt").read_text().splitlines()
        expected = [
            f"{split}/{name}/{number:05d}.mp4 {label}"
            for label, name in enumerate(CLASSES)
            for number in range(count)
        ]
        assert lines == expected
        for line in lines:
            assert re.fullmatch(r"\S+ \d", line)
            assert decoded(dataset / line.split()[0]).shape == (6, 48, 64, 3)
    assert json.loads((dataset / "settings.json").read_text())["seed"] == 3
    assert not list(dataset.rglob("*.tmp"))


def test_videos_show_the_rendered_clip(dataset):
    clip = render_clip(
        5, "test", np.random.default_rng((3, 1, 5, 0)), frames=6, width=64, height=48
    )
    video = decoded(dataset / "test" / "counter-clockwise" / "00000.mp4")
    # Lossy, with colours at half the resolution, but nothing else.
    assert np.abs(video.astype(int) - clip).mean() < 12


def test_equal_seeds_write_equal_sets_whatever_the_workers(dataset, tmp_path):
    assert write_dataset(tmp_path / "again", **SMALL, seed=3, workers=2) == 24
    assert contents(tmp_path / "again") == contents(dataset)
    write_dataset(tmp_path / "other", **SMALL, seed=4, workers=1)
    one, other = (
        folder / "train" / "left" / "00000.mp4" for folder in (dataset, tmp_path / "other")
    )
    assert not np.array_equal(decoded(one), decoded(other))


def test_a_complete_set_is_left_alone(dataset, capsys):
    before = {path: path.stat().st_mtime_ns for path in dataset.rglob("*.mp4")}
    options = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
    main([str(dataset), *options, "--seed=3"])
    assert capsys.readouterr().out == f"{dataset}: complete with these settings, left alone\n"
    assert {path: path.stat().st_mtime_ns for path in dataset.rglob("*.mp4")} == before


def test_an_interrupted_set_is_completed(dataset, tmp_path):
    out = tmp_path / "set"
    write_dataset(out, **SMALL, seed=3, workers=1)
    for name in ("train/up/00001.mp4", "test/left/00000.mp4", "test.txt"):
        (out / name).unlink()
    assert write_dataset(out, **SMALL, seed=3, workers=1) == 2
    assert contents(out) == contents(dataset)


def test_other_settings_are_refused(dataset, capsys):
    before = contents(dataset)
    with pytest.raises(ValueError, match=r"other settings, remove the folder or choose another$"):
        write_dataset(dataset, **SMALL, seed=4)
    with pytest.raises(SystemExit):
        main([str(dataset)])
    assert "other settings" in capsys.readouterr().err
    assert contents(dataset) == before


def test_folders_of_others_are_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"choose another folder$"):
        write_dataset(tmp_path, **SMALL)
    with pytest.raises(ValueError, match=r"choose another folder$"):
        write_dataset(tmp_path / "notes.txt", **SMALL)


@pytest.mark.parametrize("change", [{"width": 65}, {"height": 0}, {"frames": 1}, {"workers": 0}])
def test_impossible_settings_are_refused(tmp_path, change):
    with pytest.raises(ValueError, match=r"^write_dataset: "):
        write_dataset(tmp_path / "set", **{**SMALL, **change})
    assert not (tmp_path / "set").exists()
