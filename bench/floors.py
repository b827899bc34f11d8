"""What attention must move and compute at least, from geometry, and the time that takes.

A floor is the largest of three times: bytes over the rate of a copy, FLOPs over the rate of a
matrix product, exponentials over their rate. It counts every pair of tokens of a window, those that
the mask separates as well: the mask is finite, so they count where scores are large enough.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

import torch

from bench import machine
from bench.harness import measure
from videoswin_kernels.testing import Stage

PASSES = FORWARD, BACKWARD = ("forward", "backward")


class Work(NamedTuple):
    """Bytes of device memory, floating-point operations and exponentials."""

    bytes: int
    flops: int
    exps: int


class Ceilings(NamedTuple):
    """Rates of a machine, each per second, and in words where they are from."""

    bytes: float
    flops: float
    exps: float
    source: str


# A lead, not a measurement of this run. Copy and bf16 product: seen on one H200. Exponentials: the
# special-function units take 16 a clock in each of 132 multiprocessors at 1.98 GHz.
H200 = Ceilings(4.3e12, 790e12, 16 * 132 * 1.98e9, "assumed for an H200")


def attention(stage: Stage, batch: int, direction: str, itemsize: int = 2) -> Work:
    """The least work of window attention between the qkv and the proj Linear.

    Args:
        stage: grid, window, channels and heads.
        batch: clips.
        direction: one of `PASSES`.
        itemsize: bytes of an element of qkv.
    """
    case = stage.case
    # A plane: one number for each token and channel, as q, k, v and the output are.
    plane = batch * prod(case.grid) * stage.channels * itemsize
    # The logarithm of each row's sum, float32, for which the backward need not see all scores.
    row_sums = 4 * batch * prod(case.grid) * stage.heads
    # Every token of a window meets every other one, once for each head, padding included.
    scores = batch * case.windows * stage.heads * case.tokens**2
    product = 2 * scores * (stage.channels // stage.heads)
    if direction == FORWARD:
        # In: q, k, v. Out: the output and the row sums. Products: q k^T and p v.
        return Work(4 * plane + row_sums, 2 * product, scores)
    # In: q, k, v, the output, its gradient, the row sums, and for each row the sum of the output
    # times its gradient. Out: the gradients of q, k and v. The tables are too small to count.
    # Products: q k^T again, and the gradients of v, p, q and k.
    return Work(8 * plane + 2 * row_sums, 5 * product, scores)


def floor(works: Sequence[Work], ceilings: Ceilings) -> tuple[float, str]:
    """Milliseconds of works one after the other, at least, and what bounds the longest of them.

    Bytes, products and exponentials of one work can overlap; a forward and its backward cannot.
    """
    bounds = [
        max(
            (amount / rate * 1e3, name)
            for amount, rate, name in zip(work, ceilings[:3], Work._fields, strict=True)
        )
        for work in works
    ]
    return sum(time for time, _ in bounds), max(bounds)[1]


def measure_ceilings(
    device: torch.device | str, dtype: torch.dtype, *, seconds: float = 0.6
) -> Ceilings:
    """What this machine reaches now: a large copy, a large matrix product, exponentials.

    On a CPU the exponentials are torch.exp of what fits the caches; a kernel with a cheaper
    exponential may pass it. On a GPU torch.exp is bound by memory, and their rate is counted
    instead: 16 a clock and multiprocessor, as of compute capability 8.0 to 9.0.
    """
    device = torch.device(device)
    is_cuda = device.type == "cuda"
    # Far more than the caches hold, and a product large enough to fill the machine.
    count, size = (2**30, 8192) if is_cuda else (2**27, 1024)
    source = torch.arange(count // 4, dtype=torch.int32, device=device)
    target = torch.empty_like(source)
    # Not zeros, of which a product is faster than of data.
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(left)
    functions = {
        "copy": lambda: target.copy_(source),
        "product": lambda: torch.mm(left, right, out=out),
    }
    timings = measure(functions, device, seconds=seconds)
    # Not the median: what disturbs a ceiling only lowers it.
    copies, products = (1e3 / timings[name].low for name in functions)
    if is_cuda:
        exps, how = _special_function_rate(device), "exp counted"
    else:
        exps, how = _exp_rate(seconds), "torch.exp"
    return Ceilings(2 * count * copies, 2 * size**3 * products, exps, f"measured, {how}")


def _exp_rate(seconds: float) -> float:
    """Exponentials a second of torch.exp on a CPU: those of one thread, times the threads.

    What fits the caches takes microseconds, of which threads that wait for each other take most.
    """
    threads = torch.get_num_threads()
    exponents = torch.randn(2**16)
    powers = torch.empty_like(exponents)
    torch.set_num_threads(1)
    try:
        function = {"exp": lambda: torch.exp(exponents, out=powers)}
        timing = measure(function, "cpu", seconds=seconds)["exp"]
    finally:
        torch.set_num_threads(threads)
    return threads * exponents.numel() * 1e3 / timing.low


def _special_function_rate(device: torch.device) -> float:
    """Exponentials a second by the count of units and the highest clock."""
    properties = torch.cuda.get_device_properties(device)
    clocks = machine.clocks(device)
    clock = clocks["sm_max"] * 1e6 if clocks else 1.98e9
    return 16 * properties.multi_processor_count * clock
