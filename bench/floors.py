"""What operators and models must move and compute at least, from geometry, and the time for it.

A floor is the largest of three times: bytes over the rate of a copy, FLOPs over the rate of a
matrix product, exponentials over their rate. That of attention counts every pair of tokens of a
window, those that the mask separates as well, unless `skips` leaves them out: the mask is finite,
so they count where scores are large enough.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

import numpy as np
import torch

from bench import machine
from bench.harness import Rows, measure
from bench.sizes import CLIP, depths, stages
from videoswin_kernels.geometry import WindowGeometry
from videoswin_kernels.testing import Case, Stage, Triple

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


def attention(
    stage: Stage, batch: int, direction: str, itemsize: int = 2, *, skips: bool = False
) -> Work:
    """The least work of window attention between the qkv and the proj Linear.

    Args:
        stage: grid, window, shift, channels and heads.
        batch: clips.
        direction: one of `PASSES`.
        itemsize: bytes of an element of qkv.
        skips: pairs of tokens that the mask separates are left out.
    """
    case, plane = stage.case, plane_of(stage, batch, itemsize)
    # The logarithm of each row's sum, float32, for which the backward need not see all scores.
    row_sums = 4 * batch * prod(case.grid) * stage.heads
    # Every token of a window meets every other one, once for each head, padding included.
    scores = (
        batch * stage.heads * (unmasked_pairs(case) if skips else case.windows * case.tokens**2)
    )
    product = 2 * scores * (stage.channels // stage.heads)
    if direction == FORWARD:
        # In: q, k, v. Out: the output and the row sums. Products: q k^T and p v.
        return Work(4 * plane + row_sums, 2 * product, scores)
    # In: q, k, v, the output, its gradient, the row sums, and for each row the sum of the output
    # times its gradient. Out: the gradients of q, k and v. The tables are too small to count.
    # Products: q k^T again, and the gradients of v, p, q and k.
    return Work(8 * plane + 2 * row_sums, 5 * product, scores)


def plane_of(stage: Stage, batch: int, itemsize: int) -> int:
    """Bytes of one number for each token and channel, as q, k, v and the output are."""
    return batch * prod(stage.case.grid) * stage.channels * itemsize


def unmasked_pairs(case: Case) -> int:
    """Pairs of tokens of a clip's windows that are of one region of the shift."""
    geometry = WindowGeometry.build(*case)
    regions = geometry.region.reshape(geometry.num_windows, -1)
    return sum(int((np.unique(row, return_counts=True)[1] ** 2).sum()) for row in regions)


def movement(operator: str, stage: Stage, batch: int, direction: str, itemsize: int = 2) -> Work:
    """The least work of an operator beside attention: bytes, and nothing of the rest that counts.

    What is read and what is written, once each. Weights, and what a norm keeps of a row, are too
    small to count.
    """
    case, plane = stage.case, plane_of(stage, batch, itemsize)
    if operator == "residual_norm":
        # In: x and the branch; out: their sum and its norm. Backwards, in: the gradients of both
        # and the sum; out: two gradients.
        return Work((4 if direction == FORWARD else 5) * plane, 0, 0)
    if operator == "patch_merging":
        depth, height, width = case.grid
        merged = batch * depth * -(-height // 2) * -(-width // 2) * 4 * stage.channels * itemsize
        # Backwards x is read once more.
        return Work(merged + (1 if direction == FORWARD else 2) * plane, 0, 0)
    windows = batch * case.windows * case.tokens * stage.channels * itemsize
    return Work(plane + (plane if operator == "cyclic_shift" else windows), 0, 0)


# Planes that a block of a model moves beside its attention, where all that can be fused is: norms,
# the qkv, proj and two mlp Linears, GELU, and the two sums of the residual stream. Under autocast
# the stream is float32, which is as much as six planes more.
BLOCK_PLANES = {"same": 22, "autocast": 28}


def model(
    name: str,
    batch: int,
    *,
    clip: Sequence[int] = CLIP,
    window: Triple | None = None,
    training: bool = False,
    itemsize: int = 2,
    stream: str = "same",
) -> list[Work]:
    """The least work of a model's blocks, one after the other; patches, merging and head are none.

    Of attention, and of the rest: the Linears' products, which overlap with the bytes. A backward
    is twice the rest. Shifted blocks leave out what the mask separates.

    Args:
        name: of `model.variants`.
        batch: clips.
        clip: channels, frames, height and width.
        window: in place of the model's own.
        training: the backward, too.
        itemsize: bytes of an element of what is moved.
        stream: "same", or "autocast" where the residual stream is float32.
    """
    works = []
    for stage, depth in zip(stages(name, clip, window), depths(name), strict=True):
        plane = plane_of(stage, batch, itemsize)
        # qkv 3, proj 1, mlp 8 times C x C for each token.
        products = 24 * batch * prod(stage.case.grid) * stage.channels**2
        for number in range(depth):
            for direction in PASSES[: 1 + training]:
                skips = number % 2 == 1
                works.append(attention(stage, batch, direction, itemsize, skips=skips))
                times = 1 + (direction == BACKWARD)
                works.append(Work(times * BLOCK_PLANES[stream] * plane, times * products, 0))
    return works


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
    exponential may pass it. On a GPU they are those of a Triton kernel that keeps them in registers
    or, where Triton is missing, counted: 16 a clock and multiprocessor, as of compute capability
    8.0 to 9.0.
    """
    device = torch.device(device)
    is_cuda = device.type == "cuda"
    # More than the caches hold, and a product large enough to fill the machine.
    count, size = (2**30, 8192) if is_cuda else (2**28, 1024)
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
        exps, how = _triton_exp_rate(device, seconds)
    else:
        exps, how = _exp_rate(seconds), "torch.exp of one thread, times the threads"
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


def _triton_exp_rate(device: torch.device, seconds: float) -> tuple[float, str]:
    """(exponentials a second, in words how they were found)."""
    try:
        from bench.ceilings import triton_exp2

        function, count, _ = triton_exp2(device)
    except (ImportError, RuntimeError) as fault:
        # Rows are worth more than their floor; they say what it is of.
        said = f"exp counted, as {type(fault).__name__}: {fault}".splitlines()[0]
        return _special_function_rate(device), said
    timing = measure({"exp": function}, device, seconds=seconds)["exp"]
    return count * 1e3 / timing.low, "exp2 in Triton"


def _special_function_rate(device: torch.device) -> float:
    """Exponentials a second by the count of units and the highest clock."""
    properties = torch.cuda.get_device_properties(device)
    clocks = machine.clocks(device)
    clock = clocks["sm_max"] * 1e6 if clocks else 1.98e9
    return 16 * properties.multi_processor_count * clock


class CeilingsOf:
    """This machine's ceilings, measured once in a run, and only if a row asks for them.

    Args:
        rows: where they are added.
        device, dtype: of the rows that ask.
        preset: of the bench, which tells how long they are measured.
        seconds: how long.
    """

    def __init__(
        self, rows: Rows, device: torch.device, dtype: str, preset: str, seconds: float
    ) -> None:
        self.rows, self.device, self.dtype = rows, device, dtype
        self.preset, self.seconds, self.measured = preset, seconds, None

    def __call__(self) -> Ceilings:
        if self.measured is None:
            dtype = getattr(torch, self.dtype)
            self.measured = measure_ceilings(self.device, dtype, seconds=self.seconds)
            key = {"bench": "ceilings", "preset": self.preset, "dtype": self.dtype}
            self.rows.append({**key, **self.measured._asdict()})
        return self.measured


def items(works: Sequence[Work], ceilings: Ceilings, ms: float) -> dict:
    """The items of a row that took so many milliseconds for these works."""
    floor_ms, bound = floor(works, ceilings)
    found = {"floor_ms": floor_ms, "floor_bound": bound, "floor_percent": 100 * floor_ms / ms}
    return {**found, "ceilings": ceilings._asdict()}
