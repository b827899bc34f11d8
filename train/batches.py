"""Which videos are read, in which order: the keys of every batch of a run.

Every random choice has a generator of its own, seeded by (seed, epoch, video): the clips of a run
do not depend on the number of workers, no two epochs or workers share a stream, and a resumed run
reads what the uninterrupted one would have.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler


def stream(kind: str, *numbers: int) -> np.random.Generator:
    """The generator of a named purpose and place in the run, independent of all others."""
    # Length first: NumPy pads short seeds with zeros, so [1, 2] and [1, 2, 0] would be one.
    return np.random.default_rng([len(numbers), *kind.encode(), *numbers])


class EpochBatches(Sampler):
    """The keys of each step's batch, from `first_step` to the last step of the last epoch.

    Each epoch is a permutation of its own of all videos; its last batch may be smaller. Of a batch,
    the process `rank` of `world` has every `world`-th key: all of them together have each key once,
    and some have one key fewer than others, or none.
    """

    def __init__(
        self,
        num_videos: int,
        batch_size: int,
        seed: int,
        epochs: int,
        first_step: int = 0,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.num_videos, self.batch_size, self.seed = num_videos, batch_size, seed
        self.steps_per_epoch = -(-num_videos // batch_size)
        self.num_steps = self.steps_per_epoch * epochs
        self.first_step, self.rank, self.world = first_step, rank, world

    def __len__(self) -> int:
        return max(self.num_steps - self.first_step, 0)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order, order_epoch = None, None
        for step in range(self.first_step, self.num_steps):
            epoch, batch = divmod(step, self.steps_per_epoch)
            if epoch != order_epoch:
                order = stream("epoch", self.seed, epoch).permutation(self.num_videos)
                order_epoch = epoch
            chosen = order[batch * self.batch_size : (batch + 1) * self.batch_size]
            yield [(epoch, int(index)) for index in chosen[self.rank :: self.world]]

    def share_of(self, step: int) -> int:
        """How many keys of a step's batch a process has at most."""
        first = step % self.steps_per_epoch * self.batch_size
        return -(-min(self.batch_size, self.num_videos - first) // self.world)


def ordered_batches(num_videos: int, batch_size: int) -> list[list[tuple[int, int]]]:
    """The keys of a pass over all videos in order, each once."""
    keys = [(0, index) for index in range(num_videos)]
    return [keys[start : start + batch_size] for start in range(0, num_videos, batch_size)]
