"""The loop of the benches of whole models: providers, minutes, rows."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

import torch

from bench import allocators, floors
from bench.harness import (
    Rows,
    Timing,
    attempt,
    clocks,
    is_out_of_memory,
    measure,
    peak_memory,
    time_all,
)
from bench.model_providers import PRECISIONS, PRESETS, PROVIDERS
from model.variants import VARIANTS

MODES = ("eager", "compiled")
COLUMNS = {
    "model": "model",
    "mode": "mode",
    "precision": "precision",
    "frames": "frames",
    "size": "size",
    "batch": "clips",
    "provider": "provider",
    "ms": "median ms",
    "spread": "20-80 %",
    "noise_percent": "+- %",
    "clips_per_s": "clips/s",
    "floor_percent": "% of floor",
    "latency_ms": "latency ms",
    "peak_mb": "peak MB",
    "times_reference": "x reference",
}


def parser_of(description: str) -> argparse.ArgumentParser:
    """The options that the benches of whole models share."""
    parser = argparse.ArgumentParser(description=description)
    found = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=found)
    parser.add_argument("--preset", choices=PRESETS, help="default: full on a GPU, small on a CPU")
    parser.add_argument("--models", nargs="+", choices=VARIANTS, help="default: the preset's")
    parser.add_argument("--providers", nargs="+", choices=PROVIDERS, default=PROVIDERS)
    parser.add_argument("--modes", nargs="+", choices=MODES, help="on a CPU default: eager")
    help = "bfloat16 is autocast to it; default: bfloat16 on a GPU, float32 on a CPU"
    parser.add_argument("--precision", choices=PRECISIONS, help=help)
    parser.add_argument("--batch", type=int, help="clips at a time; default: that of the preset")
    parser.add_argument("--json", metavar="FILE", help="rows are added; continues")
    parser.add_argument("--minutes", type=float, help="begin nothing new after this time")
    allocators.add_option(parser)
    return parser


def parse(
    parser: argparse.ArgumentParser, words: Sequence[str] | None, modes: Sequence[str]
) -> argparse.Namespace:
    """The options, with their defaults; `modes` are a GPU's unless it is told."""
    options = parser.parse_args(words)
    is_cuda = options.device == "cuda"
    options.preset = options.preset or ("full" if is_cuda else "small")
    options.precision = options.precision or ("bfloat16" if is_cuda else "float32")
    options.modes = options.modes or (modes if is_cuda else MODES[:1])
    if options.batch is not None and options.batch < 1:
        parser.error(f"--batch must be at least 1, got {options.batch}")
    allocators.settle(parser, options)
    return options


def groups_of(
    options: argparse.Namespace, shapes: Iterable[tuple[tuple[int, ...], int]]
) -> list[dict]:
    """What is measured together: one for each mode, model, and (clip, clips at a time)."""
    shapes, preset = list(shapes), PRESETS[options.preset]
    return [
        {
            "preset": options.preset,
            "model": model,
            "mode": mode,
            "precision": options.precision,
            "batch": batch,
            "clip": clip,
            "frames": clip[1],
            "size": clip[2],
        }
        for mode in options.modes
        for model in options.models or preset.models
        for clip, batch in shapes
    ]


def compare(key: dict, make: Callable, providers: Iterable[str], device: torch.device) -> list:
    """A row for each provider, timed in turn; `make(provider)` is (function, items of its row)."""
    found = {}
    for provider in providers:
        _, items = found[provider] = attempt(partial(make, provider), device)
        if isinstance(fault := items.pop("fault", None), torch.AcceleratorError):
            # Nothing after it can run on this device in this process.
            raise fault
    timings = time_all(found, device, seconds=4.0 if device.type == "cuda" else 0.5)
    after, rows = clocks(device), []
    is_waited_for = key["batch"] == 1
    functions = {provider: function for provider, (function, _) in found.items() if function}
    latencies = latency(functions, device) if is_waited_for and device.type == "cuda" else timings
    for provider, (function, items) in found.items():
        row = {**key, "provider": provider, **items}
        if function:
            ms = timings[provider].median
            row |= {**timings[provider].items, "clips_per_s": key["batch"] / ms * 1e3}
            row["peak_mb"] = peak_memory(function, device) / 1e6
            row["latency_ms"] = latencies[provider].median if is_waited_for else None
            row["clocks_after"] = after
            if "reference" in timings:
                row["times_reference"] = timings["reference"].median / ms
        rows.append(row)
    return rows


def latency(functions: Mapping[str, Callable], device: torch.device) -> dict[str, Timing]:
    """How long a user of a GPU waits for each, the launching of its kernels included."""

    def waited(function: Callable) -> Callable:
        def call() -> None:
            function()
            torch.cuda.synchronize(device)

        return call

    # By the clock of the host, as on a CPU.
    together = {name: waited(function) for name, function in functions.items()}
    return measure(together, "cpu", seconds=2.0)


def conduct(
    bench: str,
    script: str,
    words: Sequence[str] | None,
    options: argparse.Namespace,
    groups: Sequence[dict],
    measured: Callable[[dict, argparse.Namespace], list[dict]],
    columns: Mapping[str, str] = COLUMNS,
) -> int:
    """Measures the groups, in each state of the allocator, and prints the table; exit status."""

    def fill(rows: Rows) -> int:
        device = torch.device(options.device)
        ceilings = floors.CeilingsOf(rows, device, options.precision, options.preset, 0.6)

        def with_floors(group: dict) -> list[dict]:
            found = measured(group, options)
            for row in found:
                if "ms" in row:
                    works = work_of(group, training=bench == "step")
                    row |= floors.items(works, ceilings(), row["ms"])
            return found

        return run(bench, groups, with_floors, rows, options)

    rows, status = allocators.conduct(script, words, options, fill)
    print(rows.table(allocators.with_state(columns, options), {"bench": bench}))
    return status


def work_of(group: dict, training: bool) -> list[floors.Work]:
    """The least work of a group's blocks."""
    is_mixed = group["precision"] != "float32"
    works = floors.model(
        group["model"],
        group["batch"],
        clip=group["clip"],
        training=training,
        itemsize=2 if is_mixed else 4,
        stream="autocast" if is_mixed else "same",
    )
    return works * group.get("accumulate", 1)


def run(
    bench: str,
    groups: Sequence[dict],
    measured: Callable[[dict], list[dict]],
    rows: Rows,
    options: argparse.Namespace,
) -> int:
    """Appends the rows of each group that has not all of them; exit status."""
    began, bad, left = time.monotonic(), 0, 0
    for group in groups:
        key = {"bench": bench, **group}
        found = [rows.find({**key, "provider": each}) for each in options.providers]
        if all(found):
            bad += sum("wrong" in row for row in found)
            continue
        if options.minutes is not None and time.monotonic() - began > 60 * options.minutes:
            left += 1
            continue
        try:
            found = measured(group)
        except RuntimeError as fault:
            if not is_out_of_memory(fault):
                raise
            said = "out of memory before anyone was timed"
            found = [{"provider": each, "reason": said} for each in options.providers]
        for row in found:
            rows.append({**key, **row})
            bad += "failed" in row or "wrong" in row
        print(*group.values(), file=sys.stderr, flush=True)
        if options.device == "cuda":
            torch.cuda.empty_cache()
    if left:
        print(f"{left} groups are left after {options.minutes} minutes", file=sys.stderr)
    return int(bad > 0)
