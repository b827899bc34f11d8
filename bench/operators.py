"""The operators beside attention at every stage: kernel sets and plain PyTorch, in GB/s.

`python bench/operators.py [--device cpu|cuda] [--operators NAME ...] [--stage 1..4] [--json FILE]`,
or a script of its own for some of them; bench/README.md says how to read it. Before the clock a
norm is compared with float64, and movement with plain PyTorch bit for bit; what is wrong has no
time.
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

from bench import allocators, floors
from bench.attention_options import DTYPES, PRESETS, parser_of, settle, sized
from bench.attention_providers import NAMED, not_timed
from bench.harness import Rows, attempt, clocks, peak_memory, time_all
from bench.operator_problems import Problem, random_problem, wrong
from bench.sizes import depths
from videoswin_kernels.selection import OPERATORS, Call, choose
from videoswin_kernels.testing import Stage

COLUMNS = {
    "operator": "operator",
    "model": "model",
    "stage": "stage",
    "direction": "direction",
    "dtype": "dtype",
    "provider": "provider",
    "ms": "median ms",
    "spread": "20-80 %",
    "noise_percent": "+- %",
    "gb_per_s": "GB/s",
    "floor_percent": "% of floor",
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


def compare(
    problem: Problem,
    stage: Stage,
    key: dict,
    ceilings: Callable[[], floors.Ceilings],
    options: argparse.Namespace,
) -> list[dict]:
    """The rows of an operator, stage and direction, all measured together."""
    device, preset = torch.device(options.device), PRESETS[options.preset]
    make = partial(ready, problem, key["direction"])
    found = {each: attempt(partial(make, each), device) for each in options.providers}
    timings = time_all(found, device, seconds=preset.seconds, least=preset.least)
    after, rows = clocks(device), []
    itemsize = DTYPES[key["dtype"]].itemsize
    works = [
        floors.movement(problem.operator, stage, key["batch"], part, itemsize)
        for part in key["direction"].split("+")
    ]
    moved = sum(work.bytes for work in works)
    for provider, (function, items) in found.items():
        if isinstance(fault := items.pop("fault", None), torch.AcceleratorError):
            raise fault
        row = {**key, "provider": provider, **items}
        if function:
            ms = timings[provider].median
            row |= {**timings[provider].items, "bytes": moved, "clocks_after": after}
            row |= {"gb_per_s": moved / ms / 1e6, **floors.items(works, ceilings(), ms)}
            row |= {"peak_mb": peak_memory(function, device) / 1e6}
            if "reference" in timings:
                row["times_reference"] = timings["reference"].median / ms
        rows.append(row)
    return rows


def settings(options: argparse.Namespace) -> Iterator[tuple[str, Stage, dict]]:
    """(operator, stage, items by which its rows are found again)."""
    preset, last = PRESETS[options.preset], len(depths(options.model))
    for operator in options.operators:
        for number, stage in sized(options):
            # No merging ends the last stage.
            if (operator, number) == ("patch_merging", last):
                continue
            key = {"bench": "operators", "preset": options.preset, "operator": operator}
            key |= {"model": options.model, "stage": number, "dtype": options.dtype}
            key |= {"grid": stage.case.grid, "window": stage.case.window}
            key |= {"channels": stage.channels, "batch": options.batch or preset.batch}
            yield operator, stage, key


def fill(options: argparse.Namespace, rows: Rows) -> int:
    """Appends every row that is not there yet; the exit status."""
    began, bad, left = time.monotonic(), 0, 0
    device, dtype = torch.device(options.device), DTYPES[options.dtype]
    seconds = min(PRESETS[options.preset].seconds, 0.6)
    ceilings = floors.CeilingsOf(rows, device, options.dtype, options.preset, seconds)
    for operator, stage, place in settings(options):
        for direction in options.direction:
            key = {**place, "direction": direction}
            found = [rows.find({**key, "provider": each}) for each in options.providers]
            if all(found):
                bad += sum("wrong" in row for row in found)
                continue
            if options.minutes is not None and time.monotonic() - began > 60 * options.minutes:
                left += 1
                continue
            problem = random_problem(operator, stage, place["batch"], dtype, device)
            for row in compare(problem, stage, key, ceilings, options):
                rows.append(row)
                bad += "wrong" in row or "failed" in row
        print(f"{operator}, stage {place['stage']}: done", file=sys.stderr, flush=True)
    if left:
        print(f"{left} settings are left after {options.minutes} minutes", file=sys.stderr)
    return int(bad > 0)


def main(
    words: Sequence[str] | None = None,
    *,
    script: str = __file__,
    operators: Sequence[str] = MEASURED,
) -> int:
    """Runs the bench and prints its table; the exit status.

    Args:
        words: the command line, None for that of this process.
        script: the file that is run once for each state of the allocator.
        operators: those of the script.
    """
    about = __doc__.partition("\n")[0]
    parser = parser_of(Path(script).name, about, DIRECTIONS, PROVIDERS)
    parser.add_argument("--operators", nargs="+", choices=operators, default=operators)
    options = settle(parser, words, DIRECTIONS, PROVIDERS)
    rows, status = allocators.conduct(script, words, options, partial(fill, options))
    columns = allocators.with_state(COLUMNS, options)
    where = {"bench": "operators", "preset": options.preset}
    print(
        "\n\n".join(rows.table(columns, {**where, "operator": each}) for each in options.operators)
    )
    return status


if __name__ == "__main__":
    sys.exit(main())
