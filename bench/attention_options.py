"""What the benches of operators measure: presets, settings and the command line."""

from __future__ import annotations

import argparse
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from bench import allocators
from bench.attention_peers import Problem
from bench.attention_providers import MAKERS
from videoswin_kernels.geometry import check_window, clamp_window
from videoswin_kernels.testing import PRODUCTION, Case, Stage, Triple

# Both ways, and one after the other as in training.
DIRECTIONS = ("forward", "backward", "forward+backward")
DTYPES = {name: getattr(torch, name) for name in ("float32", "float16", "bfloat16")}


class Preset(NamedTuple):
    """How large and how long.

    Attributes:
        grid: the largest token grid; that of a stage is cut to it.
        batch: clips.
        seconds: how long the providers of one stage and direction repeat, all of them together.
        least: repetitions there are at least.
    """

    grid: Triple
    batch: int
    seconds: float
    least: int


PRESETS = {
    "full": Preset((16, 56, 56), 8, 1.5, 5),
    # A CPU's: one clip.
    "clip": Preset((16, 56, 56), 1, 2.0, 3),
    "small": Preset((16, 14, 7), 1, 0.3, 3),
    # For the bench's own tests: its times mean nothing.
    "tiny": Preset((2, 5, 6), 2, 0.0, 1),
}


class Setting(NamedTuple):
    """What all providers are measured with."""

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
    for number, stage in enumerate(PRODUCTION.values(), 1):
        if number not in options.stage:
            continue
        grid = tuple(map(min, preset.grid, stage.case.grid))
        for shifted in options.shifted:
            shift = tuple(w // 2 for w in options.window) if shifted else (0, 0, 0)
            if shifted and not any(clamp_window(grid, options.window, shift)[1]):
                continue
            case = Case(grid, options.window, shift)
            batch = options.batch or preset.batch
            stage = stage._replace(case=case)
            yield Setting(number, stage, shifted, batch, options.dtype, options.preset)


def parser_of(
    script: str, about: str | None, directions: Sequence[str], providers: Collection[str]
) -> argparse.ArgumentParser:
    """The options that the benches of operators share."""
    parser = argparse.ArgumentParser(prog=f"bench/{script}", description=about)
    found = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=found)
    parser.add_argument("--preset", choices=PRESETS, help="default: full on a GPU, clip on a CPU")
    parser.add_argument("--stage", type=int, choices=(1, 2, 3, 4), help="default: all four")
    parser.add_argument("--direction", choices=(*directions, "both"), default="both")
    parser.add_argument("--dtype", choices=DTYPES, help="default: bfloat16 on a GPU, else float32")
    parser.add_argument("--batch", type=int, help="clips; default: that of the preset")
    parser.add_argument("--providers", default=",".join(providers), help="default: %(default)s")
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
    options.preset = options.preset or ("full" if is_cuda else "clip")
    options.dtype = options.dtype or ("bfloat16" if is_cuda else "float32")
    options.stage = (options.stage,) if options.stage else (1, 2, 3, 4)
    options.direction = directions if options.direction == "both" else (options.direction,)
    options.providers = options.providers.split(",")
    unknown = set(options.providers) - set(providers)
    if unknown:
        parser.error(f"--providers: {', '.join(sorted(unknown))} is none of {', '.join(providers)}")
    if options.batch is not None and options.batch < 1:
        parser.error(f"--batch must be at least 1, got {options.batch}")
    allocators.settle(parser, options)
    return options


def parse(arguments: Sequence[str] | None, about: str | None = None) -> argparse.Namespace:
    """The options of the attention bench."""
    parser = parser_of("attention.py", about, DIRECTIONS, MAKERS)
    parser.add_argument("--shifted", choices=("yes", "no", "both"), default="both")
    parser.add_argument("--window", default="8,7,7", help="configured window, tokens: 8,7,7")
    options = settle(parser, arguments, DIRECTIONS, MAKERS)
    options.shifted = {"yes": (True,), "no": (False,), "both": (False, True)}[options.shifted]
    try:
        options.window, _ = check_window(
            "--window", tuple(map(int, options.window.split(","))), (0, 0, 0)
        )
    except ValueError as error:
        parser.error(str(error))
    return options
