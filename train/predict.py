"""`python -m train.predict VIDEO... --checkpoint C`: the likeliest classes of video files."""

from __future__ import annotations

import argparse
import sys

import torch

from train.allocator import set_allocator
from train.checkpoint import CheckpointError
from train.data import read_test_clips
from train.evaluate import load_trained
from train.metrics import video_scores
from train.recipe import add_machine_options, count
from train.transforms import normalize
from train.video import VideoError
from videoswin_kernels import explain
from videoswin_kernels.selection import UnavailableError


def main(arguments: list[str] | None = None) -> int:
    """Predict as the command line says; the exit status: 0 all read, 1 one was not."""
    parser = argparse.ArgumentParser(
        prog="python -m train.predict", description="Name the likeliest classes of videos."
    )
    parser.add_argument("videos", nargs="+", metavar="VIDEO")
    parser.add_argument("--checkpoint", required=True, metavar="FILE")
    parser.add_argument("--top", type=count, default=5, metavar="K", help="classes shown (5)")
    add_machine_options(parser)
    options = parser.parse_args(arguments)
    set_allocator(options.allocator)
    device = torch.device(options.device)
    try:
        model, recipe, classes = load_trained(options.checkpoint, options.kernels, device)
        explain(model)
    except (CheckpointError, UnavailableError) as error:
        print(error, file=sys.stderr)
        return 1
    status = 0
    for path in options.videos:
        try:
            clips = read_test_clips(path, recipe.data)
        except VideoError as error:
            print(error, file=sys.stderr)
            status = 1
            continue
        scores = video_scores(model(normalize(clips[None].to(device))))[0]
        best = scores.topk(min(options.top, len(classes)))
        print(path)
        for rank, (score, label) in enumerate(zip(*best, strict=True), start=1):
            print(f"  {rank}. {classes[label]:<40} {score:>7.2%}")
    return status


if __name__ == "__main__":
    sys.exit(main())
