"""How many clips a second the loader of training reads, and how long it takes to begin.

`python bench/data.py [--videos DIR] [--workers 0 2 4] [--lines 10 1000] [--json FILE]`. DIR is a
data set as training takes it; without one, videos of moving shapes are written for the run. Clips
are sampled, cropped and resized as in training; nothing else runs. The frames of each reader of
videos are compared with decord's first. Lists of so many lines are read in a process of their own.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch

from bench.harness import Rows, attempt, header
from bench.timing import Timing, in_rounds
from train.batches import EpochBatches
from train.data import DataSettings, VideoDataset, build_loader
from train.lists import read_list
from train.synthetic import write_dataset
from train.video import READERS, open_video, why_not

LIST_COLUMNS = {
    "lines": "lines",
    "ms": "ms to the first keys",
    "spread": "20-80 %",
    "noise_percent": "+- %",
    "start_ms": "ms with imports",
    "peak_mb": "peak MB of the process",
    "imports_mb": "of them imports",
}
# Reads a list, and draws the first batch's keys, as a run does before it decodes anything.
BEGIN = """
import resource, sys, time
start = time.perf_counter()
from pathlib import Path
from train.batches import EpochBatches
from train.data import DataSettings, VideoDataset
from train.lists import read_videos
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
imports = peak()
began = time.perf_counter()
path = Path(sys.argv[1])
videos = read_videos(path.parent, path.name, ["class"] * 400)
dataset = VideoDataset(videos, DataSettings(), seed=0)
videos.digest
next(iter(EpochBatches(len(dataset), 64, 0, 1)))
end = time.perf_counter()
print(1e3 * (end - began), 1e3 * (end - start), peak(), imports)
"""
COLUMNS = {
    "reader": "reader",
    "workers": "workers",
    "video": "video",
    "ms": "ms a clip",
    "spread": "20-80 %",
    "noise_percent": "+- %",
    "clips_per_s": "clips/s",
}
# Two decoders round colours differently; frames that were mixed up differ by far more.
MOST_LEVELS = 3.0


class Preset(NamedTuple):
    """The videos that are written, the clips that are cut of them, and how many are read.

    Attributes:
        frames, height, width: of a video.
        short_side, crop, clip_len: of a clip, as `DataSettings` has them.
        batch: clips at a time.
        batches: under the clock at least, in each of `rounds`.
        lines: of the lists whose reading is timed.
    """

    frames: int
    height: int
    width: int
    short_side: int
    crop: int
    clip_len: int
    batch: int
    batches: int
    rounds: int
    lines: tuple[int, ...]


PRESETS = {
    # Ten seconds of Kinetics as it is commonly stored.
    "full": Preset(250, 256, 340, 256, 224, 32, 8, 8, 6, (10, 10**3, 10**5, 10**6)),
    "small": Preset(40, 96, 128, 64, 56, 8, 4, 4, 6, (10, 10**3, 10**5)),
    "tiny": Preset(16, 64, 80, 32, 32, 4, 2, 1, 1, (10,)),
}


def wrong(reader: str, path: Path) -> str | None:
    """What is wrong with a reader's frames of a video, None if nothing is."""
    ours, theirs = open_video(path), open_video(path, reader)
    if ours.num_frames != theirs.num_frames:
        return f"it finds {theirs.num_frames} frames of {ours.num_frames}"
    places = np.linspace(0, ours.num_frames - 1, 5).astype(int)
    difference = (ours.read(places).float() - theirs.read(places).float()).abs().mean().item()
    if difference <= MOST_LEVELS:
        return None
    return f"frames are off by {difference:.1f} levels of 255, {MOST_LEVELS} are allowed"


def milliseconds_of(dataset: VideoDataset, batch: int, batches: int) -> float:
    """How long a clip takes on average, in the middle of a pass.

    The clock starts when every worker has given its first batch, and stops while all of them still
    have others to read. It is of four batches for each worker at least.
    """
    workers = max(1, dataset.settings.workers)
    timed = max(batches, 4 * workers)
    epochs = -(-(3 * workers + timed) * batch // len(dataset))
    keys = list(EpochBatches(len(dataset), batch, 0, epochs))
    began, clips = 0.0, 0
    for number, read in enumerate(build_loader(dataset, keys, torch.device("cpu")), 1):
        if read.broken:
            raise RuntimeError(f"{read.broken[0].path}: {read.broken[0].reason}")
        if number > workers:
            clips += len(read.labels)
        if number == workers:
            began = time.perf_counter()
        if number == workers + timed:
            break
    return 1e3 * (time.perf_counter() - began) / clips


def compare(root: Path, key: dict, readers: Sequence[str], preset: Preset) -> Iterator[dict]:
    """A row for each reader, read in turn: nothing is read ahead while another is timed."""
    settings = DataSettings(
        root=str(root),
        clip_len=preset.clip_len,
        short_side=preset.short_side,
        test_short_side=preset.crop,
        crop=preset.crop,
        workers=key["workers"],
    )
    listed = read_list(root / "train.txt")

    def make(reader: str) -> tuple[Callable[[], float] | None, dict]:
        said = wrong(reader, root / listed[0].name)
        if said is not None:
            return None, {"wrong": said}
        dataset = VideoDataset(listed, replace(settings, reader=reader), seed=0)
        return partial(milliseconds_of, dataset, preset.batch, preset.batches), {}

    found = {reader: attempt(partial(make, reader), torch.device("cpu")) for reader in readers}
    functions = {reader: function for reader, (function, _) in found.items() if function}
    rounds = preset.rounds
    samples = in_rounds(functions, lambda reader: functions[reader](), lambda count: count < rounds)
    for reader, (function, items) in found.items():
        items.pop("fault", None)
        row = {"reader": reader, **items}
        if function:
            timing = Timing.of(*samples[reader])
            row |= {**timing.items, "clips_per_s": 1e3 / timing.median}
        yield row


def begin(lines: int, rounds: int, folder: Path) -> dict:
    """A row on a list of so many lines, of a process for each round and entry."""
    path = folder / f"{lines}.txt"
    with open(path, "w", encoding="utf-8") as file:
        for number in range(lines):
            label = number % 400
            file.write(f"class_{label:03d}/abcdefghijk_{number:06d}_000010.mp4 {label}\n")
    found: list[tuple[float, ...]] = []

    def run(_: str) -> float:
        root = Path(__file__).resolve().parents[1]
        command = [sys.executable, "-c", BEGIN, str(path)]
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
        found.append(tuple(map(float, done.stdout.split())))
        return found[-1][0]

    timing = Timing.of(*in_rounds(["list"], run, lambda count: count < rounds)["list"])
    path.unlink()
    _, start, peak, imports = np.median(np.array(found), axis=0).tolist()
    return {**timing.items, "start_ms": start, "peak_mb": peak, "imports_mb": imports}


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    """The options of this bench."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--preset", choices=PRESETS, default="small", help="default: %(default)s")
    parser.add_argument("--videos", type=Path, metavar="DIR", help="in place of written ones")
    there = [reader for reader in READERS if why_not(reader) is None]
    parser.add_argument("--readers", nargs="+", choices=READERS, default=there)
    several = sorted({0, 1, os.cpu_count() or 1})
    parser.add_argument("--workers", nargs="+", type=int, default=several, metavar="N")
    parser.add_argument(
        "--lines",
        nargs="*",
        type=int,
        metavar="N",
        help="of lists to be read",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="rows are added; continues")
    options = parser.parse_args(words)
    if options.lines is None:
        options.lines = PRESETS[options.preset].lines
    if min(options.lines, default=1) < 1:
        parser.error(f"--lines must be 1 or more, got {min(options.lines)}")
    if min(options.workers) < 0:
        parser.error(f"--workers must be 0 or more, got {min(options.workers)}")
    if options.videos and not (options.videos / "train.txt").is_file():
        parser.error(f"--videos: {options.videos} has no train.txt")
    return options


def main(words: Sequence[str] | None = None) -> int:
    """Runs the bench and prints its table; the exit status."""
    options = parse(words)
    preset, bad = PRESETS[options.preset], 0
    rows = Rows(options.json, header("cpu"))
    size = f"{preset.frames} x {preset.height} x {preset.width}"
    video = options.videos.name if options.videos else f"{size}, written here"
    with tempfile.TemporaryDirectory() as folder:
        root = options.videos
        for workers in options.workers:
            key = {"bench": "data", "preset": options.preset, "workers": workers, "video": video}
            key |= {"batch": preset.batch, "clip": (preset.clip_len, preset.crop, preset.crop)}
            found = [rows.find({**key, "reader": each}) for each in options.readers]
            if all(found):
                bad += sum("wrong" in row for row in found)
                continue
            if root is None:
                root = Path(folder)
                sizes = dict(frames=preset.frames, height=preset.height, width=preset.width)
                counts = dict(videos_per_class=4, test_videos_per_class=0)
                write_dataset(root, **sizes, **counts, workers=os.cpu_count() or 1)
            for row in compare(root, key, options.readers, preset):
                rows.append({**key, **row})
                bad += "wrong" in row or "failed" in row
        for lines in options.lines:
            key = {"bench": "lists", "preset": options.preset, "lines": lines, "layout": "files"}
            if rows.find(key) is None:
                rows.append({**key, **begin(lines, preset.rounds, Path(folder))})
    print(rows.table(COLUMNS, {"bench": "data", "preset": options.preset}))
    if options.lines:
        print(rows.table(LIST_COLUMNS, {"bench": "lists", "preset": options.preset}))
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
