"""The loop of the benches of whole models: providers, minutes, rows."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch

from bench.harness import Rows, Timing, clocks, measure, peak_memory
from bench.model_providers import PRESETS, PROVIDERS, AbsentError
from bench.rows import cell
from model.variants import VARIANTS
from videoswin_kernels.selection import UnavailableError

COLUMNS = {
    "model": "model",
    "mode": "mode",
    "batch": "clips",
    "provider": "provider",
    "precision": "precision",
    "ms": "median ms",
    "spread": "20-80 %",
    "clips_per_s": "clips/s",
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
    parser.add_argument("--modes", nargs="+", choices=("eager", "compiled"))
    parser.add_argument("--batch", type=int, help="clips at a time; default: that of the preset")
    parser.add_argument("--json", metavar="FILE", help="rows are added; continues")
    parser.add_argument("--minutes", type=float, help="begin nothing new after this time")
    return parser


def compare(key: dict, make: Callable, providers: Iterable[str], device: torch.device) -> list:
    """A row for each provider, timed in turn; `make(provider)` is (function, items of its row)."""
    found, functions = {}, {}
    for provider in providers:
        try:
            function, found[provider] = make(provider)
            if function:
                function()
                functions[provider] = function
        except (UnavailableError, AbsentError) as refusal:
            found[provider] = {"reason": str(refusal)}
        except torch.OutOfMemoryError:
            found[provider] = {"reason": "out of memory"}
            torch.cuda.empty_cache()
        except torch.AcceleratorError:
            # Nothing after it can run on this device in this process.
            raise
        except Exception as fault:  # The others shall be measured.
            said = (str(fault).strip().splitlines() or [""])[0]
            found[provider] = {"failed": f"{type(fault).__name__}: {said}"}
    timings = measure(functions, device, seconds=4.0 if device.type == "cuda" else 0.5, least=3)
    after, rows = clocks(device), []
    latencies = latency(functions, device) if key["batch"] == 1 else {}
    for provider, items in found.items():
        row = {**key, "provider": provider, **items}
        if provider in timings:
            ms, low, high, count = timings[provider]
            peak = peak_memory(functions[provider], device)
            row |= {"ms": ms, "low": low, "high": high, "count": count, "clocks_after": after}
            row |= {"spread": f"{cell(low)}-{cell(high)}", "clips_per_s": key["batch"] / ms * 1e3}
            row["peak_mb"] = None if peak is None else peak / 1e6
            row["latency_ms"] = latencies[provider].median if latencies else None
            if "reference" in timings:
                row["times_reference"] = timings["reference"].median / ms
        rows.append(row)
    return rows


def latency(functions: Mapping[str, Callable], device: torch.device) -> dict[str, Timing]:
    """How long a user waits for each, the launching of its kernels included."""

    def waited(function: Callable) -> Callable:
        def call() -> None:
            function()
            if device.type == "cuda":
                torch.cuda.synchronize(device)

        return call

    # By the clock of the host, as on a CPU.
    together = {name: waited(function) for name, function in functions.items()}
    return measure(together, "cpu", seconds=2.0 if device.type == "cuda" else 0.5, least=3)


def run(
    bench: str,
    groups: Sequence[dict],
    measured: Callable[[dict], list[dict]],
    rows: Rows,
    options: argparse.Namespace,
) -> int:
    """Appends the rows of each group that has not all of them; prints the table; exit status."""
    began, bad, left = time.monotonic(), 0, 0
    for group in groups:
        key = {"bench": bench, **group}
        if all(rows.has({**key, "provider": each}) for each in options.providers):
            continue
        if options.minutes is not None and time.monotonic() - began > 60 * options.minutes:
            left += 1
            continue
        for row in measured(group):
            rows.append({**key, **row})
            bad += "failed" in row or "wrong" in row
        print(*group.values(), file=sys.stderr, flush=True)
        if options.device == "cuda":
            torch.cuda.empty_cache()
    print(rows.table(COLUMNS, {"bench": bench}))
    if left:
        print(f"{left} groups are left after {options.minutes} minutes")
    return int(bad > 0)
