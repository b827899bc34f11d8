"""What is said of a provider's repetitions: their median, their spread, and what is noise.

Each provider is entered twice, so that there is a pair of times from every round. The ratio of the
two is 1 but for noise; the 95 % interval of its median is the A/A control. An effect smaller than
half the width of that interval is none that the bench can see.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from math import comb
from typing import NamedTuple

import numpy as np

from bench.rows import cell

# How often an interval may miss the median.
MISSES = 0.05


class Timing(NamedTuple):
    """Of all repetitions of both entries, in milliseconds.

    Attributes:
        median: the middle.
        low, high: the 20th and the 80th percentile.
        count: how many there are.
        ratio: 95 % interval of the median ratio of the two entries; None from fewer than six pairs.
        launch_ms: how long the host takes to launch it on a GPU; None on a CPU.
    """

    median: float
    low: float
    high: float
    count: int
    ratio: tuple[float, float] | None = None
    launch_ms: float | None = None

    @classmethod
    def of(
        cls, first: Sequence[float], second: Sequence[float], launch_ms: float | None = None
    ) -> Timing:
        """That of two entries' times, in milliseconds, one of each from every round."""
        low, median, high = np.percentile([*first, *second], (20, 50, 80)).tolist()
        ratios = [one / other if other else 1.0 for one, other in zip(first, second, strict=True)]
        interval = interval_of_median(ratios)
        return cls(median, low, high, len(first) + len(second), interval, launch_ms)

    @property
    def noise_percent(self) -> float | None:
        """Half the width of the A/A interval: the smallest effect that may be claimed."""
        return None if self.ratio is None else 50 * (self.ratio[1] - self.ratio[0])

    @property
    def items(self) -> dict:
        """The items of a row."""
        spread = f"{cell(self.low)}-{cell(self.high)}"
        timed = dict(ms=self.median, low=self.low, high=self.high, count=self.count, spread=spread)
        noise = {"aa_ratio": self.ratio, "noise_percent": self.noise_percent}
        return {**timed, **noise, "launch_ms": self.launch_ms}


def in_rounds(
    names: Iterable[str], take: Callable[[str], float], goes_on: Callable[[int], bool]
) -> dict[str, tuple[list[float], list[float]]]:
    """The times of each name's two entries, one of each from every round.

    Rounds are shuffled: clocks that drift, and what the one before leaves behind, meet all of them.

    Args:
        names: what is timed.
        take: milliseconds of one repetition.
        goes_on: whether there is another round, after so many.
    """
    samples = {name: ([], []) for name in names}
    entries = [(name, entry) for entry in range(2) for name in samples]
    order, count = random.Random(0), 0
    while entries and goes_on(count):
        order.shuffle(entries)
        for name, entry in entries:
            samples[name][entry].append(take(name))
        count += 1
    return samples


def interval_of_median(values: Sequence[float]) -> tuple[float, float] | None:
    """The 95 % interval of a median, whatever the values' distribution; None from fewer than six.

    Each value is above the median as often as below. So the k-th smallest and the k-th largest
    enclose it, but where fewer than k of the values are on one side: a binomial distribution.
    """
    ordered, count = sorted(values), len(values)
    outside, rank = 0, 0
    while 2 * (outside + comb(count, rank)) <= MISSES * 2**count:
        outside += comb(count, rank)
        rank += 1
    return (ordered[rank - 1], ordered[count - rank]) if rank else None
