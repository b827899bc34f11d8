"""What goes wrong during a run: what the user reads, and that no more than a step is lost.

The table of docs/training.md; what is refused beforehand is in test_train_refusals.py.
"""

import errno
import os
import shutil
import signal
import subprocess
import time

import pytest
import torch
import train_suite as suite
from train_suite import prompt as prompt
from train_suite import recipe as recipe
from train_suite import videos as videos
from train_suite import whole as whole

from train import data
from train.checkpoint import load_checkpoint, put
from train.video import VideoError


def assert_equal_ends(output, whole):
    suite.assert_same(load_checkpoint(output / "last.pt"), load_checkpoint(whole / "last.pt"))


@pytest.fixture
def mounted(tmp_path):
    """A function of options that mounts a file system of its own, in memory."""
    folder = tmp_path / "mounted"
    folder.mkdir()

    def mount(options):
        is_again = ["-o", f"remount,{options}"] if folder.is_mount() else ["-o", options]
        command = ["mount", "-t", "tmpfs", *is_again, "tmpfs", str(folder)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            pytest.skip("there is no mount")
        if done.returncode:
            pytest.skip(f"nothing can be mounted here: {done.stderr.strip()}")
        return folder

    yield mount
    if folder.is_mount():
        subprocess.run(["umount", str(folder)], check=True)


FULL = "could not be saved: no space left on device"


def test_a_full_disk_loses_nothing_that_was_saved(recipe, whole, mounted, capsys):
    """Room for one checkpoint and a half: the second cannot be written, nor any after it."""
    size = (whole / "last.pt").stat().st_size
    output = mounted(f"size={int(1.6 * size)}") / "run"
    assert suite.train(recipe, output) == 1
    said = capsys.readouterr().err
    assert f"{output / 'last.pt'}: step 6 {FULL}; the run goes on\n" in said
    assert said.endswith(f"step 12 {FULL}; the ones before are there to go on from\n")
    assert load_checkpoint(output / "last.pt")["step"] == 4
    mounted(f"size={10 * size}")
    assert suite.train(recipe, output, "--resume") == 0
    assert_equal_ends(output, whole)


def fill(monkeypatch, is_full):
    """A disk that is full for the checkpoints whose number `is_full` picks."""
    plain, calls = os.fsync, []

    def fsync(file):
        if os.readlink(f"/proc/self/fd/{file}").endswith("last.pt.partial"):
            calls.append(file)
            if is_full(len(calls)):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        plain(file)

    monkeypatch.setattr(os, "fsync", fsync)


def test_a_disk_that_is_full_for_a_while_costs_a_checkpoint(
    recipe, whole, tmp_path, monkeypatch, capsys
):
    fill(monkeypatch, lambda number: number == 2)
    assert suite.train(recipe, tmp_path / "run") == 0
    assert capsys.readouterr().err.count(f"{FULL}; the run goes on") == 1
    assert_equal_ends(tmp_path / "run", whole)


def test_a_disk_that_stays_full_is_the_end_of_the_run_and_not_of_its_checkpoint(
    recipe, tmp_path, monkeypatch, capsys
):
    fill(monkeypatch, lambda number: number > 1)
    assert suite.train(recipe, tmp_path / "run") == 1
    assert capsys.readouterr().err.endswith(
        f"step 12 {FULL}; the ones before are there to go on from\n"
    )
    assert load_checkpoint(tmp_path / "run" / "last.pt")["step"] == 4


def test_a_folder_that_cannot_be_written_to_is_refused_at_once(recipe, mounted, capsys):
    output = mounted("ro") / "run"
    assert suite.train(recipe, output) == 1
    assert capsys.readouterr().err == f"{output}: read-only file system\n"


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_in_place_of_a_damaged_checkpoint_the_one_before_is_gone_on_from(
    recipe, whole, tmp_path, capsys, share
):
    output = shutil.copytree(whole, tmp_path / "run")
    last = output / "last.pt"
    last.write_bytes(last.read_bytes()[: int(share * last.stat().st_size)])
    assert suite.train(recipe, output, "--resume") == 0
    said = capsys.readouterr()
    assert said.err.startswith(f"cannot load {last}: not a checkpoint, or damaged")
    assert said.err.splitlines()[0].endswith("; going on from last-1.pt")
    assert (output / "damaged-last.pt").exists()
    assert "step 8 of 12" in said.out
    assert_equal_ends(output, whole)


@pytest.mark.parametrize("died_after", range(3))
def test_a_run_killed_between_two_names_goes_on(recipe, whole, tmp_path, monkeypatch, died_after):
    """The oldest checkpoint leaves, the last takes its place, the new one that of the last."""
    output = shutil.copytree(whole, tmp_path / "run")
    new, calls, plain = output / "new-last.pt", [], os.replace
    shutil.copy(output / "last.pt", new)

    def replace(one, other):
        if len(calls) == died_after:
            raise KeyboardInterrupt
        calls.append(other)
        plain(one, other)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(KeyboardInterrupt):
        put(new, output / "last.pt", 2)
    monkeypatch.setattr(os, "replace", plain)
    assert suite.train(recipe, output, "--resume") == 0
    assert_equal_ends(output, whole)


def test_a_checkpoint_written_half_is_no_checkpoint(recipe, whole, tmp_path):
    output = shutil.copytree(whole, tmp_path / "run")
    (output / "last.pt.partial").write_bytes(b"half")
    (output / "last.pt").unlink()
    assert suite.train(recipe, output, "--resume") == 0
    assert_equal_ends(output, whole)


@pytest.mark.usefixtures("prompt")
def test_a_killed_data_worker_is_replaced_and_nothing_is_read_twice(
    recipe, whole, tmp_path, monkeypatch, capsys
):
    plain, marker = data.read_train_clip, tmp_path / "killed"

    def read(video, *arguments):
        if not marker.exists() and video.path.endswith("00001.mp4"):
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return plain(video, *arguments)

    monkeypatch.setattr(data, "read_train_clip", read)
    with_workers = suite.changed(recipe, data={"workers": 2})
    assert suite.train(with_workers, tmp_path / "run") == 0
    assert marker.exists()
    assert "; reading begins again where it was\n" in capsys.readouterr().err
    mine, its = (load_checkpoint(run / "last.pt") for run in (tmp_path / "run", whole))
    for name in ("model", "optimizer", "step", "best_top1"):
        suite.assert_same(mine[name], its[name])


@pytest.mark.usefixtures("prompt")
def test_a_data_worker_killed_in_a_test_is_replaced_too(
    recipe, whole, tmp_path, monkeypatch, capsys
):
    plain, marker = data.read_test_clips, tmp_path / "killed"

    def read(path, *arguments):
        if not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return plain(path, *arguments)

    monkeypatch.setattr(data, "read_test_clips", read)
    with_workers = suite.changed(recipe, data={"workers": 2})
    assert suite.train(with_workers, tmp_path / "run") == 0
    assert "; reading begins again where it was\n" in capsys.readouterr().err
    tests = [
        [line["top1"] for line in suite.metrics(run) if line["kind"] == "test"]
        for run in (tmp_path / "run", whole)
    ]
    assert tests[0] == tests[1]


def test_a_signal_during_a_test_leaves_it_for_later(recipe, whole, tmp_path, monkeypatch, capsys):
    plain, seen = data.read_test_clips, []

    def read(*arguments):
        seen.append(arguments)
        if len(seen) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(*arguments)

    monkeypatch.setattr(data, "read_test_clips", read)
    assert suite.train(recipe, tmp_path / "run") == 0
    assert capsys.readouterr().err.endswith("stopped at step 6; --resume goes on from there\n")
    assert len(seen) < 8
    assert suite.train(recipe, tmp_path / "run", "--resume") == 0
    assert_equal_ends(tmp_path / "run", whole)
    steps = [line["step"] for line in suite.metrics(tmp_path / "run") if line["kind"] == "test"]
    assert steps == [6, 12]


@pytest.mark.usefixtures("prompt")
@pytest.mark.parametrize(
    "name",
    ["train/left/00001.mp4", pytest.param("test/up/00000.mp4", marks=pytest.mark.slow)],
)
def test_a_video_that_hangs_its_reader_is_broken(recipe, tmp_path, monkeypatch, capsys, name):
    """And only that one: the others that were being read meanwhile are read."""
    plain = data.open_listed

    def hang(listed, settings):
        while listed.name == name and torch.utils.data.get_worker_info():
            time.sleep(60)
        return plain(listed, settings)

    monkeypatch.setattr(data, "open_listed", hang)
    slow = suite.changed(recipe, data={"workers": 2, "patience": 3}, loop={"epochs": 1})
    assert suite.train(slow, tmp_path / "run") == 0
    out, err = capsys.readouterr()
    assert "DataLoader worker is silent for 3 seconds; reading begins again where it was\n" in err
    said = f"{name}: it took longer to read than data.patience\n"
    assert f"videos that could not be read: 1\n  {said}" in out


def test_videos_that_are_gone_end_the_run_before_it_begins(recipe, videos, tmp_path, capsys):
    """As where the disk with the videos is not there, or the list is one of folders of frames."""
    (videos / "gone.txt").write_text("clips/a 120 1\nclips/b 90 0\n")
    gone = suite.changed(recipe, data={"train_list": "gone.txt"})
    assert suite.train(gone, tmp_path / "run") == 1
    assert capsys.readouterr().err.splitlines()[-1] == (
        "none of 2 training videos can be opened, the first being clips/a 120: no such file; "
        "of folders of frames --data.layout=frames reads the list"
    )
    assert not list((tmp_path / "run").glob("*.pt"))


def test_videos_that_go_in_the_middle_end_the_run(recipe, videos, tmp_path, monkeypatch, capsys):
    plain = data.open_listed

    def gone(listed, settings):
        if (tmp_path / "run" / "last.pt").exists():
            raise VideoError(listed.name, "stale file handle")
        return plain(listed, settings)

    monkeypatch.setattr(data, "open_listed", gone)
    some = suite.changed(recipe, loop={"most_skipped": 2})
    assert suite.train(some, tmp_path / "run") == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("of 2 steps in a row, to step 6, no video could be read, the first")
    assert load_checkpoint(tmp_path / "run" / "last.pt")["step"] == 4


def test_a_class_without_videos_is_named(recipe, videos, tmp_path, capsys):
    lines = (videos / "train.txt").read_text().splitlines(keepends=True)
    (videos / "some.txt").write_text("".join(line for line in lines if line.split()[-1] != "3"))
    missing = (videos / "classes.txt").read_text().split()[3]
    some = suite.changed(recipe, data={"train_list": "some.txt"}, loop={"epochs": 1})
    assert suite.train(some, tmp_path / "run") == 0
    assert f"no training video is of class {missing}\n" in capsys.readouterr().out


def test_a_label_out_of_range_is_named_with_its_line(recipe, videos, tmp_path, capsys):
    lines = (videos / "train.txt").read_text().splitlines()
    (videos / "wrong.txt").write_text("\n".join([*lines, "train/left/00000.mp4 8"]) + "\n")
    wrong = suite.changed(recipe, data={"train_list": "wrong.txt"})
    assert suite.train(wrong, tmp_path / "run") == 1
    assert capsys.readouterr().err == (f"{videos / 'wrong.txt'}:17: label must be below 8, got 8\n")
    assert not (tmp_path / "run").exists()


def test_tensorboard_and_the_profiler_write_beside_the_reports(recipe, tmp_path):
    pytest.importorskip("tensorboard")
    words = ("--tensorboard", "--profile", "2")
    assert suite.train(suite.changed(recipe, loop={"epochs": 1}), tmp_path / "run", *words) == 0
    (events,) = (tmp_path / "run" / "tensorboard").iterdir()
    assert events.stat().st_size > 100
    assert '"traceEvents"' in (tmp_path / "run" / "trace.json").read_text()
