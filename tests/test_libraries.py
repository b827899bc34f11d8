"""bench/libraries.py: C++ libraries built before a stage on a GPU, by stand-ins for setup.py."""

import json
import os
import re
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", minversion="3.6")

from bench import libraries, on_gpu, report
from bench.harness import Rows
from bench.jobs import Job
from bench.stages import Context, Part, Stage
from videoswin_kernels import extension

ROOT = Path(__file__).parents[1]
HEADER = {"card": "a card", "commit": "0123", "date": "today"}
ABSENT = ("the C++ library is not built", {})


@pytest.fixture
def builds(tmp_path, monkeypatch):
    """builds(program, *states): the report and the rows; states are the libraries' when asked."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))

    def build(program, *states, seconds=60):
        answers = iter(states)
        monkeypatch.setattr(libraries, "state", lambda: next(answers))
        job = Job("build", [sys.executable, "-c", program])
        monkeypatch.setattr(libraries, "job", lambda _: job)
        context = Context(tmp_path, "cuda", time.monotonic() + seconds, 1, ())
        context.logs.mkdir(exist_ok=True)
        told = libraries.build(context, Rows(context.rows, HEADER))
        assert next(answers, None) is None
        text = context.rows.read_text() if context.rows.exists() else ""
        return told, [json.loads(line) for line in text.splitlines()]

    return build


def test_libraries_that_are_there_are_not_built(builds):
    told, rows = builds("1 / 0", (None, {"cuda": "13.0"}))
    assert rows == []
    assert (told.ran, told.status, told.skipped) == (["build: the libraries are there"], 0, [])


def test_libraries_are_built_first_and_the_row_says_what_they_are(builds, tmp_path):
    facts = {"cuda": "13.0", "architectures": ["90a-real"]}
    told, rows = builds("print('[1/2] Building')", ABSENT, (None, facts))
    (row,) = rows
    assert (row["bench"], row["facts"], row["seconds"] >= 0) == ("build", facts, True)
    assert {*row} == {*HEADER, "bench", "facts", "seconds"}
    assert (told.failures, told.skipped, told.left) == ([], [], "")
    assert re.fullmatch(r"build: ended, \d+\.\d s", told.ran[0])
    assert (tmp_path / "logs" / "build.log").read_text() == "[1/2] Building\n"


def refuses(status):
    """A program that ends as setup.py does where it refuses."""
    return f"import sys; print('said'); print('videoswin_kernels: it is so'); sys.exit({status})"


def test_a_build_that_fails_has_a_row_that_failed(builds):
    told, rows = builds(refuses(1), ABSENT)
    assert rows[0]["failed"] == "exit status 1: it is so"
    ((name, text),) = told.failures
    assert name == "build"
    assert "said" in text
    assert told.status == 1


def test_a_missing_tool_is_a_reason(builds):
    told, rows = builds(refuses(libraries.TOOL_MISSING), ABSENT)
    assert rows[0]["reason"] == "it is so"
    assert "failed" not in rows[0]
    assert (told.skipped, told.status) == (["it is so"], 0)


def test_a_build_without_cuda_kernels_has_failed(builds):
    why = "the C++ library was built without CUDA: no nvcc"
    told, rows = builds("pass", ABSENT, (why, {"cuda": None}))
    assert (rows[0]["failed"], rows[0]["facts"]) == (why, {"cuda": None})
    assert told.status == 1


def test_a_build_that_is_cut_off_is_left(builds):
    told, rows = builds("import time; time.sleep(60)", ABSENT, seconds=1)
    assert rows == []
    assert (told.left, told.status) == ("the build is left", 3)


def test_a_build_is_of_this_cards_architecture_alone(monkeypatch):
    monkeypatch.delenv("VIDEOSWIN_ARCHITECTURES", raising=False)
    for capability, architecture in (((9, 0), "90a-real"), ((8, 6), "86-real")):
        job = libraries.job(capability)
        assert job.environment["VIDEOSWIN_ARCHITECTURES"] == architecture
        assert (ROOT / job.command[1]).is_file()
        assert job.environment["PATH"].startswith(os.environ["PATH"])
    # setup.py says the same of a tool that is missing, and of how it can be told.
    text = (ROOT / "setup.py").read_text(encoding="utf-8")
    assert f"MISSING = {libraries.TOOL_MISSING}\n" in text
    assert "VIDEOSWIN_ARCHITECTURES" in text
    monkeypatch.setenv("VIDEOSWIN_ARCHITECTURES", "80-virtual")
    assert libraries.job((9, 0)).environment["VIDEOSWIN_ARCHITECTURES"] == "80-virtual"


def test_the_libraries_are_asked_in_a_process_of_their_own():
    reasons = [extension.why_not(name) for name in ("_ops", "_emulated")]
    why, facts = libraries.state()
    assert why == next(filter(None, reasons), None)
    assert facts == extension.build_facts("_ops")


def test_a_library_that_kills_who_loads_it_is_built_again(monkeypatch):
    monkeypatch.setattr(libraries, "ASK", "import os; print('{}'); os.abort()")
    assert libraries.state() == ("asking the C++ libraries ended with status -6", {})


@pytest.mark.parametrize("stage", ["smoke", "suite", "sanitize", "model"])
@pytest.mark.parametrize("how", ["there", "failures", "skipped", "left"])
def test_a_stage_goes_on_without_what_could_not_be_built(stage, how, tmp_path, monkeypatch):
    built = report.Report("build", ["build: x"], [], [], "", "")
    if how != "there":
        said = {"failures": [("build", "why")], "skipped": ["why"], "left": "the build is left"}
        built = built._replace(**{how: said[how]})

    def listed(context):
        rows = [{"without": " ".join(context.without)}]
        part = Part(Job("one", ["true"]), {"name": "one"}, lambda done: rows)
        return Stage([part], 1, lambda rows: report.tabulate(rows, ("name", "without")))

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(on_gpu, "header", lambda device: HEADER)
    monkeypatch.setattr(libraries, "build", lambda context, rows: built)
    monkeypatch.setitem(on_gpu.STAGES, stage, listed)
    before = signal.getsignal(signal.SIGTERM)
    try:
        status = on_gpu.main([stage, str(tmp_path)])
    finally:
        signal.signal(signal.SIGTERM, before)
    text = (tmp_path / "report.txt").read_text()
    (row,) = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    is_built = stage != "model"
    assert row["without"] == ("cuda" if is_built and how != "there" else "")
    assert ("build: x" in text) == is_built
    if is_built:
        assert status == {"there": 0, "failures": 1, "skipped": 0, "left": 3}[how]
        assert ("1 failed: build" in text) == (how == "failures")
        assert ("1 x why" in text) == (how == "skipped")
        assert ("the build is left" in text.splitlines()[0]) == (how == "left")
