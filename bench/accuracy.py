"""How far outputs and gradients are from float64, ours beside eager PyTorch, as a page.

`python bench/accuracy.py` writes docs/accuracy.md. Without a GPU, TRITON_INTERPRET=1 has Triton's
kernels interpreted, in float32 and float16: the interpreter gets bfloat16 wrong, so they refuse it.
Those in CUDA C++ are emulated, where they are built, in all three.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])
# For the naive composition, which is exact in float64.
sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))

import plain
import torch
from torch import Tensor

from bench.harness import error, header
from videoswin_kernels import patch_merging, residual_norm, window_attention
from videoswin_kernels.selection import UnavailableError
from videoswin_kernels.testing import LARGE, Case

ROOT = Path(__file__).resolve().parents[1]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
KERNELS = ("triton", "cuda", "cpu")
# How kernels for a GPU run on a CPU.
ON_A_CPU = {"triton": "Triton's kernels interpreted", "cuda": "CUDA C++ kernels emulated"}
PAGE = """# Accuracy

Relative error ||result - exact|| / ||exact|| of outputs and gradients. Exact is Video Swin's own
arithmetic in float64, from the same inputs and the same gradients of the outputs, all normal.
*eager* is that arithmetic in plain PyTorch: in float32, or under autocast with float32 parameters,
a float32 residual stream and `qkv` as a Linear under autocast leaves it. Attention is in windows of
{tokens} tokens, shifted and padded. What only moves tokens is exact: tests compare it bit for bit.

Written by `python bench/accuracy.py` at commit {commit}, on {card}{stand_ins};
torch {torch}, Triton {triton}.

{table}
{reasons}"""


class Problem(NamedTuple):
    """One operator on one set of inputs.

    Attributes:
        operator: its name.
        inputs: what gradients are of, by name.
        outputs: names of the results.
        ours: the operator, given the word for its kernels and then the inputs.
        eager: the same in plain PyTorch, from the inputs; exact where they are float64.
    """

    operator: str
    inputs: dict[str, Tensor]
    outputs: tuple[str, ...]
    ours: Callable[..., Tensor | tuple[Tensor, ...]]
    eager: Callable[..., Tensor | tuple[Tensor, ...]]


def problems(dtype: torch.dtype, device: str, case: Case, heads: int) -> Iterator[Problem]:
    """Each operator with arithmetic, as it stands in a model trained in `dtype`."""
    draw = torch.Generator().manual_seed(0)

    def random(*shape: int, dtype: torch.dtype = torch.float32, mean: float = 0.0) -> Tensor:
        values = torch.randn(*shape, generator=draw) + mean
        return values.to(device, dtype).requires_grad_()

    grid, window, shift = case
    channels, rows = 32 * heads, (2 * window[0] - 1) * (2 * window[1] - 1) * (2 * window[2] - 1)
    where = {"window": window, "shift": shift, "num_heads": heads}
    # Tokens have the bias of their Linear as their mean, and pads are nothing else.
    pad = random(3 * channels, dtype=dtype)
    qkv = random(1, *grid, 3 * channels).detach() + pad.detach()
    yield Problem(
        "window_attention",
        {"qkv": qkv.to(dtype).requires_grad_(), "table": random(rows, heads), "pad": pad},
        ("out",),
        lambda kernels, qkv, table, pad: window_attention(
            qkv, table, pad_qkv=pad, kernels=kernels, **where
        ),
        lambda qkv, table, pad: plain.attention(qkv, table, pad_qkv=pad, **where),
    )
    yield Problem(
        "patch_merging",
        {
            "x": random(2, *grid, channels),
            "weight": random(4 * channels, mean=1.0),
            "bias": random(4 * channels),
        },
        ("out",),
        lambda kernels, *inputs: patch_merging(*inputs, kernels=kernels),
        plain.merging,
    )
    yield Problem(
        "residual_norm",
        {
            "x": random(2, *grid, channels),
            "branch": random(2, *grid, channels, dtype=dtype),
            "weight": random(channels, mean=1.0),
            "bias": random(channels),
        },
        ("sum", "norm"),
        lambda kernels, *inputs: residual_norm(*inputs, kernels=kernels),
        plain.residual_norm,
    )


def results(
    problem: Problem, outputs: Tensor | tuple[Tensor, ...], inputs: list[Tensor], dtype: torch.dtype
) -> dict[str, Tensor]:
    """Outputs and gradients by name, the packed ones of attention taken apart."""
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    if inputs[0].dtype != torch.float64:
        # What a Linear under autocast, which is next, makes of a norm that came out wider.
        outputs = (*outputs[:-1], outputs[-1].to(dtype))
    draw = torch.Generator().manual_seed(1)
    # Exact in the dtype, so that the exact gradients begin from the same.
    ups = [torch.randn(o.shape, generator=draw).to(dtype).to(o) for o in outputs]
    grads = torch.autograd.grad(outputs, inputs, ups)
    named = dict(zip(problem.outputs, outputs, strict=True))
    for name, grad in zip(problem.inputs, grads, strict=True):
        if name in ("qkv", "pad"):
            parts = dict(zip("qkv", grad.chunk(3, -1), strict=True))
            suffix = "" if name == "qkv" else " of pads"
            named |= {f"gradient of {part}{suffix}": x for part, x in parts.items()}
        else:
            named[f"gradient of {name}"] = grad
    # No query is padded, so its gradient is zero: there is no relative error of it.
    named.pop("gradient of q of pads", None)
    return {name: value.detach() for name, value in named.items()}


def measured(device: str, case: Case, heads: int) -> tuple[list[dict], dict[str, str]]:
    """(rows, why some have no figures): an error for each result, dtype and implementation."""
    rows, reasons = [], {}
    for dtype in DTYPES:
        autocast = torch.autocast(device, dtype, enabled=dtype != torch.float32)
        for problem in problems(dtype, device, case, heads):
            inputs = list(problem.inputs.values())
            wide = [value.detach().double().requires_grad_() for value in inputs]
            exact = results(problem, problem.eager(*wide), wide, dtype)
            found = {}
            with autocast:
                found["eager"] = results(problem, problem.eager(*inputs), inputs, dtype)
                for kernels in KERNELS:
                    try:
                        ours = problem.ours(kernels, *inputs)
                    except UnavailableError as refusal:
                        reasons.setdefault(kernels, str(refusal))
                        continue
                    found[kernels] = results(problem, ours, inputs, dtype)
            name = str(dtype).removeprefix("torch.")
            for part, value in exact.items():
                errors = {who: error(got[part], value) for who, got in found.items()}
                rows.append({"operator": problem.operator, "dtype": name, "of": part, **errors})
    return rows, reasons


def page(rows: list[dict], reasons: dict[str, str], facts: dict, tokens: int) -> str:
    """The page, in Markdown."""
    present = ["eager", *(k for k in KERNELS if any(k in row for row in rows))]
    lines = ["| operator | dtype | of | " + " | ".join(present) + " |"]
    lines.append("|---" * (3 + len(present)) + "|")
    for row in rows:
        cells = [f"{row[who]:.1e}" if who in row else "-" for who in present]
        lines.append("| " + " | ".join([row["operator"], row["dtype"], row["of"], *cells]) + " |")
    missing = [f"{why}." for kernels, why in reasons.items() if kernels in present]
    how = [ON_A_CPU[k] for k in present if k in ON_A_CPU and facts["device"] == "cpu"]
    return PAGE.format(
        tokens=tokens,
        table="\n".join(lines),
        reasons="".join(f"\n- {sentence}" for sentence in missing) + "\n" * bool(missing),
        stand_ins=f",\n{', '.join(how)}" if how else "",
        **facts,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "accuracy.md")
    parser.add_argument("--tiny", action="store_true", help="on a small grid, to try the script")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    case = Case((3, 5, 4), (2, 3, 3), (1, 1, 1)) if options.tiny else LARGE["8x7x7, padded"]
    rows, reasons = measured(device, case, 1 if options.tiny else 2)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    facts = header(torch.device(device))
    options.output.write_text(page(rows, reasons, facts, case.tokens), encoding="utf-8")
    print(f"{len(rows)} rows in {options.output}")


if __name__ == "__main__":
    main()
