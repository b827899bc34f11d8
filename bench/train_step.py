"""One training step: forward, loss, backward, AdamW; clips a second and memory.

`python bench/train_step.py [--device cpu] [--json FILE]`. Fresh weights, the same for all, nothing
dropped; bfloat16 autocast and fused AdamW on a GPU, float32 on a CPU unless `--precision` says
more. A provider's gradients of one clip are compared with float64 before it is timed.
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

from bench.model_options import MODES, compare, conduct, parse
from bench.model_providers import PRESETS, Judge, build, mixed, random_clips


def groups(options: argparse.Namespace) -> list[dict]:
    """What is measured together."""
    preset = PRESETS[options.preset]
    batch = options.batch or preset.batch
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
    ]


def measured(group: dict, options: argparse.Namespace) -> list[dict]:
    """The rows of a group."""
    device, precision = torch.device(options.device), group["precision"]
    clips, labels = random_clips(group["batch"], group["clip"], device)
    reference = build(group["model"], "reference", device).train()
    judge = Judge(reference, clips, labels, precision)
    torch._dynamo.reset()

    def make(provider: str) -> tuple[Callable | None, dict]:
        model = build(group["model"], provider, device).train()
        items = judge.check(model)
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
            with mixed(device, precision):
                loss = F.cross_entropy(called(clips), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return loss.detach()

        return step, items

    return compare({"batch": group["batch"]}, make, options.providers, device)


def main(words: Sequence[str] | None = None) -> int:
    options = parse(__doc__.partition("\n")[0], words, MODES[:1])
    return conduct("step", __file__, words, options, groups(options), measured)


if __name__ == "__main__":
    sys.exit(main())
