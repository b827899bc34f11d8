"""What a run tells of itself, and what is forgotten where it goes on."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from train.report import Report

ROOT = Path(__file__).parents[1]


def lines(path):
    return [(line["kind"], line["step"]) for line in map(json.loads, path.read_text().splitlines())]


def test_what_came_after_the_checkpoint_is_forgotten(tmp_path):
    """The test of step 6 was reported, and the run killed before it was in a checkpoint."""
    report = Report(tmp_path, 0, 0)
    for kind, step in (("train", 3), ("test", 3), ("train", 6), ("test", 6), ("train", 7)):
        report.add(kind, step, step / 3, 0.1, {"top1": 0.5})
    with open(report.path, "a") as file:
        file.write('{"kind": "train", "st')
    Report(tmp_path, 6, 3)
    assert lines(report.path) == [("train", 3), ("test", 3), ("train", 6)]


def test_what_the_checkpoint_knows_of_is_kept(tmp_path):
    report = Report(tmp_path, 0, 0)
    for kind in ("train", "test"):
        report.add(kind, 6, 2.0, 0.1, {"top1": 0.5})
    Report(tmp_path, 6, 6)
    assert lines(report.path) == [("train", 6), ("test", 6)]


@pytest.mark.slow
def test_a_disk_that_is_full_in_the_middle_of_a_line_leaves_no_half_of_it(tmp_path):
    """In a process whose files may have so many bytes."""
    program = """
import resource, signal, sys
from pathlib import Path
from train.report import Report
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
report = Report(Path(sys.argv[1]), 0, 0)
def add(step):
    report.add("train", step, step / 3, 0.1, {"loss": 0.5, "top1": 0.5})
add(1)
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
resource.setrlimit(resource.RLIMIT_FSIZE, (report.path.stat().st_size + 10, hard))
add(2)
resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
add(3)
report.draw()
"""
    command = [sys.executable, "-c", program, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stderr == f"{tmp_path}: a report is missing: no space left on device\n" or (
        done.stderr == f"{tmp_path}: a report is missing: file too large\n"
    )
    assert lines(tmp_path / "metrics.jsonl") == [("train", 1), ("train", 3)]
    assert (tmp_path / "curves.png").exists()


def test_what_is_no_line_keeps_no_run_from_going_on(tmp_path):
    path = tmp_path / "metrics.jsonl"
    line = '{"kind": "train", "step": 1, "epoch": 0.1, "lr": 0.1, "loss": 2.0, "top1": 0.0}\n'
    path.write_text(line + '{"kind": "train{"kind": "train", "step": 2}\n' + line[:20] + "\n7\n")
    report = Report(tmp_path, 5, 5)
    assert path.read_text() == line
    report.draw()


def test_broken_videos_are_named_in_a_file(tmp_path):
    report = Report(tmp_path, 0, 0)
    report.name_broken({})
    assert not (tmp_path / "broken.txt").exists()
    report.name_broken({"b.mp4": "the file is empty", "a \udce9.mp4": "no such file"})
    expected = b"a \xe9.mp4\tno such file\nb.mp4\tthe file is empty\n"
    assert (tmp_path / "broken.txt").read_bytes() == expected


def test_only_the_first_process_writes(tmp_path):
    report = Report(tmp_path, 0, 0, is_first=False)
    report.add("train", 1, 0.1, 0.1, {})
    report.draw()
    assert not list(tmp_path.iterdir())
