"""One case of every operator, kernel set, dtype and direction, compared with float64.

`python bench/smoke.py [--device cpu]`. On a CPU kernels in Triton are interpreted, for which
TRITON_INTERPRET=1 must be set, and those in CUDA C++ are emulated, where they are built. Exits with
1 where a result is outside its bound, or does not come.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from math import inf
from pathlib import Path
from typing import NamedTuple

# cuBLAS reads this once, when CUDA starts, and deterministic algorithms need it.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import Tensor

import videoswin_kernels
from bench.harness import Rows, header
from videoswin_kernels.selection import (
    MOVEMENT,
    OPERATORS,
    Call,
    UnavailableError,
    check_word,
    reason_against,
)
from videoswin_kernels.testing import ATTENTION, Case

KERNELS = ("triton", "cuda")
DTYPES = {name: getattr(torch, name) for name in ("float32", "float16", "bfloat16")}
COLUMNS = ("operator", "kernels", "dtype", "direction", "output", "error", "bound", "within")
# Several windows, tiles and clips, padded and masked: everything a kernel distinguishes.
SHAPES = {
    "small": (ATTENTION["padded, one axis shifted"], 2, 16),
    "model": (Case((9, 14, 13), (8, 7, 7), (4, 3, 3)), 3, 32),
}
CLIPS = 2


class Question(NamedTuple):
    """A call of an operator: its inputs by name, and the results as a tuple."""

    inputs: dict[str, Tensor]
    call: Callable[..., tuple[Tensor, ...]]
    outputs: tuple[str, ...]


def question(operator: str, shapes: str, dtype: torch.dtype) -> Question:
    """The operator on random values that are exact in the dtype, all requiring a gradient."""
    case, heads, width = SHAPES[shapes]
    channels = heads * width

    def random(*shape: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64).to(kind).requires_grad_()

    x = partial(random, CLIPS, *case.grid)
    function = getattr(videoswin_kernels, operator)
    window = {"window": case.window, "shift": case.shift}
    if operator == "cyclic_shift":
        return Question({"x": x(channels)}, partial(_one, function, shift=case.shift), ("out",))
    if operator == "window_partition":
        return Question({"x": x(channels)}, partial(_one, function, **window), ("windows",))
    if operator == "window_reverse":
        windows = random(CLIPS * case.windows, case.tokens, channels)
        call = partial(_one, function, grid=case.grid, **window)
        return Question({"windows": windows}, call, ("out",))
    # Tables and weights are float32 with any dtype, as in mixed precision.
    wide = partial(random, kind=torch.float32)
    if operator == "window_attention":
        rows = (2 * case.window[0] - 1) * (2 * case.window[1] - 1) * (2 * case.window[2] - 1)
        inputs = {"qkv": x(3 * channels), "table": wide(rows, heads), "pad": random(3 * channels)}

        def attend(qkv, table, pad, kernels):
            options = {"num_heads": heads, "pad_qkv": pad, "kernels": kernels, **window}
            return (function(qkv, table, **options),)

        return Question(inputs, attend, ("out",))
    if operator == "patch_merging":
        inputs = {"x": x(channels), "weight": wide(4 * channels), "bias": wide(4 * channels)}
        return Question(inputs, partial(_one, function), ("out",))
    inputs = {"x": x(channels), "branch": x(channels)}
    inputs |= {"weight": wide(channels), "bias": wide(channels)}
    factor = torch.linspace(0.5, 2.0, CLIPS)

    def add(x, branch, weight, bias, kernels):
        scale = factor.to(x.device)
        return function(x, branch, weight, bias, branch_scale=scale, kernels=kernels)

    return Question(inputs, add, ("sum", "norm"))


def _one(function: Callable[..., Tensor], *inputs: Tensor, **options: object) -> tuple[Tensor]:
    return (function(*inputs, **options),)


def answers(
    asked: Question, kernels: str, device: str, dtype: torch.dtype | None = None
) -> dict[str, dict[str, Tensor]]:
    """direction -> name -> result on the CPU; `dtype` replaces that of all inputs."""
    leaves = [
        value.detach().to(device, dtype or value.dtype).requires_grad_()
        for value in asked.inputs.values()
    ]
    outputs = asked.call(*leaves, kernels=kernels)
    generator = torch.Generator().manual_seed(1)
    # Different weights for each element, so that no symmetry hides a wrong gradient; rounded to
    # bfloat16, so that they are the same in every dtype.
    ups = [
        torch.randn(out.shape, generator=generator).bfloat16().to(out.device, out.dtype)
        for out in outputs
    ]
    grads = torch.autograd.grad(outputs, leaves, ups)
    forward = zip(asked.outputs, outputs, strict=True)
    backward = zip(asked.inputs, grads, strict=True)
    return {
        "forward": {name: value.detach().cpu() for name, value in forward},
        "backward": {f"grad_{name}": value.cpu() for name, value in backward},
    }


def judge(got: Tensor, exact: Tensor, naive: Tensor, is_moved: bool) -> tuple[float, float]:
    """(largest error, its bound): twice the error of the reference and one rounding; movement 0."""
    if got.shape != exact.shape or got.dtype != naive.dtype:
        return inf, 0.0
    exact = exact.double()

    def distance(value: Tensor) -> float:
        furthest = (value.double() - exact).abs().max().item()
        return furthest if furthest == furthest else inf

    # And what is below the normal numbers of float32, which exponentials take for 0.
    rounding = torch.finfo(got.dtype).eps / 2 * exact.abs().max().item()
    rounding += torch.finfo(torch.float32).tiny
    return distance(got), 0.0 if is_moved else 2 * distance(naive) + rounding


def absence(kernels: str, operator: str) -> str | None:
    """Why a kernel set has not this operator in this version, on any machine; None if it has."""
    if kernels not in KERNELS or hasattr(getattr(torch.ops, f"videoswin_{kernels}"), operator):
        return None
    return reason_against(kernels, Call(operator, "meta"))


def ask(operator: str, kernels: str, name: str, options: argparse.Namespace) -> list[dict]:
    """The rows of an operator in a dtype, one for each direction and its worst result."""
    row = {"bench": "smoke", "operator": operator, "kernels": kernels, "dtype": name}
    row["shapes"] = options.shapes
    torch.manual_seed(0)
    asked, began = question(operator, options.shapes, DTYPES[name]), time.monotonic()
    try:
        got = answers(asked, kernels, options.device)
    except UnavailableError as refusal:
        # On a GPU every kernel that there is must run; an interpreter computes no bfloat16.
        must_run = options.device == "cuda" and absence(kernels, operator) is None
        kind = "failed" if must_run else "reason"
        return [{**row, "direction": "both", kind: str(refusal)}]
    except Exception as fault:  # Whatever it is, the others shall be asked.
        traceback.print_exc()
        said = f"{type(fault).__name__}: {str(fault).strip().partition(chr(10))[0]}"
        return [{**row, "direction": "both", "failed": said}]
    row["seconds"] = time.monotonic() - began
    # A sanitizer shall watch our kernels alone.
    naive = answers(asked, "reference", "cpu" if options.sanitized else options.device)
    exact = answers(asked, "reference", "cpu", torch.float64)
    moves = operator in MOVEMENT
    return [
        {**row, "direction": direction, **worst(results, exact[direction], naive[direction], moves)}
        for direction, results in got.items()
    ]


def worst(
    got: dict[str, Tensor], exact: dict[str, Tensor], naive: dict[str, Tensor], is_moved: bool
) -> dict:
    """The items of a row on the result that comes closest to its bound, or passes it most."""
    judged = {name: judge(got[name], exact[name], naive[name], is_moved) for name in got}

    def share(name: str) -> float:
        off, bound = judged[name]
        return off / bound if bound else inf if off else 0

    name = max(judged, key=share)
    off, bound = judged[name]
    items = {"output": name, "error": off, "bound": bound, "within": off <= bound}
    return items if off <= bound else {**items, "failed": f"{name} is off by {off:.1e}"}


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    has_cuda = torch.cuda.is_available()
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if has_cuda else "cpu")
    parser.add_argument("--operators", nargs="+", choices=OPERATORS, default=OPERATORS)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    word = partial(check_word, "smoke")
    parser.add_argument("--kernels", nargs="+", default=list(KERNELS), type=word)
    parser.add_argument("--shapes", choices=SHAPES, help="default: model on a GPU, small elsewhere")
    parser.add_argument(
        "--sanitized",
        action="store_true",
        help="for compute-sanitizer: fresh memory stays as it is, and the judge is on the CPU",
    )
    parser.add_argument("--json", metavar="FILE", help="add the rows to this file")
    options = parser.parse_args(words)
    if options.device == "cuda" and not has_cuda:
        parser.error("torch finds no CUDA GPU here")
    options.shapes = options.shapes or ("model" if options.device == "cuda" else "small")
    # Fresh memory is NaN, so that an element that no kernel wrote shows.
    torch.use_deterministic_algorithms(not options.sanitized, warn_only=True)
    rows = Rows(options.json, header(options.device))
    failures = 0
    for asked in product(options.operators, options.kernels, options.dtypes):
        for row in ask(*asked, options):
            rows.append(row)
            failures += "failed" in row
    print(rows.table(COLUMNS, {"bench": "smoke"}))
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
