"""A small labelled data set of moving shapes that no single frame gives away.

    python -m train.synthetic OUT [--videos-per-class 96] [--test-videos-per-class 24] [--seed 0]

Eight classes in four pairs of opposites. A clip draws a path for each of x, y, angle and size
alike; its class moves along one of them, the other three stand still at a random instant of
theirs. So shape, colours, place, angle and size of a frame have the same distribution in all
classes, and a clip of the second class of a pair is one of the first, played backwards: only the
order of the frames tells them apart. Shapes, hues, backgrounds and speeds of the test videos do not
occur in the training videos.

A left-right flip turns left into right and clockwise into counter-clockwise: train without it.
"""

import argparse
import colorsys
import json
import math
import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

CLASSES = (
    "left",
    "right",
    "up",
    "down",
    "clockwise",
    "counter-clockwise",
    "growing",
    "shrinking",
)
"""Class names, by label."""
OPPOSITE = tuple(label ^ 1 for label in range(len(CLASSES)))
"""Label of the class that is each class played backwards."""

FPS = 24
"""Frame rate of the videos, frames/s."""

Interval = tuple[float, float]

# Raised when the same settings no longer give the same frames.
_FORMAT = 1
# Masks are drawn this much larger in both directions and averaged: 16 levels of coverage.
_OVERSAMPLING = 4
# Centres stay in a square around the frame's centre, so that a central square crop sees them.
# In units of the frame height, like all lengths below.
_CENTER = (-0.33, 0.33)
_RADIUS = (0.22, 0.5)


@dataclass(frozen=True)
class Attributes:
    """What the clips of one split are drawn from.

    Attributes:
        shapes: corners of polygons by name, y down, in any unit.
        hues: bands of hue in [0, 1), for shape and background alike.
        backgrounds: names of background patterns.
        travels: bands of the way x or y goes from first to last frame, in frame heights.
        turns: bands of the angle turned from first to last frame, in degrees.
        ratios: bands of the size at the larger end over that at the smaller.
    """

    shapes: dict[str, list[tuple[float, float]]]
    hues: tuple[Interval, ...]
    backgrounds: tuple[str, ...]
    travels: tuple[Interval, ...]
    turns: tuple[Interval, ...]
    ratios: tuple[Interval, ...]


ATTRIBUTES = {
    "train": Attributes(
        shapes={
            "triangle": [(-1, -0.7), (1.2, 0), (-1, 0.7)],
            "rectangle": [(-1, -0.65), (1, -0.65), (1, 0.65), (-1, 0.65)],
            "bar": [(-1, -0.3), (1, -0.3), (1, 0.3), (-1, 0.3)],
            "arrow": [
                (-1, -0.3),
                (0.1, -0.3),
                (0.1, -0.8),
                (1, 0),
                (0.1, 0.8),
                (0.1, 0.3),
                (-1, 0.3),
            ],
            "corner": [
                (-0.8, -0.8),
                (-0.1, -0.8),
                (-0.1, 0.2),
                (0.8, 0.2),
                (0.8, 0.8),
                (-0.8, 0.8),
            ],
        },
        hues=((0.0, 0.12), (0.3, 0.45), (0.62, 0.76)),
        backgrounds=("plain", "linear", "noise"),
        travels=((0.36, 0.42), (0.54, 0.6)),
        turns=((80, 110), (160, 200)),
        ratios=((1.6, 1.7), (2.0, 2.15)),
    ),
    "test": Attributes(
        shapes={
            "kite": [(-1, 0), (-0.4, -0.6), (1.2, 0), (-0.4, 0.6)],
            "tee": [
                (-0.8, -0.9),
                (0.8, -0.9),
                (0.8, -0.35),
                (0.28, -0.35),
                (0.28, 0.9),
                (-0.28, 0.9),
                (-0.28, -0.35),
                (-0.8, -0.35),
            ],
            "chevron": [(-0.9, -0.8), (-0.1, -0.8), (0.9, 0), (-0.1, 0.8), (-0.9, 0.8), (0.1, 0)],
            "slant": [(-1, -0.5), (0.4, -0.5), (1, 0.5), (-0.4, 0.5)],
        },
        hues=((0.16, 0.26), (0.49, 0.58), (0.81, 0.95)),
        backgrounds=("stripes", "checker", "radial"),
        travels=((0.45, 0.51),),
        turns=((120, 150),),
        ratios=((1.75, 1.95),),
    ),
}
"""`Attributes` of the splits "train" and "test", which share no value."""


def render_clip(
    label: int,
    split: str,
    generator: np.random.Generator,
    *,
    frames: int = 40,
    width: int = 128,
    height: int = 96,
) -> np.ndarray:
    """Return a clip of class `label`, RGB, uint8 [frames, height, width, 3].

    Two opposite labels and equal states of `generator` give one clip and its reversal.

    Args:
        label: index into `CLASSES`.
        split: "train" or "test".
        generator: the only source of randomness.
        frames: length, at least 2.
        width: pixels.
        height: pixels.
    """
    attributes = ATTRIBUTES[split]
    names = list(attributes.shapes)
    corners = _centered(attributes.shapes[names[generator.integers(len(names))]])
    background, colour = _draw_colours(attributes, generator, height, width)
    paths = _draw_paths(label // 2, attributes, generator, frames)
    coverage = np.stack([_mask(corners, *now, height, width) for now in zip(*paths, strict=True)])
    # Blending in integers, coverage rescaled to 0..256: exact where all or nothing is covered.
    alpha = (coverage.astype(np.int32) + (coverage >> 7))[..., None]
    clip = (background + ((alpha * (colour - background) + 128) >> 8)).astype(np.uint8)
    return clip if label % 2 == 0 else clip[::-1].copy()


def write_dataset(
    out: str | os.PathLike,
    *,
    videos_per_class: int = 96,
    test_videos_per_class: int = 24,
    seed: int = 0,
    frames: int = 40,
    width: int = 128,
    height: int = 96,
    workers: int = 2,
) -> int:
    """Write the data set into the folder `out` and return how many videos had to be written.

    Writes ``out/<split>/<class>/<number>.mp4`` (H.264), the lists ``train.txt`` and ``test.txt``
    (``relative/path label`` a line), ``classes.txt`` (a name a line) and ``settings.json``. Equal
    settings give equal lists and equal decoded frames, whatever the number of workers. A folder
    with the same settings keeps what it has and gets what is missing.

    Args:
        out: folder, made if it does not exist.
        videos_per_class: training videos per class.
        test_videos_per_class: test videos per class.
        seed: seed of the whole set.
        frames: frames per video, at least 2.
        width: pixels, even.
        height: pixels, even.
        workers: processes that render and encode.

    Raises:
        ValueError: if `out` holds other settings or other files, or a size is impossible.
    """
    if frames < 2 or min(width, height) < 16 or width % 2 or height % 2:
        raise ValueError(
            f"write_dataset: needs at least 2 frames of even sides of at least 16 pixels, "
            f"got {frames} frames of {width} x {height}"
        )
    counts = {"train": videos_per_class, "test": test_videos_per_class}
    if min(counts.values()) < 0 or seed < 0 or workers < 1:
        raise ValueError("write_dataset: seed and video counts must not be negative, workers >= 1")
    settings = {
        "format": _FORMAT,
        "videos_per_class": videos_per_class,
        "test_videos_per_class": test_videos_per_class,
        "seed": seed,
        "frames": frames,
        "width": width,
        "height": height,
    }
    out = Path(out)
    _claim(out, settings)

    jobs = []
    for index, (split, count) in enumerate(counts.items()):
        lines = []
        for label, name in enumerate(CLASSES):
            for number in range(count):
                path = f"{split}/{name}/{number:05d}.mp4"
                lines.append(f"{path} {label}\n")
                if not (out / path).exists():
                    key = (seed, index, label, number)
                    jobs.append((out / path, label, split, key, (frames, width, height)))
        _write_text(out / f"{split}.txt", "".join(lines))
    _write_text(out / "classes.txt", "".join(f"{name}\n" for name in CLASSES))

    if workers == 1 or len(jobs) < 2 * workers:
        for job in jobs:
            _write_video(job)
    else:
        # Not forked: the caller may hold threads (PyTorch's, decord's) that a fork would break.
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers, mp_context=context) as pool:
            for _ in pool.map(_write_video, jobs, chunksize=8):
                pass
    return len(jobs)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line of `write_dataset`."""
    parser = argparse.ArgumentParser(prog="train.synthetic", description=__doc__.split("\n")[0])
    parser.add_argument("out", help="folder to write")
    parser.add_argument("--videos-per-class", type=int, default=96, help="training videos")
    parser.add_argument("--test-videos-per-class", type=int, default=24, help="test videos")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--frames", type=int, default=40, help="frames per video")
    parser.add_argument("--width", type=int, default=128, help="pixels, even")
    parser.add_argument("--height", type=int, default=96, help="pixels, even")
    parser.add_argument("--workers", type=int, default=2, help="processes")
    options = vars(parser.parse_args(arguments))
    try:
        written = write_dataset(**options)
    except ValueError as error:
        parser.error(str(error))
    if written == 0:
        print(f"{options['out']}: complete with these settings, left alone")
    else:
        print(f"{options['out']}: {written} videos of {len(CLASSES)} classes written")


def _draw_paths(
    moving: int, attributes: Attributes, generator: np.random.Generator, frames: int
) -> list[np.ndarray]:
    """Return x, y, angle and radius over time, float64 [frames] each, in heights and radians.

    Each runs with constant velocity from end to end of an interval drawn inside its range; all but
    number `moving` are then stopped at one of their instants.
    """
    time = np.linspace(-0.5, 0.5, frames)

    def path(bounds: Interval, way: float) -> np.ndarray:
        middle = generator.uniform(bounds[0] + abs(way) / 2, bounds[1] - abs(way) / 2)
        return middle + way * time

    log_radius = (math.log(_RADIUS[0]), math.log(_RADIUS[1]))
    turn = math.radians(_draw(attributes.turns, generator))
    paths = [
        path(_CENTER, -_draw(attributes.travels, generator)),
        path(_CENTER, -_draw(attributes.travels, generator)),
        generator.uniform(0, 2 * math.pi) + turn * time,
        np.exp(path(log_radius, math.log(_draw(attributes.ratios, generator)))),
    ]
    for index, stop in enumerate(generator.integers(frames, size=len(paths))):
        if index != moving:
            paths[index] = np.full(frames, paths[index][stop])
    return paths


def _draw_colours(
    attributes: Attributes, generator: np.random.Generator, height: int, width: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the background, int32 [height, width, 3], and the shape's colour, int32 [3], RGB."""

    def colour(hue: float, saturation: Interval, value: Interval) -> np.ndarray:
        return np.array(
            colorsys.hsv_to_rgb(hue, generator.uniform(*saturation), generator.uniform(*value))
        )

    # The background is dim and pale and the shape much darker or much brighter, so that all can be
    # seen; the two background colours share a hue, so that no blend has a hue of the other split.
    front = (0.05, 0.15) if generator.random() < 0.5 else (0.85, 1.0)
    shape = colour(_draw(attributes.hues, generator), (0.3, 0.7), front)
    hue = _draw(attributes.hues, generator)
    first, second = (colour(hue, (0.05, 0.3), (0.38, 0.5)) for _ in range(2))
    name = attributes.backgrounds[generator.integers(len(attributes.backgrounds))]
    mix = _pattern(name, generator, height, width)[..., None]
    background = 255 * (first + (second - first) * mix)
    return background.astype(np.int32), (255 * shape).astype(np.int32)


def _pattern(name: str, generator: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Return the share of the second background colour, float64 [height, width] in [0, 1]."""
    y, x = np.mgrid[:height, :width] / height
    angle, phase = generator.uniform(0, 2 * math.pi, size=2)
    along = math.cos(angle) * x + math.sin(angle) * y
    if name == "plain":
        return np.zeros((height, width))
    if name == "linear":
        return (along - along.min()) / np.ptp(along)
    if name == "noise":
        coarse = Image.fromarray(generator.integers(256, size=(4, 5), dtype=np.uint8))
        return np.asarray(coarse.resize((width, height), Image.Resampling.BILINEAR)) / 255
    if name == "stripes":
        return 0.5 + 0.5 * np.sin(2 * math.pi * along / generator.uniform(0.15, 0.3) + phase)
    if name == "checker":
        side = generator.uniform(0.12, 0.25)
        return (np.floor(x / side + phase) + np.floor(y / side + angle)) % 2
    assert name == "radial", name
    center_x, center_y = generator.uniform(0.3, 0.7, size=2)
    return np.minimum(np.hypot(x - center_x * width / height, y - center_y), 1.0)


def _mask(
    corners: np.ndarray, x: float, y: float, angle: float, radius: float, height: int, width: int
) -> np.ndarray:
    """Return how much of each pixel the shape covers, uint8 [height, width], 255 for all."""
    cosine, sine = radius * math.cos(angle), radius * math.sin(angle)
    # y points down, so a growing angle turns clockwise.
    turned = corners @ np.array([[cosine, sine], [-sine, cosine]]) + (x, y)
    scale = height * _OVERSAMPLING
    turned = turned * scale + (width * _OVERSAMPLING / 2 - 0.5, scale / 2 - 0.5)
    image = Image.new("L", (width * _OVERSAMPLING, scale))
    ImageDraw.Draw(image).polygon(turned.ravel().tolist(), fill=255)
    return np.asarray(image.reduce(_OVERSAMPLING))


def _centered(corners: list[tuple[float, float]]) -> np.ndarray:
    """Return `corners` with the polygon's centroid at 0 and the farthest corner at distance 1."""
    points = np.array(corners, dtype=np.float64)
    following = np.roll(points, -1, axis=0)
    cross = points[:, 0] * following[:, 1] - following[:, 0] * points[:, 1]
    points = points - ((points + following) * cross[:, None]).sum(0) / (3 * cross.sum())
    return points / np.hypot(*points.T).max()


def _draw(bands: Sequence[Interval], generator: np.random.Generator) -> float:
    """Return a number uniform over one of `bands`, the bands being equally likely."""
    return float(generator.uniform(*bands[generator.integers(len(bands))]))


def _write_video(job: tuple) -> None:
    """Render and encode one video: (path, label, split, seed key, (frames, width, height))."""
    import av

    path, label, split, key, (frames, width, height) = job
    generator = np.random.default_rng(key)
    clip = render_clip(label, split, generator, frames=frames, width=width, height=height)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.tmp")
    with av.open(str(partial), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(FPS))
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        # One thread: the workers fill the cores. No macroblock tree: with it libx264 gave two
        # different videos of the same frames in one of twenty small clips.
        stream.options = {
            "preset": "veryfast",
            "crf": "18",
            "threads": "1",
            "x264-params": "mbtree=0",
        }
        for frame in clip:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    partial.replace(path)


def _claim(out: Path, settings: dict[str, int]) -> None:
    """Make `out` a folder of `settings`, or raise ValueError if it is something else's."""
    path = out / "settings.json"
    if path.exists():
        if json.loads(path.read_text()) != settings:
            raise ValueError(
                f"write_dataset: {out} holds a data set with other settings, "
                f"remove the folder or choose another"
            )
        return
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(
            f"write_dataset: {out} exists and is no data set of this program, choose another folder"
        )
    out.mkdir(parents=True, exist_ok=True)
    # First of all files, so that an interrupted run can be told and completed.
    _write_text(path, json.dumps(settings, indent=2) + "\n")


def _write_text(path: Path, text: str) -> None:
    """Write `text` so that `path` is always either absent, old or complete."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    partial.write_text(text)
    partial.replace(path)


if __name__ == "__main__":
    main()
