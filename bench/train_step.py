"""One training step: forward, loss, backward, AdamW; clips a second and memory.

`python bench/train_step.py [--device cpu] [--json FILE]`. Fresh weights, the same for all, nothing
dropped; bfloat16 autocast and fused AdamW on a GPU, float32 on a CPU unless `--precision` says
more. A provider's gradients of one clip are compared with float64 before it is timed. With
`--accumulate N` a step has N batches, whose gradients are summed.
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

from bench.model_options import MODES, compare, conduct, groups_of, parse, parser_of
from bench.model_providers import PRESETS, Judge, build, compiled, mixed, random_clips


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
            called, more = compiled(model, provider, judge, clips, labels)
            items |= more
            if "wrong" in items:
                return None, items

        def step() -> torch.Tensor:
            for _ in range(group["accumulate"]):
                with mixed(device, precision):
                    loss = F.cross_entropy(called(clips), labels) / group["accumulate"]
                loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return loss.detach()

        return step, items

    rows = compare({"batch": group["batch"]}, make, options.providers, device)
    for row in rows:
        if "ms" in row:
            row["clips_per_s"] *= group["accumulate"]
    return rows


def main(words: Sequence[str] | None = None) -> int:
    parser = parser_of(__doc__.partition("\n")[0])
    help = "batches whose gradients make a step; default: %(default)s"
    parser.add_argument("--accumulate", type=int, default=1, metavar="N", help=help)
    options = parse(parser, words, MODES[:1])
    if options.accumulate < 1:
        parser.error(f"--accumulate must be at least 1, got {options.accumulate}")
    preset = PRESETS[options.preset]
    groups = groups_of(options, [(preset.clip, options.batch or preset.batch)])
    groups = [{**group, "accumulate": options.accumulate} for group in groups]
    return conduct("step", __file__, words, options, groups, measured)


if __name__ == "__main__":
    sys.exit(main())
