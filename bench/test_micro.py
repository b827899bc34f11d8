"""Micro-benchmarks of the operators for pytest-benchmark, to compare one commit with another.

`pytest bench/test_micro.py --benchmark-autosave` on the one, then on the other
`pytest bench/test_micro.py --benchmark-compare --benchmark-compare-fail=median:10%`. Inputs are
small, so that all take seconds; what they say of an operator's speed at real sizes, the other
benches say. `make test` does not run them: a time is no test.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from bench.attention_peers import Problem
from bench.attention_providers import differentiate, ours
from bench.operator_problems import random_problem
from bench.operators import MEASURED
from videoswin_kernels.selection import UnavailableError
from videoswin_kernels.testing import Case, Stage

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
# Two windows along each of two axes, so that the shift has regions.
STAGE = Stage(Case((8, 14, 14), (8, 7, 7), (4, 3, 3)), 96, 3)
BATCH = 2


def attention(kernels: str, trains: bool) -> Callable[[], object]:
    """A call of `window_attention`, with its gradients where it trains."""
    problem = Problem.random(STAGE, BATCH, DTYPE, DEVICE)
    problem = problem.leaves() if trains else problem
    forward = ours(kernels)(problem, trains)
    upstream = torch.randn_like(forward())
    if not trains:
        return torch.no_grad()(forward)
    return lambda: differentiate(forward(), problem.tensors, upstream)


def other(operator: str, kernels: str, trains: bool) -> Callable[[], object]:
    """A call of another operator."""
    problem = random_problem(operator, STAGE, BATCH, DTYPE, DEVICE)
    problem = problem.leaves() if trains else problem
    return lambda: problem.call(kernels, trains)


@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
@pytest.mark.parametrize("kernels", ["reference", "fused"])
@pytest.mark.parametrize("operator", ["window_attention", *MEASURED])
def test_operator(benchmark, operator: str, kernels: str, direction: str) -> None:
    trains = direction != "forward"
    is_attention = operator == "window_attention"
    try:
        call = attention(kernels, trains) if is_attention else other(operator, kernels, trains)
        call()
    except UnavailableError as refused:
        pytest.skip(str(refused))

    def timed() -> None:
        call()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize(DEVICE)

    benchmark.group = f"{operator}, {direction}"
    benchmark.pedantic(timed, rounds=30, warmup_rounds=3)
