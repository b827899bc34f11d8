"""Accelerated models under DDP and FSDP2: the losses and gradients of the original.

A process group of this process alone is asked in any case; two processes of gloo, started by
torchrun, are asked by `make verify`.
"""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from accelerate_suite import accelerated, assert_same, clips, outcome, runs_here, small
from model_suite import randomize
from official_structures import mm, official
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torchvision.models.swin_transformer import SwinTransformerBlock

from videoswin_kernels import accelerate

pytestmark = runs_here

FOLDER = Path(__file__).parent
WORLD = pytest.mark.usefixtures("lonely_group")


class Pooled(nn.Sequential):
    """A backbone whose features are averaged: [B, C]."""

    def forward(self, x):
        return super().forward(x).mean((2, 3, 4))


def backbone(family):
    torch.manual_seed(3)
    return Pooled(randomize(family.SwinTransformer3D(drop_path_rate=0.3, checkpoints=True)))


MODELS = {
    "torchvision": lambda: small(stochastic_depth_prob=0.3).train(),
    "official": lambda: backbone(official),
    "mm": lambda: backbone(mm),
}
NAMES = ("SwinTransformerBlock3D", "PatchMerging")


def sharded(model):
    """Each block and merging, and the rest, as FSDP2 spreads them."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for module in list(model.modules()):
        if type(module).__name__ in NAMES or isinstance(module, SwinTransformerBlock):
            fully_shard(module, mesh=mesh)
    return fully_shard(model, mesh=mesh)


WAYS = {
    "ddp": lambda model: DistributedDataParallel(accelerate(model)),
    "accelerated in ddp": lambda model: accelerate(DistributedDataParallel(model)),
    "sharded later": lambda model: sharded(accelerate(model)),
    "sharded before": lambda model: accelerate(sharded(model)),
}


def whole(tensors):
    """What FSDP2 has in parts, put together under the names that it had."""
    return {
        name.removeprefix("module."): each.full_tensor() if hasattr(each, "full_tensor") else each
        for name, each in tensors.items()
    }


@pytest.fixture
def lonely_group(tmp_path):
    """A process group of this process alone."""
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@WORLD
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
def test_a_process_alone(build, way):
    original, x = build(), clips()
    own = outcome(original, x)
    spread = way(copy.deepcopy(original))
    for _ in range(2):
        assert_same(whole(outcome(spread, x)), own, 1e-5)


@WORLD
def test_the_way_back_of_sharded_parts():
    """Back to what they were when they were accelerated; wrapped since then, it is refused."""
    original, x = small(), clips()
    before = sharded(copy.deepcopy(original))
    kinds = [type(each) for each in before.modules()]
    accelerate(accelerate(before), "reference")
    assert [type(each) for each in before.modules()] == kinds
    assert_same(whole(outcome(before, x)), outcome(original, x), 1e-5)
    later = sharded(accelerated(original))
    kinds = [type(each) for each in later.modules()]
    with pytest.raises(ValueError, match=r"^accelerate: features\.0\.0 .* FSDP"):
        accelerate(later, "reference")
    assert [type(each) for each in later.modules()] == kinds
    assert_same(whole(outcome(later, x)), outcome(original, x), 1e-5)


def losses(model, steps=5):
    """Of AdamW steps, each process with clips and draws of its own; and the last gradients."""
    optimizer, values = torch.optim.AdamW(model.parameters(), lr=1e-3), []
    torch.manual_seed(100 + dist.get_rank())
    generator = torch.Generator().manual_seed(dist.get_rank())
    for _ in range(steps):
        x = torch.randn(3, 3, 4, 24, 20, generator=generator)
        loss = nn.functional.cross_entropy(model(x), torch.arange(3))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    return values, whole({name: each.grad for name, each in model.named_parameters()})


def run():
    """What each of two processes does."""
    dist.init_process_group("gloo")
    torch.use_deterministic_algorithms(True, warn_only=True)
    for name, build in MODELS.items():
        expected, grads = losses(DistributedDataParallel(build()))
        for way, spread in WAYS.items():
            got, others = losses(spread(build()))
            assert got == pytest.approx(expected, rel=1e-5), (name, way)
            assert_same(others, grads, 1e-3)
            print("alike")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes(tmp_path):
    script = tmp_path / "run.py"
    script.write_text("import test_accelerate_parallel\ntest_accelerate_parallel.run()\n")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    path = os.pathsep.join([str(FOLDER), str(FOLDER.parent)])
    done = subprocess.run(
        [*command, str(script)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("alike") == 2 * len(MODELS) * len(WAYS)
