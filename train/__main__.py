"""`python -m train --recipe NAME`: train a recipe."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from train.allocator import set_allocator
from train.checkpoint import CheckpointError
from train.data import ListError, broken_summary
from train.loop import Run, RunError
from train.recipe import RECIPES, add_machine_options, resolve_recipe
from videoswin_kernels import explain
from videoswin_kernels.selection import UnavailableError


def main(arguments: list[str] | None = None) -> int:
    """Train as the command line says; the exit status: 0 done, 1 refused, 130 interrupted."""
    parser = argparse.ArgumentParser(
        prog="python -m train",
        description="Train Video Swin on video files.",
        epilog="Any field of the recipe can be set: --data.root=DIR --optim.lr=0.001 ...; "
        "`python -m train --recipe NAME --fields` lists them.",
    )
    parser.add_argument("--recipe", required=True, metavar="NAME")
    parser.add_argument("--output", type=Path, metavar="DIR", help="default: runs/NAME")
    parser.add_argument("--resume", action="store_true", help="go on from the run in DIR, if any")
    parser.add_argument("--fields", action="store_true", help="list the fields of the recipe")
    add_machine_options(parser)
    options, overrides = parser.parse_known_args(arguments)
    print(set_allocator(options.allocator))
    if options.recipe not in RECIPES:
        parser.error(f"--recipe must be one of {', '.join(RECIPES)}, got {options.recipe!r}")
    recipe = resolve_recipe(RECIPES[options.recipe], ["--help"] if options.fields else overrides)
    try:
        run = Run(
            recipe,
            options.output or Path("runs", options.recipe),
            kernels=options.kernels,
            device=options.device,
            resume=options.resume,
        )
        for choice in explain(run.model):
            print(f"{choice.operator}: {choice.kernels} ({choice.reason})")
        where = f"step {run.step} of {run.num_steps}, {run.output}"
        videos = f"{len(run.dataset)} training videos"
        print(f"{recipe.model.name} on {options.device}, {videos}, {where}", flush=True)
        is_done = run.train()
    except (ListError, CheckpointError, RunError, UnavailableError) as error:
        print(error, file=sys.stderr)
        return 1
    except OSError as error:
        # A folder that cannot be written to, a full disk.
        print(f"{error.filename}: {(error.strerror or str(error)).lower()}", file=sys.stderr)
        return 1
    print(broken_summary([*run.broken.items(), *run.broken_test.items()]))
    if not is_done:
        print(f"stopped at step {run.step}; --resume goes on from there", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
