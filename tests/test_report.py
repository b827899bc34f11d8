"""What a run tells of itself, and what is forgotten where it goes on."""

import json

from train.report import Report


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


def test_only_the_first_process_writes(tmp_path):
    report = Report(tmp_path, 0, 0, is_first=False)
    report.add("train", 1, 0.1, 0.1, {})
    report.draw()
    assert not list(tmp_path.iterdir())
