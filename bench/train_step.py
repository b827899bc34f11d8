"""One training step: forward, loss, backward, AdamW; clips a second and memory.

`python bench/train_step.py [--device cpu] [--json FILE]`. Fresh weights, the same for all, nothing
dropped; bfloat16 autocast and fused AdamW on a GPU. A provider's gradients of one clip are compared
with float64 before it is timed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch.nn import functional as F

from bench.harness import Rows, header
from bench.model_options import compare, parser_of, run
from bench.model_providers import PRESETS, Judge, build, mixed, precision, random_clips


def groups(options: argparse.Namespace) -> list[dict]:
    """What is measured together."""
    preset = PRESETS[options.preset]
    batch = options.batch or preset.batch
    return [
        {"model": model, "mode": mode, "batch": batch, "clip": preset.clip}
        for mode in options.modes or ("eager",)
        for model in options.models or preset.models
    ]


def measured(group: dict, options: argparse.Namespace) -> list[dict]:
    """The rows of a group."""
    device = torch.device(options.device)
    clips, labels = random_clips(group["batch"], group["clip"], device)
    judge = Judge(build(group["model"], "reference", device).train(), clips, labels)
    torch._dynamo.reset()

    def make(provider: str) -> tuple[Callable | None, dict]:
        model = build(group["model"], provider, device).train()
        items = {"precision": str(precision(device)).removeprefix("torch."), **judge.check(model)}
        if "wrong" in items:
            return None, items
        is_fused = device.type == "cuda"
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=is_fused)
        called = model
        if group["mode"] == "compiled":
            called = torch.compile(model, dynamic=False, fullgraph=provider != "torchvision")
            items |= judge.agree(model, called, clips)
            if "wrong" in items:
                return None, items

        def step() -> torch.Tensor:
            with mixed(device):
                loss = F.cross_entropy(called(clips), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return loss.detach()

        return step, items

    return compare({"batch": group["batch"]}, make, options.providers, device)


def main(words: Sequence[str] | None = None) -> int:
    options = parser_of(__doc__.partition("\n")[0]).parse_args(words)
    options.preset = options.preset or ("full" if options.device == "cuda" else "small")
    rows = Rows(options.json, header(options.device))
    return run("step", groups(options), lambda group: measured(group, options), rows, options)


if __name__ == "__main__":
    sys.exit(main())
