"""Variants of the Triton attention, timed in turn, each beside what was predicted for it.

`python bench/tune.py FILE [--json ROWS]`. FILE has a variant a line, as JSON:

    {"name": "8 warps", "predicted": 0.21, "stage": 1, "direction": "forward", "shifted": false,
     "set": {"attention.configuration": {"num_warps": 8, "block_queries": 128}}}

`set` names functions of `videoswin_kernels.triton` and replaces items of what they return;
`predicted` is in milliseconds. `dtype`, `batch` and `window` ("16,7,7") are those of
bench/attention.py and may be left out, as may `shifted` (false). Variants of the same place are
timed together, with the kernels as they are, and each only if its results are right.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from bench import attention, floors
from bench.attention_options import DIRECTIONS, PRESETS, Setting, parse, settings
from bench.attention_providers import MAKERS, Judge
from bench.harness import Rows, clocks, header, measure

COLUMNS = {
    "place": "place",
    "variant": "variant",
    "predicted": "predicted ms",
    "ms": "median ms",
    "spread": "20-80 %",
    "times_as_is": "x as it is",
    "floor_percent": "% of floor",
}
AS_IT_IS = "as it is"
NEEDED = {"name", "predicted", "set", "stage", "direction"}
KNOWN = NEEDED | {"shifted", "dtype", "batch", "window"}


class VariantError(ValueError):
    """A file of variants that cannot be used: one sentence."""


def read(path: Path) -> list[dict]:
    """The variants of a file; VariantError names the line that is none."""
    variants = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            variant = check(json.loads(line))
        except (VariantError, ValueError, ImportError) as error:
            raise VariantError(f"{path}: line {number}: {error}") from None
        known = [(other["name"], place_of(other)) for other in variants]
        if (variant["name"], place_of(variant)) in known or variant["name"] == AS_IT_IS:
            raise VariantError(f"{path}: line {number}: there are two of {variant['name']!r}")
        variants.append(variant)
    if not variants:
        raise VariantError(f"{path}: no variants")
    return variants


def place_of(variant: dict) -> str:
    """Where it is measured: variants of one place are compared."""
    words = [f"stage {variant['stage']}", variant["direction"]]
    words += ["shifted"] if variant.get("shifted") else []
    words += [f"{name} {variant[name]}" for name in ("dtype", "batch", "window") if name in variant]
    return ", ".join(words)


def check(variant: object) -> dict:
    """The variant, if it has what it needs and nothing unknown."""
    if not isinstance(variant, dict):
        raise VariantError("a variant is a JSON object")
    missing, unknown = NEEDED - set(variant), set(variant) - KNOWN
    if missing or unknown:
        raise VariantError(f"missing {sorted(missing)}, unknown {sorted(unknown)}")
    if variant["stage"] not in (1, 2, 3, 4):
        raise VariantError(f"stage must be 1 to 4, got {variant['stage']}")
    if variant["direction"] not in DIRECTIONS:
        raise VariantError(f"direction must be one of {', '.join(DIRECTIONS)}")
    for function, items in variant["set"].items():
        module, name = locate(function)
        fields = getattr(getattr(module, "Configuration", None), "_fields", ())
        if not callable(getattr(module, name, None)) or not set(items) <= set(fields):
            raise VariantError(f"{function} has no {sorted(set(items) - set(fields))}")
    return variant


def locate(function: str) -> tuple:
    """(module, name) of "attention.configuration"."""
    module, _, name = function.rpartition(".")
    return import_module(f"videoswin_kernels.triton.{module}"), name


class Kernels:
    """The kernels' configurations, changed from one variant to the next."""

    def __init__(self, variants: Sequence[dict]) -> None:
        names = {function for variant in variants for function in variant["set"]}
        self.original = {name: getattr(*locate(name)) for name in names}

    def become(self, changes: dict[str, dict]) -> None:
        """From now on a launch is configured with these changes."""
        for function, original in self.original.items():
            items = changes.get(function, {})
            setattr(*locate(function), with_items(original, items) if items else original)


def with_items(original: Callable, items: dict) -> Callable:
    """A configuration function with some items of its result replaced."""
    return lambda *arguments: original(*arguments)._replace(**items)


def setting_of(variant: dict, options: argparse.Namespace) -> Setting:
    """Where a variant is measured, through the options of bench/attention.py."""
    words = ["--device", options.device, "--stage", str(variant["stage"])]
    words += ["--shifted", "yes" if variant.get("shifted") else "no"]
    for name in ("dtype", "batch", "window"):
        words += [f"--{name}", str(variant[name])] if name in variant else []
    words += ["--preset", options.preset] if options.preset else []
    found = list(settings(parse(words)))
    if not found:
        raise VariantError(f"{variant['name']}: there is no shift at stage {variant['stage']}")
    return found[0]


def compare(
    variants: Sequence[dict], kernels: Kernels, rows: Rows, options: argparse.Namespace
) -> Iterator[dict]:
    """A row for each variant of one place, and one for the kernels as they are."""
    first, device = variants[0], torch.device(options.device)
    setting, direction = setting_of(first, options), first["direction"]
    problem = setting.problem(device)
    judge = Judge(problem.first_clips())
    ceilings = floors.CeilingsOf(rows, device, setting.dtype, setting.preset, 0.6)
    as_it_is = {"name": AS_IT_IS, "set": {}, "predicted": None}
    found, functions = {}, {}
    for variant in (as_it_is, *variants):
        kernels.become(variant["set"])
        # Under a name of its own: the judge remembers whom it has checked.
        provider = f"tune: {variant['name']}"
        MAKERS[provider] = MAKERS["triton"]
        function, items = attention.attempt(provider, problem, judge, direction)
        if isinstance(items.pop("fault", None), torch.AcceleratorError):
            raise RuntimeError(f"{variant['name']}: {items['failed']}")
        if "failed" in items:
            # Tiles that no card has room for are a result, too.
            items = {"reason": f"cannot run: {items['failed']}"}
        found[variant["name"]] = variant, items
        if function:
            functions[variant["name"]] = dressed(kernels, variant, function)
    try:
        timings = measure(functions, device, seconds=2.0 if options.preset != "tiny" else 0.0)
    finally:
        kernels.become({})
    after = clocks(device)
    itemsize = problem.qkv.element_size()
    parts = direction.split("+")
    works = [floors.attention(setting.stage, setting.batch, part, itemsize) for part in parts]
    own = timings.get(AS_IT_IS)
    for name, (variant, items) in found.items():
        row = {"variant": name, "predicted": variant["predicted"], "set": variant["set"], **items}
        if name in timings:
            ms = timings[name].median
            row |= {**timings[name].items, **floors.items(works, ceilings(), ms)}
            row |= {"clocks_after": after, "times_as_is": own.median / ms if own else None}
        yield row


def dressed(kernels: Kernels, variant: dict, function: Callable) -> Callable:
    """The timed function, launched with the variant's configurations."""

    def run() -> object:
        kernels.become(variant["set"])
        return function()

    return run


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    found = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("file", type=Path)
    parser.add_argument("--device", choices=("cpu", "cuda"), default=found)
    parser.add_argument("--preset", choices=PRESETS, help="that of bench/attention.py")
    parser.add_argument("--json", type=Path, metavar="ROWS", help="rows are added; continues")
    parser.add_argument("--minutes", type=float, help="begin no other place after this time")
    options = parser.parse_args(words)
    if options.device == "cpu" and options.preset != "tiny":
        parser.error("interpreted kernels are not timed (--preset tiny runs them all the same)")
    began = time.monotonic()
    try:
        variants = read(options.file)
        places = defaultdict(list)
        for variant in variants:
            places[place_of(variant)].append(variant)
            setting_of(variant, options)
    except (OSError, VariantError) as error:
        parser.error(str(error))
    rows, kernels = Rows(options.json, header(options.device)), Kernels(variants)
    failures = left = 0
    for place, together in places.items():
        key = {"bench": "tune", "place": place}
        wanted = [{**key, "variant": v["name"], "set": v["set"]} for v in together]
        if all(map(rows.has, wanted)):
            continue
        if options.minutes is not None and time.monotonic() - began > 60 * options.minutes:
            left += 1
            continue
        for row in compare(together, kernels, rows, options):
            rows.append({**key, **row})
            failures += "wrong" in row
    print(rows.table(COLUMNS, {"bench": "tune"}))
    if left:
        print(f"{left} places are left after {options.minutes} minutes")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
