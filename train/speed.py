"""`python -m train.speed --recipe NAME`: clips/s of training under two kernel sets, in turn."""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Callable
from statistics import median

import torch

from train.allocator import set_allocator
from train.optim import build_optimizer
from train.parallel import Group
from train.recipe import Recipe, add_machine_options, build_model, count, resolve_recipe
from train.recipes import RECIPES
from train.step import Stepper
from videoswin_kernels import explain
from videoswin_kernels.selection import UnavailableError

# The head is so small a part of a step that their number does not matter.
NUM_CLASSES = 8
# However slow the machine is, no step begins later.
MOST_SECONDS = 8.0


def build_step(recipe: Recipe, kernels: str, device: torch.device) -> tuple[Callable, str]:
    """A step of the recipe on random clips, without the reading of videos; and what runs it.

    Raises:
        UnavailableError: the kernels cannot run the model.
        ValueError: the recipe describes no model.
    """
    data, batch_size = recipe.data, recipe.loop.batch_size
    generator = torch.Generator().manual_seed(recipe.loop.seed)
    shape = (batch_size, 3, data.clip_len, data.crop, data.crop)
    clips = torch.randint(256, shape, dtype=torch.uint8, generator=generator).to(device)
    labels = torch.arange(batch_size, device=device) % NUM_CLASSES
    torch.manual_seed(recipe.loop.seed)
    model = build_model(recipe.model, NUM_CLASSES, kernels).to(device).train()
    chosen = Counter(choice.kernels for choice in explain(model))
    optimizer = build_optimizer(model, recipe.optim)
    stepper = Stepper(model, optimizer, recipe.optim, recipe.loop, shape[1:], Group(device))

    def step() -> None:
        stepper.step(clips, labels, batch_size, stepper.num_passes(batch_size))

    said = (f"{name} for {count} operator{'s' * (count > 1)}" for name, count in chosen.items())
    return step, ", ".join(said)


def seconds_of(step: Callable[[], None], device: torch.device) -> float:
    """How long a step takes, to the end of what it leaves running on a GPU."""
    began = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


def main(arguments: list[str] | None = None) -> int:
    """Time as the command line says; the exit status: 0 done, 1 the recipe describes no model."""
    parser = argparse.ArgumentParser(
        prog="python -m train.speed",
        description="Time training steps of a recipe, on random clips, under --kernels and under "
        "the reference in turn.",
        epilog="Any field of the recipe can be set: --loop.batch-size=8 --data.crop=224 ...",
    )
    parser.add_argument("--recipe", required=True, metavar="NAME")
    parser.add_argument("--steps", type=count, default=20, metavar="N", help="of each at most (20)")
    add_machine_options(parser)
    parser.set_defaults(kernels="fused")
    options, overrides = parser.parse_known_args(arguments)
    set_allocator(options.allocator)
    if options.recipe not in RECIPES:
        parser.error(f"--recipe must be one of {', '.join(RECIPES)}, got {options.recipe!r}")
    recipe = resolve_recipe(RECIPES[options.recipe], overrides)
    device = torch.device(options.device)
    steps, said, seconds = {}, {}, {}
    for kernels in dict.fromkeys((options.kernels, "reference")):
        try:
            steps[kernels], said[kernels] = build_step(recipe, kernels, device)
        except UnavailableError as error:
            print(f"{kernels}: {error}")
        except ValueError as error:
            print(error, file=sys.stderr)
            return 1
    # The first time of each counts for nothing; then in turn, so that what slows one slows both.
    for step in steps.values():
        step()
    began, done = time.monotonic(), 0
    while done < options.steps and (not done or time.monotonic() - began < MOST_SECONDS):
        for kernels, step in steps.items():
            seconds.setdefault(kernels, []).append(seconds_of(step, device))
        done += 1
    for kernels, taken in seconds.items():
        speed = recipe.loop.batch_size / median(taken)
        detail = "" if kernels == "reference" else f" ({said[kernels]})"
        print(f"{kernels}: {speed:.{0 if speed >= 10 else 2}f} clips/s{detail}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
