"""What the benches of operators measure: presets, settings and the command line."""

from __future__ import annotations

import argparse
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from bench import allocators
from bench.attention_peers import Problem
from bench.attention_providers import COMPILED, MAKERS
from bench.sizes import stages
from model.variants import VARIANTS
from videoswin_kernels.geometry import check_window, clamp_window
from videoswin_kernels.testing import Case, Stage, Triple

# Both ways, and one after the other as in training.
DIRECTIONS = ("forward", "backward", "forward+backward")
DTYPES = {name: getattr(torch, name) for name in ("float32", "float16", "bfloat16")}


class Preset(NamedTuple):
    """How large and how long.

    Attributes:
        grid: the largest token grid; that of a stage is cut to it.
        batch: clips.
        seconds: how long the providers of one stage and direction repeat, all of them together.
        least: rounds of all of them there are at least.
    """

    grid: Triple
    batch: int
    seconds: float
    least: int


PRESETS = {
    "full": Preset((16, 56, 56), 8, 1.5, 6),
    # One clip: as much as a CPU is asked for.
    "clip": Preset((16, 56, 56), 1, 2.0, 6),
    # Two windows, or one where a stage has no more. Its rows are never among the published ones.
    "small": Preset((8, 14, 7), 1, 0.3, 6),
    # For the bench's own tests: its times mean nothing.
    "tiny": Preset((2, 5, 6), 2, 0.0, 1),
}


class Setting(NamedTuple):
    """What all providers are measured with."""

    model: str
    number: int
    stage: Stage
    shifted: bool
    batch: int
    dtype: str
    preset: str

    @property
    def key(self) -> dict:
        """The items by which a row is found again."""
        return {
            "bench": "attention",
            "preset": self.preset,
            "model": self.model,
            "stage": self.number,
            "shifted": self.shifted,
            "dtype": self.dtype,
            "batch": self.batch,
            "grid": self.stage.case.grid,
            "window": self.stage.case.window,
            "channels": self.stage.channels,
            "heads": self.stage.heads,
        }

    def problem(self, device: torch.device) -> Problem:
        """Random inputs."""
        return Problem.random(self.stage, self.batch, DTYPES[self.dtype], device)


def settings(options: argparse.Namespace) -> Iterator[Setting]:
    """Those that the options ask for; a shift that all axes clamp away is left out."""
    preset = PRESETS[options.preset]
    for number, stage in sized(options):
        grid, window, shift = stage.case
        for shifted in options.shifted:
            shift = tuple(w // 2 for w in window) if shifted else (0, 0, 0)
            if shifted and not any(clamp_window(grid, window, shift)[1]):
                continue
            exact = stage._replace(case=Case(grid, window, shift))
            batch = options.batch or preset.batch
            names = (options.dtype, options.preset)
            yield Setting(options.model, number, exact, shifted, batch, *names)


def sized(options: argparse.Namespace) -> Iterator[tuple[int, Stage]]:
    """(number, stage) of the model's stages that are asked for, on the grid of the preset."""
    for number, stage in enumerate(stages(options.model, window=options.window), 1):
        if number in options.stage:
            grid = tuple(map(min, PRESETS[options.preset].grid, stage.case.grid))
            yield number, stage._replace(case=stage.case._replace(grid=grid))


def parser_of(
    script: str, about: str | None, directions: Sequence[str], providers: Collection[str]
) -> argparse.ArgumentParser:
    """The options that the benches of operators share."""
    parser = argparse.ArgumentParser(prog=f"bench/{script}", description=about)
    found = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=found)
    parser.add_argument("--preset", choices=PRESETS, help="default: full on a GPU, small on a CPU")
    parser.add_argument("--model", choices=VARIANTS, default="swin_t", help="default: %(default)s")
    parser.add_argument("--stage", type=int, choices=(1, 2, 3, 4), help="default: all of them")
    parser.add_argument("--window", metavar="D,H,W", help="tokens; default: that of the model")
    parser.add_argument("--direction", choices=(*directions, "both"), default="both")
    parser.add_argument("--dtype", choices=DTYPES, help="default: bfloat16 on a GPU, else float32")
    parser.add_argument("--batch", type=int, help="clips; default: that of the preset")
    parser.add_argument("--providers", help=f"default: {','.join(providers)}")
    parser.add_argument("--json", type=Path, metavar="FILE", help="rows are added; continues")
    parser.add_argument("--minutes", type=float, help="begin no other setting after this time")
    allocators.add_option(parser)
    return parser


def settle(
    parser: argparse.ArgumentParser,
    arguments: Sequence[str] | None,
    directions: Sequence[str],
    providers: Collection[str],
) -> argparse.Namespace:
    """The options of `parser_of`, checked, with lists in place of their words."""
    options = parser.parse_args(arguments)
    is_cuda = options.device == "cuda"
    if is_cuda and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA GPU here")
    options.preset = options.preset or ("full" if is_cuda else "small")
    options.dtype = options.dtype or ("bfloat16" if is_cuda else "float32")
    options.stage = (options.stage,) if options.stage else (1, 2, 3, 4)
    options.direction = directions if options.direction == "both" else (options.direction,)
    is_small = options.preset in ("small", "tiny")
    options.excused = COMPILED if is_small and options.providers is None else ()
    options.providers = options.providers.split(",") if options.providers else list(providers)
    unknown = set(options.providers) - set(providers)
    if unknown:
        parser.error(f"--providers: {', '.join(sorted(unknown))} is none of {', '.join(providers)}")
    if options.batch is not None and options.batch < 1:
        parser.error(f"--batch must be at least 1, got {options.batch}")
    if options.window is not None:
        try:
            window = tuple(map(int, options.window.split(",")))
            options.window, _ = check_window("--window", window, (0, 0, 0))
        except ValueError as error:
            parser.error(str(error))
    allocators.settle(parser, options)
    return options


def parse(arguments: Sequence[str] | None, about: str | None = None) -> argparse.Namespace:
    """The options of the attention bench."""
    parser = parser_of("attention.py", about, DIRECTIONS, MAKERS)
    parser.add_argument("--shifted", choices=("yes", "no", "both"), default="both")
    options = settle(parser, arguments, DIRECTIONS, MAKERS)
    options.shifted = {"yes": (True,), "no": (False,), "both": (False, True)}[options.shifted]
    return options
