"""Whole models, forward: clips a second, latency of one clip, memory; eager and compiled.

`python bench/whole_model.py [--device cpu] [--json FILE]`. Fresh weights, the same for all;
bfloat16 autocast on a GPU, float32 on a CPU unless `--precision` says more. A provider is compared
with float64 on one clip before it is timed. A time is that of the device; the latency of one clip
is what a user waits, launches included.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from bench.model_options import MODES, compare, conduct, parse
from bench.model_providers import PRESETS, Judge, build, mixed, random_clips


def groups(options: argparse.Namespace) -> list[dict]:
    """What is measured together: quick ones first, since a model takes minutes to compile."""
    preset = PRESETS[options.preset]
    batches = dict.fromkeys((options.batch or preset.batch, 1))
    return [
        {
            "model": model,
            "mode": mode,
            "precision": options.precision,
            "batch": batch,
            "clip": preset.clip,
        }
        for mode in options.modes
        for model in options.models or preset.models
        for batch in batches
    ]


def measured(group: dict, options: argparse.Namespace) -> list[dict]:
    """The rows of a group."""
    device, precision = torch.device(options.device), group["precision"]
    clips, _ = random_clips(group["batch"], group["clip"], device)
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
            # Ours is one graph; torchvision's may be several.
            is_ours = provider != "torchvision"
            called = torch.compile(model, dynamic=False, fullgraph=is_ours)
            items |= judge.agree(model, called, clips)
            if "wrong" in items:
                return None, items

        def forward() -> torch.Tensor:
            with torch.inference_mode(), mixed(device, precision):
                return called(clips)

        return forward, items

    return compare({"batch": group["batch"]}, make, options.providers, device)


def main(words: Sequence[str] | None = None) -> int:
    options = parse(__doc__.partition("\n")[0], words, MODES)
    return conduct("model", __file__, words, options, groups(options), measured)


if __name__ == "__main__":
    sys.exit(main())
