"""Training through compiled kernels: the losses of the reference, by the operators of the set."""

import re
import subprocess
import sys
from math import isfinite

import operator_suite
import pytest
import train_suite as suite
from test_declared import Calls

COMPILED = operator_suite.every("window_attention", compiled=True)


def losses(output):
    """The loss of each step that a run has reported."""
    lines = [line for line in suite.metrics(output) if line["kind"] == "train"]
    assert [line["step"] for line in lines] == [1, 2]
    assert all(isfinite(line["loss"]) for line in lines)
    return [line["loss"] for line in lines]


@COMPILED
def test_two_steps_have_the_losses_of_the_reference(run, tmp_path):
    suite.write_videos(tmp_path / "videos")
    # The second loss is that of the weights which the first step's gradients have made.
    recipe = suite.changed(
        suite.tiny_recipe(tmp_path / "videos"),
        model={"drop_path_rate": 0.0, "dropout": 0.0},
        optim={"warmup_epochs": 0},
        loop={"epochs": 1, "batch_size": 8},
    )
    assert suite.train(recipe, tmp_path / "plain", "--kernels", "reference") == 0
    with Calls(run.kernels) as calls:
        words = ["--kernels", run.kernels, "--device", run.device]
        assert suite.train(recipe, tmp_path / "run", *words) == 0
    plain, own = losses(tmp_path / "plain"), losses(tmp_path / "run")
    assert own == pytest.approx(plain, rel=1e-4)
    assert abs(plain[1] - plain[0]) > 1e-2 * plain[0]
    # Two steps, four blocks.
    for operator in ("window_attention", "residual_norm"):
        assert calls.names.count(f"{operator}_backward") == 8, operator
        assert calls.names.count(operator) > 8, operator
    assert calls.names.count("patch_merging_backward") == 2


@COMPILED
@pytest.mark.slow
def test_two_steps_of_the_demo(run, tmp_path):
    """As `python -m train`, in processes of their own."""
    suite.write_videos(tmp_path / "videos")
    for kernels, device in (("reference", "cpu"), run):
        command = ["-m", "train", "--recipe", "demo", "--kernels", kernels, "--device", device]
        command += ["--output", str(tmp_path / kernels), f"--data.root={tmp_path / 'videos'}"]
        command += ["--loop.epochs=1", "--loop.batch_size=8", "--loop.report_every=1"]
        done = subprocess.run(
            [sys.executable, *command], cwd=suite.ROOT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        named = dict(re.findall(r"^(\w+): (\w+) \(asked for by name\)$", done.stdout, re.M))
        assert set(named.values()) == {kernels}, done.stdout
        assert set(named) >= {"window_attention", "patch_merging", "residual_norm"}
    plain, own = (losses(tmp_path / kernels) for kernels in ("reference", run.kernels))
    assert own[0] == pytest.approx(plain[0], rel=1e-4)
    assert own[1] == pytest.approx(plain[1], rel=1e-2)
