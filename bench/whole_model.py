"""Whole models, forward: clips a second, latency of one clip, memory; eager and compiled.

`python bench/whole_model.py [--device cpu] [--json FILE]`. Fresh weights, the same for all;
bfloat16 autocast on a GPU, float32 on a CPU unless `--precision` says more. A provider is compared
with float64 on one clip before it is timed. A time is that of the device; the latency of one clip
is what a user waits, launches included. `--sweep frames`, `size` or `batch` shows how cost grows;
`--largest` finds how many clips fit the memory of a GPU.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from bench.harness import attempt, largest
from bench.model_options import COLUMNS, MODES, compare, conduct, groups_of, parse, parser_of
from bench.model_providers import PRESETS, Judge, build, compiled, mixed, random_clips

# The columns of --largest.
MOST = {
    name: COLUMNS[name] for name in ("model", "mode", "precision", "frames", "size", "provider")
}
MOST |= {"most_clips": "most clips"}


def shapes(options: argparse.Namespace) -> list[tuple[tuple[int, ...], int]]:
    """(clip, clips at a time) of the sweep or, without one, of the preset and of one clip."""
    preset = PRESETS[options.preset]
    batch = options.batch or preset.batch
    channels, frames, height, width = preset.clip
    if options.sweep == "frames":
        return [((channels, n, height, width), batch) for n in (frames // 2, frames, 2 * frames)]
    if options.sweep == "size":
        sizes = (height // 2, height, 3 * height // 2)
        return [((channels, frames, size, size), batch) for size in sizes]
    batches = {1, 2, 4, batch, 2 * batch, 4 * batch} if options.sweep == "batch" else {batch, 1}
    return [(preset.clip, each) for each in sorted(batches, reverse=not options.sweep)]


def measured(group: dict, options: argparse.Namespace) -> list[dict]:
    """The rows of a group."""
    device, precision = torch.device(options.device), group["precision"]
    clips, labels = random_clips(group["batch"], group["clip"], device)
    reference = build(group["model"], "reference", device).eval()
    judge = Judge(reference, clips, None, precision)
    # Else the graphs of many models count as those of one that is compiled too often.
    torch._dynamo.reset()

    def make(provider: str) -> tuple[Callable | None, dict]:
        model = build(group["model"], provider, device).eval()
        items = judge.check(model)
        if "wrong" in items:
            return None, items
        called = model
        if group["mode"] == "compiled":
            called, more = compiled(model, provider, judge, clips, labels)
            items |= more
            if "wrong" in items:
                return None, items

        def forward() -> torch.Tensor:
            with torch.inference_mode(), mixed(device, precision):
                return called(clips)

        return forward, items

    return compare({"batch": group["batch"]}, make, options.providers, device)


def most_clips(group: dict, options: argparse.Namespace) -> list[dict]:
    """How many clips each provider takes at once, without the time that they take."""
    device = torch.device(options.device)
    if device.type != "cuda":
        reason = "a CPU has no memory of its own that clips could fill"
        return [{"provider": each, "reason": reason} for each in options.providers]
    rows = []
    for provider in options.providers:

        def make(provider: str = provider) -> tuple[None, dict]:
            model = build(group["model"], provider, device).eval()

            def forward(batch: int) -> None:
                with torch.inference_mode(), mixed(device, group["precision"]):
                    model(random_clips(batch, group["clip"], device)[0])

            return None, {"most_clips": largest(forward)}

        _, items = attempt(make, device)
        if isinstance(fault := items.pop("fault", None), torch.AcceleratorError):
            raise fault
        rows.append({"provider": provider, **items})
        torch.cuda.empty_cache()
    return rows


def parse_words(words: Sequence[str] | None) -> argparse.Namespace:
    """The options of this bench."""
    parser = parser_of(__doc__.partition("\n")[0])
    parser.add_argument("--sweep", choices=("frames", "size", "batch"), help="what grows")
    parser.add_argument("--largest", action="store_true", help="how many clips fit, instead")
    return parse(parser, words, MODES)


def main(words: Sequence[str] | None = None) -> int:
    options = parse_words(words)
    if options.largest:
        # A batch is what is found; each that is tried would be compiled.
        options.modes = MODES[:1]
        groups = groups_of(options, [(PRESETS[options.preset].clip, None)])
        return conduct("most clips", __file__, words, options, groups, most_clips, MOST)
    groups = groups_of(options, shapes(options))
    return conduct("model", __file__, words, options, groups, measured)


if __name__ == "__main__":
    sys.exit(main())
