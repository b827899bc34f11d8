"""`python -m train.features VIDEO... --checkpoint C --output DIR`: what a backbone makes of videos.

Clips go through each video one behind the other, and what the backbone says of them is stored: one
vector a clip, which is what the classifier sees, or all of the token grid.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from model import VideoSwin
from model.weights.download import fetch, locate
from model.weights.files import shown
from train.allocator import set_allocator
from train.data import Broken, broken_summary
from train.evaluate import REFUSALS, add_trained_options
from train.extraction import parts, stored
from train.feature_files import (
    FeatureError,
    FeatureSettings,
    claim,
    fits,
    is_complete,
    target,
)
from train.given import Given, check_names, given_videos
from train.partial import write_text
from train.precision import PRECISIONS
from train.predict import one_behind
from train.recipe import add_machine_options, count
from train.recipes import RECIPES
from train.trained import Trained, load_trained
from train.video import READERS
from videoswin_kernels import explain


def build_parser() -> argparse.ArgumentParser:
    """The options of `python -m train.features`."""
    parser = argparse.ArgumentParser(
        prog="python -m train.features",
        description="Store what the backbone makes of videos: files, all below folders, and those "
        "of lists (.txt, a path a line). Run again, it goes on where it was stopped. Of torchrun's "
        "processes each has a shard and a device of its own.",
    )
    add = parser.add_argument
    add("videos", nargs="+", metavar="VIDEO_OR_FOLDER_OR_LIST")
    add_trained_options(parser)
    add("--output", type=Path, required=True, metavar="DIR", help="one file a video, and settings")
    add(
        "--kind",
        choices=("pooled", "dense"),
        default="pooled",
        help="[clips, C], or the token grid",
    )
    add("--clip-len", type=count, metavar="N", help="frames per clip (the recipe's)")
    add(
        "--interval",
        type=count,
        metavar="N",
        help="from one frame of a clip to the next (the recipe's)",
    )
    add(
        "--stride",
        type=count,
        metavar="N",
        help="frames from clip to clip (clip length x interval)",
    )
    add("--short-side", type=count, metavar="PIXELS", help="of the resized frames (the recipe's)")
    crop = parser.add_mutually_exclusive_group()
    crop.add_argument("--crop", type=count, metavar="PIXELS", help="of both sides (the recipe's)")
    crop.add_argument("--no-crop", action="store_true", help="whole frames, of any shape")
    add("--crops", type=int, choices=(1, 3), default=1, help="the centre, or the mean over three")
    add("--reader", choices=READERS, help="what decodes (the recipe's)")
    add("--format", choices=("npy", "safetensors"), default="npy")
    add("--half", action="store_true", help="store float16")
    add("--batch-size", type=count, default=4, metavar="N", help="clips at a time (4)")
    add(
        "--shard",
        type=_shard,
        metavar="I/N",
        help="every N-th video, from the I-th",
    )
    add("--precision", choices=PRECISIONS, default="float32")
    add_machine_options(parser)
    return parser


def _shard(word: str) -> tuple[int, int]:
    index, _, total = word.partition("/")
    if not (index.isdecimal() and total.isdecimal() and 1 <= int(index) <= int(total)):
        raise argparse.ArgumentTypeError(f"must be I/N with I from 1 to N, got {word!r}")
    return int(index), int(total)


def settings_of(trained: Trained, options: argparse.Namespace) -> FeatureSettings:
    """What the options and the recipe come to.

    Raises:
        FeatureError: options that contradict each other or the recipe.
    """
    data = trained.recipe.data
    interval, clip_len = options.interval or data.interval, options.clip_len or data.clip_len
    short_side = options.short_side or data.test_short_side
    crop = 0 if options.no_crop else options.crop or data.crop
    if data.sampling == "uniform" and options.interval is None:
        raise FeatureError(
            "--interval is needed: the recipe spreads a clip over all of a video and has none"
        )
    if options.crops == 3 and (options.kind == "dense" or crop != short_side):
        raise FeatureError(
            "--crops 3 is a mean over three pooled crops as large as the short side: expected "
            f"--kind pooled, and a --crop of --short-side {short_side}, got --kind {options.kind} "
            f"and {f'--crop {crop}' if crop else '--no-crop'}"
        )
    if crop > short_side:
        raise FeatureError(f"--crop must be at most --short-side {short_side}, got {crop}")
    return FeatureSettings(
        checkpoint_sha256=digest(options.checkpoint, options.recipe),
        model=trained.recipe.model.name,
        clip_len=clip_len,
        interval=interval,
        stride=options.stride or clip_len * interval,
        kind=options.kind,
        crops=options.crops,
        short_side=short_side,
        crop=crop,
        reader=options.reader or data.reader,
        precision=options.precision,
        dtype="float16" if options.half else "float32",
        format=options.format,
    )


def digest(checkpoint: str, recipe: str | None) -> str:
    """SHA-256, in hex, of the file that `load_trained` reads for the same words."""
    path = checkpoint if recipe is None else locate(RECIPES[recipe].model.name, checkpoint)
    found = hashlib.sha256()
    with open(fetch(str(path)) if "://" in str(path) else path, "rb") as file:
        while block := file.read(2**20):
            found.update(block)
    return found.hexdigest()


def place(word: str) -> tuple[tuple[int, int], torch.device]:
    """The shard and the device of this process among those that torchrun started.

    Of more than one process each has the GPU of its local rank, as in `parallel.joined`; what they
    do needs no process group.
    """
    world, device = int(os.environ.get("WORLD_SIZE", "1")), torch.device(word)
    if world == 1:
        return (1, 1), device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    return (int(os.environ["RANK"]) + 1, world), device


def main(arguments: list[str] | None = None) -> int:
    """Extract as the command line says; the exit status: 0 all read, 1 one was not, or refused."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    if options.checkpoint is None:
        parser.error("--checkpoint is needed")
    shard, device = place(options.device)
    if options.shard is not None and shard != (1, 1):
        parser.error(f"--shard: torchrun has made this process {shard[0]}/{shard[1]}: leave it out")
    options.shard = options.shard or shard
    set_allocator(options.allocator)
    try:
        videos = given_videos(options.videos)
        check_names(videos)
        trained = load_trained(options.checkpoint, options.kernels, device, options.recipe)
        explain(trained.model)
        settings = settings_of(trained, options)
        claim(options.output, settings, options.shard)
        index, total = options.shard
        return _extract_all(trained.model, videos[index - 1 :: total], settings, options, device)
    except (*REFUSALS, FeatureError) as error:
        print(error, file=sys.stderr)
    except OSError as error:
        where = error.filename or options.output
        print(f"{where}: {(error.strerror or str(error)).lower()}", file=sys.stderr)
    return 1


def _extract_all(
    model: VideoSwin,
    videos: list[Given],
    settings: FeatureSettings,
    options: argparse.Namespace,
    device: torch.device,
) -> int:
    """Makes the files that are not there yet, and tells which cannot be made; the exit status."""
    missing, broken, there, clips = [], [], 0, 0
    for video in videos:
        path = target(options.output, video, settings)
        if is_complete(path, video):
            there += 1
        elif fits(path, options.output):
            missing.append(video)
        else:
            broken.append(Broken(video.name, "its name is too long for a file in --output"))
    before = there + len(broken)
    with tqdm(total=len(videos), initial=before, unit="video", disable=None) as bar:
        found = one_behind(parts(model, missing, settings, options.batch_size, device))
        for part in stored(found, options.output, settings):
            if isinstance(part, Broken):
                broken.append(part)
            else:
                clips += len(part.features)
            if isinstance(part, Broken) or part.is_last:
                bar.update()
            bar.set_postfix(clips=clips, broken=len(broken))
    _name_broken(options.output, options.shard, broken)
    made = len(videos) - there - len(broken)
    print(f"{made} videos done, {there} were there: {shown(options.output)}")
    if broken:
        print(broken_summary([Broken(*map(shown, each)) for each in broken]))
    return int(bool(broken))


def _name_broken(folder: Path, shard: tuple[int, int], broken: list[Broken]) -> None:
    """Writes which videos have no features, and why, a line each; without any, no file."""
    name = "broken.txt" if shard == (1, 1) else f"broken.{shard[0]}-of-{shard[1]}.txt"
    path = folder / name
    if broken:
        write_text(path, "".join(f"{each.path}\t{each.reason}\n" for each in broken))
    else:
        path.unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(main())
