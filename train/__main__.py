"""`python -m train --recipe NAME`: train a recipe; with torchrun, on several devices."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from model.weights.files import WeightsError
from train.allocator import set_allocator
from train.checkpoint import CheckpointError
from train.data import broken_summary
from train.lists import ListError
from train.loop import Run, RunError
from train.parallel import PARALLEL, DisagreementError, Group, joined
from train.prefetch import WorkerError
from train.recipe import Recipe, add_machine_options, count, resolve_recipe, to_dict
from train.recipes import RECIPES, listing
from train.video import ReaderError
from videoswin_kernels import explain
from videoswin_kernels.selection import UnavailableError

REFUSALS = (
    *(ListError, CheckpointError, RunError, UnavailableError, WeightsError, WorkerError),
    *(ReaderError, DisagreementError, ImportError),
)


def main(arguments: list[str] | None = None) -> int:
    """Train as the command line says; the exit status: 0 done or stopped, 1 refused."""
    parser = argparse.ArgumentParser(
        prog="python -m train",
        description="Train Video Swin on video files; under torchrun, on several devices.",
        epilog="Any field of the recipe can be set: --data.root=DIR --optim.lr=0.001 ...; "
        "`python -m train --recipe NAME --fields` lists them.",
    )
    parser.add_argument("--recipe", metavar="NAME")
    parser.add_argument("--list", action="store_true", help="list the recipes")
    parser.add_argument("--fields", action="store_true", help="list the fields of the recipe")
    parser.add_argument("--output", type=Path, metavar="DIR", help="default: runs/NAME")
    parser.add_argument(
        "--resume",
        nargs="?",
        const="auto",
        choices=("auto",),
        help="go on from the newest checkpoint in DIR that can be read, if there is any",
    )
    parser.add_argument(
        "--parallel", choices=PARALLEL, default="ddp", help="of several processes (ddp)"
    )
    parser.add_argument("--compile", action="store_true", help="compile the model")
    parser.add_argument("--tensorboard", action="store_true", help="write DIR/tensorboard, too")
    parser.add_argument(
        "--profile", type=count, default=0, metavar="N", help="record N steps in DIR/trace.json"
    )
    add_machine_options(parser)
    options, overrides = parser.parse_known_args(arguments)
    if options.list:
        print(listing())
        return 0
    if options.recipe not in RECIPES:
        parser.error(f"--recipe must be one of {', '.join(RECIPES)}, got {options.recipe!r}")
    recipe = resolve_recipe(RECIPES[options.recipe], ["--help"] if options.fields else overrides)
    allocator = set_allocator(options.allocator)
    try:
        with joined(options.device) as group:
            if group.is_first:
                print(allocator)
            return train(recipe, options, group)
    except REFUSALS as error:
        print(error, file=sys.stderr)
    except OSError as error:
        # A folder that cannot be written to.
        where = error.filename or options.output or Path("runs", options.recipe)
        print(f"{where}: {(error.strerror or str(error)).lower()}", file=sys.stderr)
    return 1


def train(recipe: Recipe, options: argparse.Namespace, group: Group) -> int:
    """Train in this process; the exit status."""
    run = Run(
        recipe,
        options.output or Path("runs", options.recipe),
        kernels=options.kernels,
        resume=options.resume is not None,
        group=group,
        parallel=options.parallel,
        compiles=options.compile,
        has_tensorboard=options.tensorboard,
        profiled=options.profile,
    )
    say = print if group.is_first else lambda *_, **__: None
    for choice in explain(run.model):
        say(f"{choice.operator}: {choice.kernels} ({choice.reason})")
    for missing in run.classes_without_videos:
        say(f"no training video is of class {missing}")
    for part, values in to_dict(recipe).items():
        say(f"{part}: {', '.join(f'{name} {value}' for name, value in values.items())}")
    videos = f"{len(run.dataset)} training videos"
    where = f"step {run.step} of {run.num_steps}, {run.output}"
    say(run.beginning)
    say(run)
    say(f"{recipe.model.name} on {group.device}, {videos}, {where}", flush=True)
    is_done = run.train()
    say(broken_summary([*run.broken.items(), *run.broken_test.items()]))
    if run.skipped:
        say(f"steps skipped, as their gradients were no finite numbers: {run.skipped}")
    if not is_done and group.is_first:
        print(f"stopped at step {run.step}; --resume goes on from there", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
