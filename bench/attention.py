"""Window attention of every stage: kernel sets, the reference, and what a user would run instead.

`python bench/attention.py [--device cpu|cuda] [--stage 1..4] [--json FILE] ...`; bench/README.md
says how to read it. A provider is compared with float64 before it is timed, and one that is wrong
has no time. Exits with 1 where one is wrong or fails; one that cannot run here says why.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch._functorch import config

from bench import allocators, floors, harness
from bench.attention_options import DTYPES, PRESETS, Setting, parse, settings
from bench.attention_peers import Problem
from bench.attention_providers import MAKERS, Judge, differentiate, refusal
from bench.attention_torchvision import Torchvision
from bench.harness import Rows, clocks, peak_memory
from videoswin_kernels import window_attention
from videoswin_kernels.selection import explain

COLUMNS = {
    "model": "model",
    "stage": "stage",
    "direction": "direction",
    "shifted": "shifted",
    "dtype": "dtype",
    "provider": "provider",
    "ms": "median ms",
    "spread": "20-80 %",
    "noise_percent": "+- %",
    "tflops": "TFLOP/s",
    "floor_percent": "% of floor",
    "peak_mb": "peak MB",
    "times_eager": "x eager",
}


def prepare(
    provider: str, problem: Problem, judge: Judge, direction: str
) -> tuple[Callable[[], object], str | None]:
    """(the function that is timed, what is wrong with what it gives for the judge's clips or None).

    For the backward, its forward has run by then.
    """
    trains, judged = direction != "forward", slice(len(judge.upstream))
    problem = problem.leaves() if trains else problem
    forward, leaves = MAKERS[provider](problem, trains), problem.tensors
    if isinstance(forward, Torchvision):
        forward.isolate()
        leaves = forward.leaves
    if not trains:
        function = torch.no_grad()(forward)
        return function, judge.agrees({"the output": function()[judged]})
    # Random, as zeros or ones would hide what they multiply.
    upstream = torch.randn_like(problem.qkv[..., : problem.qkv.shape[-1] // 3])
    upstream[judged] = judge.upstream
    out, keep = forward(), direction == "backward"
    results = {"the output": out.detach()[judged]}
    grads = differentiate(out, leaves, upstream, keep=keep)
    if leaves[0] is problem.qkv:
        results["the gradient of qkv"] = grads[0][judged]
    wrong = judge.agrees(results)
    if keep:
        return lambda: differentiate(out, leaves, upstream, keep=True), wrong
    return lambda: differentiate(forward(), leaves, upstream), wrong


def attempt(
    provider: str, problem: Problem, judge: Judge, direction: str, excused: Collection[str] = ()
) -> tuple:
    """(the function to be timed, or None, and the items of its row that are known by then)."""
    with_gradients = direction != "forward"

    def make() -> tuple:
        if provider in excused:
            said = f"takes minutes to compile; --providers {provider} asks for it"
            return None, {"reason": said, "excused": True}
        reason = refusal(provider, problem, with_gradients)
        if reason is not None:
            return None, {"reason": reason}
        wrong, off = judge.check(provider, with_gradients)
        function = None
        if wrong is None:
            # Once more at the size that is timed, at which others are compiled.
            function, wrong = prepare(provider, problem, judge, direction)
        return (
            (function, {"error": off}) if wrong is None else (None, {"wrong": wrong, "error": off})
        )

    return harness.attempt(make, problem.qkv.device)


def compare(
    setting: Setting,
    direction: str,
    providers: Sequence[str],
    problem: Problem,
    judge: Judge,
    ceilings: Callable[[], floors.Ceilings],
    excused: Collection[str] = (),
) -> Iterator[dict]:
    """The rows of a setting and direction, one for each provider, all measured together."""
    device, preset = problem.qkv.device, PRESETS[setting.preset]
    attempts = {}
    for provider in providers:
        found = attempt(provider, problem, judge, direction, excused)
        attempts[provider] = function, items = found
        if isinstance(items.get("fault"), torch.AcceleratorError):
            # Nothing after it can run on this device in this process.
            yield {**setting.key, "direction": direction, "provider": provider, **items}
            raise items["fault"]
    timings = harness.time_all(attempts, device, seconds=preset.seconds, least=preset.least)
    clocks_after = clocks(device)
    itemsize = problem.qkv.element_size()
    works = [
        floors.attention(setting.stage, setting.batch, part, itemsize)
        for part in direction.split("+")
    ]
    for provider, (function, items) in attempts.items():
        row = {**setting.key, "direction": direction, "provider": provider, **items}
        if function:
            ms = timings[provider].median
            row |= {**timings[provider].items, **floors.items(works, ceilings(), ms)}
            row.update(
                tflops=sum(work.flops for work in works) / ms / 1e9,
                peak_mb=peak_memory(function, device) / 1e6,
                times_eager=timings["eager"].median / ms if "eager" in timings else None,
                clocks_after=clocks_after,
            )
        yield row


def found_in(rows: Rows, key: dict, provider: str, options: argparse.Namespace) -> dict | None:
    """The row of a provider; none is one that says how to ask, once it is asked."""
    row = rows.find({**key, "provider": provider})
    return None if row and row.get("excused") and provider not in options.excused else row


def run(options: argparse.Namespace, rows: Rows) -> int:
    """Appends every row that is not there yet; the exit status.

    What is left when the minutes are over is counted in settings and directions.
    """
    began, bad, left = time.monotonic(), 0, 0
    device, preset = torch.device(options.device), PRESETS[options.preset]
    seconds = min(preset.seconds, 0.6)
    ceilings = floors.CeilingsOf(rows, device, options.dtype, options.preset, seconds)
    for setting in settings(options):
        problem = judge = None
        for direction in options.direction:
            key = {**setting.key, "direction": direction}
            found = [found_in(rows, key, each, options) for each in options.providers]
            if all(found):
                bad += sum("wrong" in row for row in found)
                continue
            if options.minutes is not None and time.monotonic() - began > 60 * options.minutes:
                left += 1
                continue
            # Else what is compiled for many settings counts as compiled too often.
            torch._dynamo.reset()
            # A backward that reuses what its forward saved cannot be timed alone, again and again.
            config.donated_buffer = direction != "backward"
            if problem is None:
                problem = setting.problem(device)
                judge = Judge(problem.first_clips())
            # All of them again where one is missing: they are comparable only within one run.
            shared = (options.providers, problem, judge, ceilings, options.excused)
            for row in compare(setting, direction, *shared):
                row.pop("fault", None)
                bad += "wrong" in row or "failed" in row
                rows.append(row)
            place = f"{setting.model} stage {setting.number}, {'shifted, ' * setting.shifted}"
            print(f"{place}{direction}: done", file=sys.stderr, flush=True)
    if left:
        said = f"{left} settings are left after {options.minutes} minutes; the same command, with\n"
        print(f"{said}the same --json FILE, continues", file=sys.stderr)
    if bad:
        print(f"{bad} rows are wrong or failed", file=sys.stderr)
    return int(bad > 0)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the bench and prints its table; the exit status."""
    options = parse(arguments, __doc__.partition("\n")[0])
    rows, status = allocators.conduct(__file__, arguments, options, partial(run, options))
    print("  ".join(f"{name} {item}" for name, item in rows.header.items() if item is not None))
    example = torch.empty(0, dtype=DTYPES[options.dtype], device=options.device)
    choice = explain(window_attention, example)
    print(f"kernels='auto' is {choice.kernels} here: {choice.reason}")
    columns = allocators.with_state(COLUMNS, options)
    print(rows.table(columns, {"bench": "attention", "preset": options.preset}))
    return status


if __name__ == "__main__":
    sys.exit(main())
