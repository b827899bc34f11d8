"""The operators beside attention at every stage: kernel sets and plain PyTorch, in GB/s.

`python bench/operators.py [--device cpu|cuda] [--operators NAME ...] [--stage 1..4] [--json FILE]`;
bench/README.md says how to read it. Before the clock a norm is compared with float64, and movement
with plain PyTorch bit for bit; what is wrong has no time.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from bench import allocators
from bench.attention import find_ceilings
from bench.attention_options import DTYPES, PRESETS, parser_of, settle
from bench.attention_providers import NAMED, not_timed
from bench.harness import Rows, attempt, clocks, measure, peak_memory
from bench.operator_problems import Problem, random_problem, traffic, wrong
from videoswin_kernels.selection import OPERATORS, Call, choose
from videoswin_kernels.testing import PRODUCTION, Stage

COLUMNS = {
    "operator": "operator",
    "stage": "stage",
    "direction": "direction",
    "dtype": "dtype",
    "provider": "provider",
    "ms": "median ms",
    "spread": "20-80 %",
    "gb_per_s": "GB/s",
    "copy_percent": "% of copy",
    "peak_mb": "peak MB",
    "times_reference": "x reference",
}
# Attention has a bench of its own.
MEASURED = tuple(name for name in OPERATORS if name != "window_attention")
PROVIDERS = ("reference", *NAMED)
DIRECTIONS = ("forward", "forward+backward")


def ready(problem: Problem, direction: str, provider: str) -> tuple[Callable | None, dict]:
    """(the function that is timed, or None, and the items of its row that are known by then)."""
    x, trains = next(iter(problem.inputs.values())), direction != "forward"
    choose(Call(problem.operator, x.device.type, x.device.index, (x.dtype,)), provider)
    reason = not_timed(problem.operator, provider, x.device)
    if reason is not None:
        return None, {"reason": reason}
    items = wrong(problem, provider, trains)
    own = problem.leaves() if trains else problem
    return None if "wrong" in items else partial(own.call, provider, trains), items


def compare(problem: Problem, key: dict, copy: float, options: argparse.Namespace) -> list[dict]:
    """The rows of an operator, stage and direction, all measured together; `copy` is in bytes/s."""
    device, preset = torch.device(options.device), PRESETS[options.preset]
    make = partial(ready, problem, key["direction"])
    found = {each: attempt(partial(make, each), device) for each in options.providers}
    functions = {each: function for each, (function, _) in found.items() if function}
    timings = measure(functions, device, seconds=preset.seconds, least=preset.least)
    after, rows = clocks(device), []
    moved = traffic(problem, problem.outputs("reference"), key["direction"])
    for provider, (function, items) in found.items():
        if isinstance(fault := items.pop("fault", None), torch.AcceleratorError):
            raise fault
        row = {**key, "provider": provider, **items}
        if function:
            rate = moved / timings[provider].median * 1e3
            row |= {**timings[provider].items, "bytes": moved, "clocks_after": after}
            row |= {"gb_per_s": rate / 1e9, "copy_percent": 100 * rate / copy}
            row |= {"peak_mb": peak_memory(function, device) / 1e6}
            if "reference" in timings:
                row["times_reference"] = timings["reference"].median / timings[provider].median
        rows.append(row)
    return rows


def settings(options: argparse.Namespace) -> Iterator[tuple[str, Stage, dict]]:
    """(operator, stage, items by which its rows are found again)."""
    preset = PRESETS[options.preset]
    for operator in options.operators:
        for number, stage in enumerate(PRODUCTION.values(), 1):
            # No merging ends the last stage.
            if number not in options.stage or (operator, number) == ("patch_merging", 4):
                continue
            grid = tuple(map(min, preset.grid, stage.case.grid))
            key = {"bench": "operators", "preset": options.preset, "operator": operator}
            key |= {"stage": number, "dtype": options.dtype, "grid": grid}
            key |= {"channels": stage.channels, "batch": options.batch or preset.batch}
            yield operator, stage._replace(case=stage.case._replace(grid=grid)), key


def fill(options: argparse.Namespace, rows: Rows) -> int:
    """Appends every row that is not there yet; the exit status."""
    began, bad, left = time.monotonic(), 0, 0
    device, dtype = torch.device(options.device), DTYPES[options.dtype]
    copy = find_ceilings(rows, device, options.dtype, min(PRESETS[options.preset].seconds, 0.6))
    for operator, stage, place in settings(options):
        for direction in options.direction:
            key = {**place, "direction": direction}
            if all(rows.has({**key, "provider": each}) for each in options.providers):
                continue
            if options.minutes is not None and time.monotonic() - began > 60 * options.minutes:
                left += 1
                continue
            problem = random_problem(operator, stage, place["batch"], dtype, device)
            for row in compare(problem, key, copy.bytes, options):
                rows.append(row)
                bad += "wrong" in row or "failed" in row
        print(f"{operator}, stage {place['stage']}: done", file=sys.stderr, flush=True)
    if left:
        print(f"{left} settings are left after {options.minutes} minutes", file=sys.stderr)
    return int(bad > 0)


def main(words: Sequence[str] | None = None) -> int:
    """Runs the bench and prints its table; the exit status."""
    about = __doc__.partition("\n")[0]
    parser = parser_of("operators.py", about, DIRECTIONS, PROVIDERS)
    parser.add_argument("--operators", nargs="+", choices=MEASURED, default=MEASURED)
    options = settle(parser, words, DIRECTIONS, PROVIDERS)
    rows, status = allocators.conduct(__file__, words, options, partial(fill, options))
    columns = allocators.with_state(COLUMNS, options)
    print(rows.table(columns, {"bench": "operators", "preset": options.preset}))
    return status


if __name__ == "__main__":
    sys.exit(main())
