"""The processes of a run: who they are, what they tell each other, how they share the model.

Each has one device and its own part of every step's clips. torchrun starts them; without it there
is one. Under DDP each has the whole model, under FSDP2 a part of each parameter.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from model.video_swin import SwinTransformerBlock3D

Parallel = Literal["ddp", "fsdp"]
PARALLEL = ("ddp", "fsdp")


class DisagreementError(RuntimeError):
    """Processes that are to do one thing were told to do several: one sentence."""


@dataclass(frozen=True)
class Group:
    """One process among all of a run.

    Attributes:
        device: the one it computes on.
        rank: its number, from 0.
        world: how many there are.
    """

    device: torch.device
    rank: int = 0
    world: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this is the one that writes files and prints."""
        return self.rank == 0

    def total(self, *numbers: float) -> list[float]:
        """The sum of each number over all processes, the same bits in all of them."""
        if self.world == 1:
            return list(numbers)
        # On the host: what decides the next step must not wait for the device.
        sums = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(sums)
        return sums.tolist()

    def gather(self, item: Any) -> list[Any]:
        """What each process gave, in the order of their ranks; it is pickled."""
        if self.world == 1:
            return [item]
        items = [None] * self.world
        dist.all_gather_object(items, item)
        return items

    def agree(self, of: str, *items: Any) -> None:
        """DisagreementError if another process has other items: it would wait for ever."""
        if any(each != items for each in self.gather(items)):
            raise DisagreementError(f"the processes of the run do not have the same {of}")

    def wait(self) -> None:
        """Returns once every process is here."""
        self.total(0)


@contextmanager
def joined(word: str) -> Iterator[Group]:
    """This process's place among those that torchrun started, on its device of that kind.

    Args:
        word: a device such as "cpu", "cuda" or "cuda:1"; of more than one process each has the one
            of its local rank.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    device = torch.device(word)
    if world == 1:
        yield Group(device)
        return
    rank = int(os.environ["RANK"])
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    # Where a process was killed and all begin again, the store may have the addresses of before.
    store, *_ = next(rendezvous("env://"))
    store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    # Numbers on the host go their own way, whatever the gradients take.
    backend = "gloo" if device.type == "cpu" else f"cpu:gloo,{device.type}:nccl"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world)
    try:
        yield Group(device, rank, world)
    finally:
        dist.destroy_process_group()


def spread(model: nn.Module, parallel: Parallel, group: Group, *, compiles: bool) -> nn.Module:
    """What stands for `model` in a step: itself, compiled, or spread over the processes.

    Activation checkpointing is the model's own; then it is compiled, then spread: each sees what is
    inside of it. The parameters stay those of `model`, under their names; under FSDP2, which has
    one unit for each block and one for what is around them, they become parts of themselves, so an
    optimiser is made afterwards.
    """
    is_in_parts = parallel == "fsdp" and group.world > 1
    if compiles and not is_in_parts:
        model.compile()
    if group.world == 1:
        return model
    if not is_in_parts:
        ids = [group.device] if group.device.type == "cuda" else None
        return DistributedDataParallel(
            model, device_ids=ids, broadcast_buffers=False, gradient_as_bucket_view=True
        )
    # torch's caches keep a mesh, so `joined` does not end what it sends by, and a thread that has
    # just sent something aborts a process that ends. The group of the last words is another one.
    mesh = DeviceMesh.from_group(dist.new_group(), group.device.type)
    for module in list(model.modules()):
        if isinstance(module, SwinTransformerBlock3D):
            if compiles:
                # What gathers its parameters stays outside.
                module.compile()
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


@contextmanager
def adding_up(module: nn.Module, is_last: bool) -> Iterator[None]:
    """Gradients of backward passes in it stay with this process, until the last one of a step."""
    if isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(is_last)
        yield
    elif isinstance(module, DistributedDataParallel) and not is_last:
        with module.no_sync():
            yield
    else:
        yield
