"""Training runs: what they leave, and going on after an interruption as if there had been none."""

import json
import os
import signal
from dataclasses import asdict
from functools import partial
from math import isfinite
from pathlib import Path

import pytest
import torch
import train_suite as suite
from train_suite import recipe as recipe
from train_suite import videos as videos
from train_suite import whole as whole

from train.checkpoint import load_checkpoint
from train.loop import Run
from train.recipe import from_dict

TIMES = ("clips_per_second", "data_wait")


def assert_equal_ends(output: Path, whole: Path) -> None:
    """Both runs have the same model, optimiser, counters and reports, bit for bit."""
    for name in ("last.pt", "best.pt"):
        suite.assert_same(load_checkpoint(output / name), load_checkpoint(whole / name))
    reports = [
        [{key: value for key, value in line.items() if key not in TIMES} for line in lines]
        for lines in (suite.metrics(output), suite.metrics(whole))
    ]
    assert reports[0] == reports[1]


def interrupted(recipe, output: Path, step: int, monkeypatch, kind=signal.SIGINT) -> int:
    """Train until, after so many steps, the process gets a signal: by default that of Ctrl-C."""
    plain = Run._step

    def step_and_signal(run, *arguments):
        if run.step == step:
            os.kill(os.getpid(), kind)
        return plain(run, *arguments)

    monkeypatch.setattr(Run, "_step", step_and_signal)
    status = suite.train(recipe, output)
    monkeypatch.setattr(Run, "_step", plain)
    return status


def test_a_run_leaves_its_checkpoints_reports_curves_and_recipe(whole, recipe):
    assert {path.name for path in whole.iterdir()} == {
        *("last.pt", "last-1.pt", "best.pt", "metrics.jsonl", "curves.png", "recipe.json"),
    }
    assert from_dict(json.loads((whole / "recipe.json").read_text())) == recipe
    assert (whole / "curves.png").read_bytes().startswith(b"\x89PNG")
    last, best = load_checkpoint(whole / "last.pt"), load_checkpoint(whole / "best.pt")
    assert last["step"] == 12
    assert load_checkpoint(whole / "last-1.pt")["step"] == 8
    assert best["step"] in (6, 12)
    tests = [line["top1"] for line in suite.metrics(whole) if line["kind"] == "test"]
    assert last["best_top1"] == best["best_top1"] == max(tests)
    assert all(tensor.isfinite().all() for tensor in last["model"].values())


def test_the_recipe_is_printed_with_all_that_was_set(recipe, tmp_path, capsys):
    words = ["--optim.lr=0.25", "--loop.epochs=1"]
    assert suite.train(recipe, tmp_path / "run", *words) == 0
    said = capsys.readouterr().out.splitlines()
    printed = [line for line in said if line.startswith(("model: ", "data: ", "optim: ", "loop: "))]
    assert len(printed) == 4
    assert printed[2].startswith("optim: lr 0.25, backbone_lr 0.1, ")
    assert "name swin_nano, " in printed[0]


def test_every_step_reports_a_finite_loss_and_its_learning_rate(whole):
    lines = [line for line in suite.metrics(whole) if line["kind"] == "train"]
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert all(isfinite(line["loss"]) and 0 <= line["top1"] <= 1 for line in lines)
    assert [line["clips"] for line in lines] == [3, 3, 3, 3, 3, 1] * 2
    warm_up = [1e-3 * (0.1 + 0.9 * step / 6) for step in range(6)]
    assert [line["lr"] for line in lines] == pytest.approx([*warm_up, *[0.5e-3] * 6])
    tests = [line for line in suite.metrics(whole) if line["kind"] == "test"]
    assert [(line["step"], line["videos"]) for line in tests] == [(6, 8), (12, 8)]


def test_every_parameter_was_trained(whole, recipe):
    torch.manual_seed(recipe.loop.seed)
    fresh = Run(recipe, whole.parent / "unused").model.state_dict()
    trained = load_checkpoint(whole / "last.pt")["model"]
    assert fresh.keys() == trained.keys()
    assert not [name for name in fresh if torch.equal(fresh[name], trained[name])]


def test_the_seed_decides_the_run_and_another_gives_another(whole, recipe, tmp_path):
    torch.manual_seed(123)
    assert suite.train(recipe, tmp_path / "again") == 0
    assert_equal_ends(tmp_path / "again", whole)
    assert suite.train(suite.changed(recipe, loop={"seed": 6}), tmp_path / "other") == 0
    one, other = suite.metrics(whole)[0], suite.metrics(tmp_path / "other")[0]
    assert one["loss"] != other["loss"]


@pytest.mark.parametrize("step", [0, 4, 5, 6, 9])
def test_a_run_stopped_by_ctrl_c_goes_on_as_if_it_had_not_been(
    whole, recipe, tmp_path, monkeypatch, capsys, step
):
    output = tmp_path / "run"
    assert interrupted(recipe, output, step, monkeypatch) == 0
    assert capsys.readouterr().err.endswith(
        f"stopped at step {step + 1}; --resume goes on from there\n"
    )
    # The step under way was ended, and kept.
    assert load_checkpoint(output / "last.pt")["step"] == step + 1
    assert suite.train(recipe, output, "--resume") == 0
    assert_equal_ends(output, whole)


@pytest.mark.slow
def test_a_run_in_float16_goes_on_with_the_scale_of_its_loss(recipe, tmp_path, monkeypatch):
    half = suite.changed(recipe, loop={"precision": "float16", "most_skipped": 100})
    # It begins so high that gradients overflow, and is another at every step.
    plain = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", partial(plain, init_scale=2.0**24))
    whole, output = tmp_path / "whole", tmp_path / "run"
    assert suite.train(half, whole) == 0
    assert interrupted(half, output, 2, monkeypatch) == 0
    scales = [load_checkpoint(run / "last.pt")["scaler"]["scale"] for run in (output, whole)]
    assert 2.0**24 > scales[0] > scales[1]
    assert suite.train(half, output, "--resume") == 0
    assert_equal_ends(output, whole)


def test_a_run_told_to_terminate_leaves_a_checkpoint_too(recipe, tmp_path, monkeypatch):
    assert interrupted(recipe, tmp_path / "run", 1, monkeypatch, signal.SIGTERM) == 0
    assert load_checkpoint(tmp_path / "run" / "last.pt")["step"] == 2


def test_the_last_epoch_is_tested_whether_due_or_not(recipe, tmp_path):
    rarely = suite.changed(recipe, loop={"evaluate_every": 5})
    assert suite.train(rarely, tmp_path / "run") == 0
    lines = suite.metrics(tmp_path / "run")
    assert [line["step"] for line in lines if line["kind"] == "test"] == [12]


def test_signals_are_handled_as_before_once_the_run_is_over(recipe, tmp_path):
    def own(*_):
        raise AssertionError("nobody has sent a signal")

    # Not what a process begins with: a shell may have it ignore interrupts.
    before = signal.signal(signal.SIGINT, own)
    try:
        assert suite.train(recipe, tmp_path / "run") == 0
        assert signal.getsignal(signal.SIGINT) is own
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_killed_run_goes_on_as_if_it_had_not_been(whole, recipe, tmp_path):
    """As `python -m train`, and killed with two steps reported since the last checkpoint."""
    output = tmp_path / "run"
    done = suite.signalled_train(recipe, output, 10, "SIGKILL", "--allocator", "pooled")
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert "allocator: pooled" in done.stdout.splitlines()[0]
    assert load_checkpoint(output / "last.pt")["step"] == 8
    assert suite.metrics(output)[-1]["step"] == 10
    assert suite.train(recipe, output, "--resume") == 0
    assert_equal_ends(output, whole)


def test_ctrl_c_in_a_terminal_reaches_the_workers_and_the_run_still_ends_well(
    whole, recipe, tmp_path
):
    """A terminal signals every process of the group; the number of workers changes nothing."""
    output = tmp_path / "run"
    with_workers = suite.changed(recipe, data={"workers": 2})
    done = suite.signalled_train(with_workers, output, 7, "SIGINT", "--allocator", "default")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == "allocator: default"
    assert done.stderr == (
        "\nstopping after this step; once more to stop at once\n"
        "stopped at step 8; --resume goes on from there\n"
    )
    assert suite.train(with_workers, output, "--resume") == 0
    last, expected = (load_checkpoint(run / "last.pt") for run in (output, whole))
    suite.assert_same(last["model"], expected["model"])
    suite.assert_same(last["optimizer"], expected["optimizer"])


@pytest.mark.parametrize("lost", [b"", b'{"kind": "train", "step": 1, "epo'])
def test_reports_of_a_run_killed_before_its_first_checkpoint_are_forgotten(
    whole, recipe, tmp_path, lost
):
    output = tmp_path / "run"
    output.mkdir()
    line = {**suite.metrics(whole)[0], "loss": 99.0}
    (output / "metrics.jsonl").write_bytes(json.dumps(line).encode() + b"\n" + lost)
    assert suite.train(recipe, output) == 0
    assert_equal_ends(output, whole)


def test_a_run_killed_before_its_first_report_goes_on(whole, recipe, tmp_path, monkeypatch):
    output = tmp_path / "run"
    quiet = suite.changed(recipe, loop={"report_every": 6})
    assert interrupted(quiet, output, 2, monkeypatch) == 0
    assert not (output / "metrics.jsonl").exists()
    assert suite.train(quiet, output, "--resume") == 0
    suite.assert_same(
        load_checkpoint(output / "last.pt")["model"], load_checkpoint(whole / "last.pt")["model"]
    )


def test_resuming_a_finished_run_changes_nothing(recipe, tmp_path, capsys):
    output = tmp_path / "run"
    short = suite.changed(recipe, loop={"epochs": 1})
    assert suite.train(short, output) == 0
    before = {path.name: path.read_bytes() for path in output.iterdir()}
    assert suite.train(short, output, "--resume") == 0
    assert {path.name: path.read_bytes() for path in output.iterdir()} == before
    assert "step 6 of 6" in capsys.readouterr().out


def test_a_first_accuracy_of_zero_is_the_best_so_far(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr("train.loop.Evaluation.top1", 0.0)
    assert suite.train(suite.changed(recipe, loop={"epochs": 1}), tmp_path / "run") == 0
    assert load_checkpoint(tmp_path / "run" / "best.pt")["best_top1"] == 0


def test_the_best_so_far_is_remembered_over_an_interruption(recipe, tmp_path, monkeypatch):
    output = tmp_path / "run"
    monkeypatch.setattr("train.loop.Evaluation.top1", 0.9)
    assert interrupted(recipe, output, 7, monkeypatch) == 0
    monkeypatch.setattr("train.loop.Evaluation.top1", 0.1)
    assert suite.train(recipe, output, "--resume") == 0
    best, last = load_checkpoint(output / "best.pt"), load_checkpoint(output / "last.pt")
    assert (best["step"], last["step"]) == (6, 12)
    assert best["best_top1"] == last["best_top1"] == 0.9


def test_the_settings_of_the_model_reach_it(recipe, tmp_path):
    numbers = {"drop_path_rate": 0.3, "dropout": 0.4, "init_std": 0.1, "frozen_stages": 1}
    settings = {**numbers, "use_checkpoint": True}
    model = Run(suite.changed(recipe, model=settings), tmp_path / "unused").model
    assert model.backbone.layers[-1].blocks[-1].drop_path.rate == pytest.approx(0.3)
    assert model.cls_head.dropout.p == 0.4
    std = model.backbone.layers[0].blocks[0].mlp.fc1.weight.std().item()
    assert std == pytest.approx(0.1, rel=0.1)
    assert model.backbone.frozen_stages == 1
    assert model.backbone.use_checkpoint


def test_starting_over_an_existing_run_is_refused(whole, recipe, capsys):
    before = {path.name: path.read_bytes() for path in whole.iterdir()}
    assert suite.train(recipe, whole) == 1
    said = capsys.readouterr().err
    assert said == (
        f"{whole} already holds a run; --resume continues it, another --output starts a new one\n"
    )
    assert {path.name: path.read_bytes() for path in whole.iterdir()} == before


def test_resuming_with_another_recipe_names_what_changed(whole, recipe, capsys):
    words = ["--resume", "--optim.lr=0.5", "--data.interval", "5"]
    assert suite.train(recipe, whole, *words) == 1
    assert capsys.readouterr().err == (
        f"{whole / 'last.pt'} was made with another recipe: "
        "data.interval: 1 -> 5; optim.lr: 0.001 -> 0.5\n"
    )


def test_frozen_stages_and_checkpointing_come_from_the_recipe(recipe, tmp_path):
    model = {"drop_path_rate": 0.0, "dropout": 0.0}
    plain, recomputed, frozen = (
        suite.changed(recipe, model={**model, **changes}, loop={"epochs": 1})
        for changes in ({}, {"use_checkpoint": True}, {"frozen_stages": 1})
    )
    ends = []
    for number, each in enumerate((plain, recomputed, frozen)):
        assert suite.train(each, tmp_path / str(number)) == 0
        ends.append(load_checkpoint(tmp_path / str(number) / "last.pt")["model"])
    run = Run(recomputed, tmp_path / "unused")
    assert run.model.backbone.use_checkpoint
    suite.assert_same(ends[0], ends[1])
    # The run's own weights before its first step.
    fresh = run.model.state_dict()
    still = {name for name in fresh if torch.equal(fresh[name], ends[2][name])}
    assert still == {
        name for name in fresh if name.startswith(("backbone.patch_embed.", "backbone.layers.0."))
    }
    assert asdict(from_dict(load_checkpoint(tmp_path / "2" / "last.pt")["recipe"])) == asdict(
        frozen
    )


def test_a_backbone_rate_of_zero_trains_the_head_and_the_tables(recipe, tmp_path):
    head_only = suite.changed(
        recipe, optim={"backbone_lr": 0.0, "warmup_epochs": 0}, loop={"epochs": 1}
    )
    fresh = Run(head_only, tmp_path / "unused").model.state_dict()
    assert suite.train(head_only, tmp_path / "run") == 0
    end = load_checkpoint(tmp_path / "run" / "last.pt")["model"]
    moved = {name for name in fresh if not torch.equal(fresh[name], end[name])}
    assert moved == {name for name in fresh if "bias_table" in name or "cls_head" in name}
    assert {line["lr"] for line in suite.metrics(tmp_path / "run")} == {1e-3}
