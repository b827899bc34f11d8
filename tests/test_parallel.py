"""More than one process: the run that one would have been, whoever dies and whoever goes on.

Processes of gloo on a CPU, started by torchrun as a user would.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import train_suite as suite
from torch.nn.parallel import DistributedDataParallel

from train import consolidate
from train.checkpoint import load_checkpoint
from train.optim import OptimSettings, build_optimizer
from train.parallel import Group, joined
from train.recipe import LoopSettings
from train.step import Stepper

# Signals a process, this one of rank 1 or its parent, after so many steps, but only the first time.
SIGNALLED = """
import os, runpy, signal, sys
from pathlib import Path
from train import loop
plain, marker = loop.Run._step, Path({marker!r})
def step(self, *arguments):
    if self.step == {step} and self.group.rank == 1 and not marker.exists():
        marker.touch()
        os.kill(os.{process}(), signal.{kind})
    return plain(self, *arguments)
loop.Run._step = step
sys.argv[0] = "train"
runpy.run_module("train", run_name="__main__", alter_sys=True)
"""


# Twenty steps of a model whose parameters are bfloat16, under DDP and in parts.
HALVES = """
import torch
from model import create
from train.optim import OptimSettings, build_optimizer
from train.parallel import joined, spread
from train.recipe import LoopSettings
from train.step import Stepper

def run(parallel, group):
    torch.manual_seed(0)
    model = create("swin_nano", num_classes=8, dropout=0.0).bfloat16()
    module, optim = spread(model, parallel, group, compiles=False), OptimSettings(warmup_epochs=0)
    loop = LoopSettings(precision="bfloat16", clips_per_pass=1)
    optimizer = build_optimizer(model, optim)
    stepper = Stepper(module, optimizer, optim, loop, (3, 4, 16, 16), group)
    losses = []
    for step in range(20):
        drawn = torch.Generator().manual_seed(100 * step + group.rank)
        clips = torch.randint(256, (2, 3, 4, 16, 16), dtype=torch.uint8, generator=drawn)
        labels = torch.randint(8, (2,), generator=drawn)
        losses += group.total(stepper.step(clips, labels, 4, stepper.num_passes(2)).loss.item())
    whole = {
        name: (each.full_tensor() if hasattr(each, "full_tensor") else each).detach()
        for name, each in model.named_parameters()
    }
    assert {each.dtype for each in whole.values()} == {torch.bfloat16}
    return losses, whole

with joined("cpu") as group:
    (losses, weights), (other_losses, other_weights) = (run(p, group) for p in ("ddp", "fsdp"))
    assert max(losses) - min(losses) > 0.1, losses
    torch.testing.assert_close(other_losses, losses, rtol=1e-6, atol=0)
    for name, each in weights.items():
        torch.testing.assert_close(other_weights[name].float(), each.float(), rtol=0, atol=1e-5)
    print("alike")
"""


# Which threads that send live on after a model in parts: one of them with work that it has just
# done would abort the process that ends.
THREADS = """
from pathlib import Path
import torch
from train.parallel import joined, spread

def count():
    names = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
    return sum(name.startswith("pt_gloo") for name in names)

with joined("cpu") as group:
    module = spread(torch.nn.Linear(4, 4), "fsdp", group, compiles=False)
    module(torch.ones(2, 4)).sum().backward()
    group.total(1)
    both = count()
print("ended" if count() < both else "left")
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """24 steps of three clips or of one, in passes of one clip: rank 1 has one clip, or none.

    Nothing is drawn: each process would draw its own.
    """
    folder = tmp_path_factory.mktemp("parallel") / "videos"
    suite.write_videos(folder)
    return suite.changed(
        suite.tiny_recipe(folder),
        model={"drop_path_rate": 0.0, "dropout": 0.0},
        loop={"epochs": 4, "clips_per_pass": 1, "evaluate_every": 2, "keep": 4},
    )


def torchrun(recipe, output: Path, *words, program=None, restarts=0, ends_well=True):
    """Two processes of `python -m train`, or of a program that stands for it."""
    if program:
        output.parent.mkdir(parents=True, exist_ok=True)
        script = output.with_name(f"{output.name}.py")
        script.write_text(program)
    target = [str(script)] if program else ["-m", "train"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node=2", f"--max-restarts={restarts}", "--monitor-interval=0.1"]
    command += [*target, "--recipe", "demo", "--output", str(output), *suite.MACHINE, *words]
    done = subprocess.run(
        [*command, *suite.overrides(recipe)],
        cwd=suite.ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(suite.ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert (done.returncode == 0) == ends_well, done.stderr[-4000:]
    return done


@pytest.fixture(scope="module")
def alone(recipe, tmp_path_factory):
    output = tmp_path_factory.mktemp("alone") / "run"
    assert suite.train(recipe, output) == 0
    return output


@pytest.fixture(scope="module")
def ddp(recipe, tmp_path_factory):
    output = tmp_path_factory.mktemp("ddp") / "run"
    done = torchrun(recipe, output)
    said = "3 clips a step: at most 1 a pass x 2 passes x 2 processes"
    assert done.stdout.count(said) == 1
    return output


@pytest.fixture(scope="module")
def fsdp(recipe, tmp_path_factory):
    output = tmp_path_factory.mktemp("fsdp") / "run"
    torchrun(recipe, output, "--parallel", "fsdp")
    return output


def lines(output, kind):
    return [line for line in suite.metrics(output) if line["kind"] == kind]


def assert_equal_runs(output, other, weights=None):
    """Losses of each step to 1e-6, weights to 1e-5, the same accuracies and counts of clips."""
    one, two = lines(output, "train"), lines(other, "train")
    assert [line["step"] for line in one] == [line["step"] for line in two] == list(range(1, 25))
    assert [line["clips"] for line in one] == [line["clips"] for line in two]
    for mine, its in zip(one, two, strict=True):
        assert mine["loss"] == pytest.approx(its["loss"], rel=1e-6), mine["step"]
        assert mine["top1"] == its["top1"]
    numbers = [[{**line, "lr": None} for line in lines(each, "test")] for each in (output, other)]
    assert numbers[0] == numbers[1]
    assert_equal_weights(weights or load_checkpoint(output / "last.pt"), other)


def assert_equal_weights(state, other):
    expected = load_checkpoint(other / "last.pt")["model"]
    assert state["model"].keys() == expected.keys()
    for name, tensor in state["model"].items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-5, msg=name)


def test_two_processes_are_one(ddp, alone):
    assert_equal_runs(ddp, alone)


@pytest.mark.slow
def test_a_model_in_parts_is_a_whole_one(fsdp, ddp, tmp_path):
    assert not (fsdp / "last.pt").exists()
    output = tmp_path / "whole.pt"
    assert consolidate.main([str(fsdp / "last.parts"), "--output", str(output)]) == 0
    assert_equal_runs(fsdp, ddp, load_checkpoint(output))
    # What evaluation and prediction take is whole in any case.
    assert load_checkpoint(fsdp / "best.pt")["best_top1"] >= 0


@pytest.mark.slow
def test_parameters_in_bfloat16_are_alike_in_parts(recipe, tmp_path):
    assert torchrun(recipe, tmp_path / "run", program=HALVES).stdout.count("alike") == 2


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the names of threads are read from /proc")
def test_threads_of_the_last_words_end_with_the_group(recipe, tmp_path):
    done = torchrun(recipe, tmp_path / "run", program=THREADS)
    assert done.stdout.count("ended") == 2, done.stdout


def older(run, tmp_path):
    """A copy of the run as it was before its last checkpoint but one."""
    output = shutil.copytree(run, tmp_path / "run")
    for path in output.glob("last*"):
        if path.stem in ("last", "last-1"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return output


@pytest.mark.slow
@pytest.mark.parametrize("words", [None, (), ("--parallel", "fsdp")], ids=["1", "ddp", "fsdp"])
def test_parts_are_gone_on_from_by_any_number_of_processes(recipe, fsdp, alone, tmp_path, words):
    output = older(fsdp, tmp_path)
    if words is None:
        assert suite.train(recipe, output, "--resume") == 0
    else:
        torchrun(recipe, output, "--resume", *words)
    if words and "fsdp" in words:
        assert (
            consolidate.main([str(output / "last.parts"), "--output", str(output / "last.pt")]) == 0
        )
    assert_equal_runs(output, alone)


@pytest.mark.slow
def test_in_place_of_a_damaged_part_the_checkpoint_before_is_gone_on_from(
    recipe, fsdp, alone, tmp_path, capsys
):
    output = shutil.copytree(fsdp, tmp_path / "run")
    part = next((output / "last.parts").glob("*.distcp"))
    part.write_bytes(part.read_bytes()[:1000])
    assert consolidate.main([str(output / "last.parts")]) == 1
    assert capsys.readouterr().err.startswith(f"cannot load {output / 'last.parts'}: ")
    assert suite.train(recipe, output, "--resume") == 0
    assert "; going on from last-1.parts\n" in capsys.readouterr().err
    assert_equal_runs(output, alone)


@pytest.mark.slow
def test_a_whole_checkpoint_is_gone_on_from_in_parts(recipe, alone, tmp_path):
    output = older(alone, tmp_path)
    torchrun(recipe, output, "--resume", "--parallel", "fsdp")
    whole = tmp_path / "whole.pt"
    assert consolidate.main([str(output / "last.parts"), "--output", str(whole)]) == 0
    assert_equal_runs(output, alone, load_checkpoint(whole))


@pytest.mark.slow
def test_a_killed_process_is_started_again_and_nothing_is_lost(recipe, ddp, tmp_path):
    output, marker = tmp_path / "run", tmp_path / "killed"
    process = {"process": "getpid", "kind": "SIGKILL"}
    program = SIGNALLED.format(marker=str(marker), step=10, **process)
    torchrun(recipe, output, "--resume", program=program, restarts=1)
    assert marker.exists()
    mine, its = (load_checkpoint(run / "last.pt") for run in (output, ddp))
    suite.assert_same(mine, its)


@pytest.mark.slow
def test_torchrun_told_to_end_lets_its_processes_save_the_step_under_way(recipe, alone, tmp_path):
    output = tmp_path / "run"
    process = {"process": "getppid", "kind": "SIGTERM"}
    program = SIGNALLED.format(marker=str(tmp_path / "told"), step=10, **process)
    done = torchrun(recipe, output, program=program, ends_well=False)
    assert "--resume goes on from there" in done.stderr
    # It takes torchrun a moment to pass the signal on.
    assert load_checkpoint(output / "last.pt")["step"] > 10
    assert suite.train(recipe, output, "--resume") == 0
    assert_equal_runs(output, alone)


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 3])
def test_two_processes_test_each_video_once(recipe, alone, tmp_path, size):
    """Also where one has a batch less, or where its videos are broken."""
    words = ["--data.test-list=test_broken.txt", f"--loop.test-batch-size={size}"]
    words += ["--data.test-clips=3", "--loop.views-per-pass=2"]
    assert suite.run_evaluate(alone / "last.pt", "--output", str(tmp_path / "one"), *words) == 0
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "train.evaluate", "--checkpoint", str(alone / "last.pt"), *suite.MACHINE]
    done = subprocess.run(
        [*command, "--output", str(tmp_path / "two"), *words],
        cwd=suite.ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count(" on 8 videos, 4 could not be read") == 1
    for name in ("evaluation.json", "predictions.csv"):
        assert (tmp_path / "two" / name).read_text() == (tmp_path / "one" / name).read_text()


# Each process looks into a folder of its own, as where the nodes share none.
APART = """
import os, runpy, sys
sys.argv[0] = "train"
sys.argv[sys.argv.index("--output") + 1] += os.environ["RANK"]
runpy.run_module("train", run_name="__main__", alter_sys=True)
"""


@pytest.mark.slow
def test_processes_that_do_not_see_the_same_folder_are_told_so(recipe, alone, tmp_path):
    shutil.copytree(alone, tmp_path / "run1")
    done = torchrun(recipe, tmp_path / "run", "--resume", program=APART, ends_well=False)
    # Of one of them at least: torchrun may end the other before it tells.
    assert "the processes of the run do not have the same recipe, videos, --output" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("words", [("--parallel", "ddp"), ("--parallel", "fsdp")])
def test_a_compiled_model_trains_alike(recipe, ddp, tmp_path, words):
    short = suite.changed(recipe, loop={"epochs": 4, "evaluate_every": 4})
    torchrun(short, tmp_path / "run", "--compile", *words)
    one, other = lines(tmp_path / "run", "train"), lines(ddp, "train")
    for mine, its in zip(one, other, strict=True):
        assert mine["loss"] == pytest.approx(its["loss"], rel=1e-3), mine["step"]


@pytest.fixture
def lonely_group(tmp_path):
    """A process group of this process alone."""
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield Group(torch.device("cpu"))
    dist.destroy_process_group()


@pytest.mark.parametrize("size", [0, 1, 2])
def test_gradients_are_reduced_once_a_step(lonely_group, size):
    """However many passes it has: a hook counts the buckets that DDP reduces."""
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 4 * 8 * 8, 5))
    module, reduced = DistributedDataParallel(model), []

    def hook(_, bucket):
        reduced.append(bucket.index())
        future = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    module.register_comm_hook(None, hook)
    optim = OptimSettings()
    stepper = Stepper(
        module,
        build_optimizer(model, optim),
        optim,
        LoopSettings(clips_per_pass=size),
        (3, 4, 8, 8),
        lonely_group,
    )
    clips = torch.randint(256, (5, 3, 4, 8, 8), dtype=torch.uint8)
    for _ in range(3):
        stepper.step(clips, torch.arange(5), 5, stepper.num_passes(5))
    assert reduced == [0] * 3


def test_a_process_alone_joins_nobody(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with joined("cpu") as group:
        assert group == Group(torch.device("cpu"))
        assert group.total(2, 3.5) == [2, 3.5]
        assert group.gather("a") == ["a"]
    assert not dist.is_initialized()
