"""What a run, an evaluation or a list refuses, each in one sentence, before anything is lost."""

import itertools
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import train_suite as suite
from train_suite import videos as videos
from train_suite import whole as whole

from train import loop, step
from train.checkpoint import load_checkpoint
from train.optim import OptimSettings
from train.recipe import ModelSettings, to_dict


@pytest.fixture(scope="module")
def recipe(videos):
    return suite.changed(suite.tiny_recipe(videos), loop={"epochs": 1})


def sentence(capsys):
    said = capsys.readouterr().err
    assert said.count("\n") == 1, said
    assert "Traceback" not in said
    return said.strip()


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (ModelSettings, {"drop_path_rate": 1.0}),
        (ModelSettings, {"dropout": -0.1}),
        (ModelSettings, {"init_std": 0.0}),
        (OptimSettings, {"lr": -1.0}),
        (OptimSettings, {"lr": float("nan")}),
        (OptimSettings, {"betas": (0.9, 1.0)}),
        (OptimSettings, {"warmup_epochs": -1}),
        (OptimSettings, {"clip_norm": -1.0}),
        (OptimSettings, {"label_smoothing": 1.0}),
    ],
)
def test_settings_refuse_values_no_run_could_use(kind, values):
    ((name, value),) = values.items()
    with pytest.raises(ValueError, match=rf"^\w+\.{name} must be .*, got {re.escape(str(value))}$"):
        kind(**values)


@pytest.mark.parametrize(
    ("name", "value"),
    [("area", (2.0, 3.0)), ("area", (0.5, 0.1)), ("aspect", (0.0, 1.0)), ("flip", 7.0)],
)
def test_crops_and_flips_are_checked_when_the_recipe_is_made(recipe, name, value):
    with pytest.raises(ValueError, match=rf"^data\.{name} must"):
        suite.changed(recipe, data={name: value})


def test_three_crops_need_the_short_side_of_the_crop(recipe):
    assert suite.changed(recipe, data={"test_crops": 3})
    with pytest.raises(ValueError, match=r"data\.test_short_side must be data\.crop 16"):
        suite.changed(recipe, data={"test_crops": 3, "test_short_side": 32})


def spoiled(monkeypatch, steps):
    """Makes the losses of these steps no numbers."""
    plain = step.F.cross_entropy
    counts = itertools.count()

    def cross_entropy(*arguments, **options):
        return plain(*arguments, **options) * (float("nan") if next(counts) in steps else 1.0)

    monkeypatch.setattr(step.F, "cross_entropy", cross_entropy)


def test_losses_that_stay_no_numbers_end_the_run_with_good_weights(
    recipe, tmp_path, monkeypatch, capsys
):
    recipe = suite.changed(recipe, loop={"checkpoint_every": 1, "most_skipped": 3})
    spoiled(monkeypatch, {1, 3, 4, 5})
    assert suite.train(recipe, tmp_path / "run") == 1
    assert sentence(capsys) == (
        "the gradients of 3 steps in a row, to step 6, are no finite numbers: a lower optim.lr "
        "may help; the weights are those before"
    )
    last = load_checkpoint(tmp_path / "run" / "last.pt")
    assert (last["step"], last["skipped"]) == (5, 3)
    assert all(tensor.isfinite().all() for tensor in last["model"].values())


def test_a_step_whose_loss_is_no_number_changes_nothing_and_is_counted(
    recipe, tmp_path, monkeypatch, capsys
):
    recipe = suite.changed(recipe, loop={"checkpoint_every": 1, "keep": 6})
    spoiled(monkeypatch, {2})
    assert suite.train(recipe, tmp_path / "run") == 0
    assert "gradients were no finite numbers: 1" in capsys.readouterr().out
    lines = [line for line in suite.metrics(tmp_path / "run") if line["kind"] == "train"]
    assert [line.get("skipped") for line in lines] == [None, None, 1, None, None, None]
    assert "loss" not in lines[2]
    before, after, next_one = (
        load_checkpoint(tmp_path / "run" / f"last-{number}.pt") for number in (4, 3, 2)
    )
    assert (before["step"], after["step"]) == (2, 3)
    suite.assert_same(before["model"], after["model"])
    suite.assert_same(before["optimizer"]["state"], after["optimizer"]["state"])
    assert not torch.equal(
        after["model"]["cls_head.fc_cls.bias"], next_one["model"]["cls_head.fc_cls.bias"]
    )


def test_a_run_without_readable_test_videos_is_refused(recipe, videos, tmp_path, capsys):
    (videos / "gone.txt").write_text("no such file.mp4 1\n")
    gone = suite.changed(recipe, data={"test_list": "gone.txt"})
    assert suite.train(gone, tmp_path / "run") == 1
    assert sentence(capsys) == (
        "none of the 1 test videos could be read, the first being no such file.mp4: no such file"
    )


def test_a_folder_that_cannot_be_made_is_refused(recipe, tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    assert suite.train(recipe, tmp_path / "file" / "run") == 1
    assert sentence(capsys) == f"{tmp_path / 'file' / 'run'}: not a directory"


def test_going_on_with_a_changed_list_is_refused(recipe, whole, videos, tmp_path, capsys):
    output = shutil.copytree(whole, tmp_path / "run")
    lines = (videos / "train.txt").read_text().splitlines(keepends=True)
    (videos / "fewer.txt").write_text("".join(lines[1:]))
    moved = tmp_path / "moved"
    shutil.copytree(videos, moved)
    (moved / "train.txt").write_text("".join(lines[1:]))
    assert suite.train(recipe, output, "--resume", f"--data.root={moved}") == 1
    assert "was made with another train.txt; a changed list needs a run of" in sentence(capsys)
    shutil.copy(videos / "train.txt", moved / "train.txt")
    (moved / "test.txt").write_text("".join(lines[:3]))
    assert suite.train(recipe, output, "--resume", f"--data.root={moved}") == 1
    assert "was made with another test.txt; a changed list needs a run of" in sentence(capsys)


def test_evaluating_on_other_class_names_is_refused(whole, videos, tmp_path, capsys):
    moved = shutil.copytree(videos, tmp_path / "moved")
    names = (moved / "classes.txt").read_text().splitlines()
    (moved / "classes.txt").write_text("\n".join(reversed(names)))
    assert suite.run_evaluate(whole / "last.pt", f"--data.root={moved}") == 1
    assert "these are not the class names that were trained" in sentence(capsys)


def test_evaluation_refuses_what_it_would_ignore(whole, capsys):
    with pytest.raises(SystemExit):
        suite.run_evaluate(whole / "last.pt", "--optim.lr=7")
    assert "a trained model takes fields of data alone" in capsys.readouterr().err


@pytest.mark.parametrize("count", ["0", "-7", "many"])
def test_a_top_of_no_classes_is_refused(whole, count, capsys):
    with pytest.raises(SystemExit):
        suite.run_predict(whole / "last.pt", "x.mp4", f"--top={count}")
    assert "must be an integer of at least 1" in capsys.readouterr().err


def test_no_two_steps_or_seeds_draw_the_same(recipe, tmp_path, monkeypatch):
    drawn, plain = [], torch.manual_seed

    def record(seed):
        drawn.append(seed)
        return plain(seed)

    monkeypatch.setattr(loop.torch, "manual_seed", record)
    for seed in (1, 2):
        again = suite.changed(recipe, loop={"seed": seed})
        assert suite.train(again, tmp_path / str(seed)) == 0
    # On a CPU torch reads the low 32 bits only.
    assert len(drawn) == 2 * 7
    assert len({seed % 2**32 for seed in drawn}) == len(drawn)


def is_running(process):
    """Whether a process is there and no zombie."""
    try:
        state = Path("/proc", str(process), "stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state not in "ZX"


def test_a_second_signal_ends_a_run_whose_worker_is_stuck(recipe, tmp_path):
    with_worker = suite.changed(recipe, data={"workers": 1})
    program = f"""
import json, os, time
from pathlib import Path
from train import data, loop, recipe
def stuck(*_):
    Path({str(tmp_path)!r}, f"stuck-{{os.getpid()}}").touch()
    while True:
        time.sleep(60)
data.read_train_clip = stuck
tiny = recipe.from_dict(json.loads({json.dumps(to_dict(with_worker))!r}))
loop.Run(tiny, Path({str(tmp_path / "run")!r})).train()
"""
    process = subprocess.Popen([sys.executable, "-c", program], cwd=suite.ROOT)
    try:
        deadline = time.monotonic() + 60
        while not (stuck := list(tmp_path.glob("stuck-*"))):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        time.sleep(0.5)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130
        worker = int(stuck[0].name.partition("-")[2])
        time.sleep(0.5)
        assert not is_running(worker)
    finally:
        process.kill()
