"""`python -m train.speed`: a line for each kernel set, or why there is none; no number judged."""

import re
import sys

import pytest
import train_suite as suite

from train import speed
from train.recipes import RECIPES
from videoswin_kernels import extension
from videoswin_kernels.selection import UnavailableError

REFERENCE = r"reference: \d+(\.\d+)? clips/s"


@pytest.fixture
def lines(monkeypatch, tmp_path, capsys):
    """What the command prints of a small recipe, line by line; it has no videos."""
    monkeypatch.setitem(RECIPES, "tiny", suite.tiny_recipe(tmp_path))

    def run(*words):
        with suite.one_thread():
            assert speed.main(["--recipe", "tiny", "--steps", "2", *suite.MACHINE, *words]) == 0
        return capsys.readouterr().out.splitlines()

    return run


def test_fused_and_reference_have_a_line_each(lines):
    reason = extension.why_not("_ops_cpu")
    first = (
        rf"fused: .+ cannot run: .*{re.escape(reason)}.*"
        if reason
        else (r"fused: \d+(\.\d+)? clips/s \(cpu for 3 operators\)")
    )
    said = lines()
    assert len(said) == 2
    assert re.fullmatch(first, said[0])
    assert re.fullmatch(REFERENCE, said[1])


def test_the_reference_alone_has_one_line(lines):
    (said,) = lines("--kernels", "reference", "--loop.batch-size=2")
    assert re.fullmatch(REFERENCE, said)


def test_kernels_that_cannot_run_say_why_and_the_others_are_timed(lines, monkeypatch):
    def explain(model):
        if model.backbone.kernels == "fused":
            raise UnavailableError("window_attention: kernels='fused' cannot run: no library")
        return plain(model)

    plain = speed.explain
    monkeypatch.setattr(speed, "explain", explain)
    said = lines()
    assert said[0] == "fused: window_attention: kernels='fused' cannot run: no library"
    assert re.fullmatch(REFERENCE, said[1])


def test_they_are_timed_in_turn_and_the_first_steps_count_for_nothing(lines, monkeypatch):
    calls = []

    def build_step(recipe, kernels, device):
        return lambda: calls.append(kernels), "cpu for 1 operator"

    def seconds_of(step, device):
        step()
        # A step of 3 clips; the slow one is not the median.
        return 0.03 if len(calls) < 7 else 9.0

    monkeypatch.setattr(speed, "build_step", build_step)
    monkeypatch.setattr(speed, "seconds_of", seconds_of)
    assert lines("--steps", "3") == [
        "fused: 100 clips/s (cpu for 1 operator)",
        "reference: 100 clips/s",
    ]
    assert calls == ["fused", "reference"] * 4
    # A slow machine has one of each.
    calls.clear()
    monkeypatch.setattr(speed, "MOST_SECONDS", 0.0)
    lines("--steps", "3")
    assert calls == ["fused", "reference"] * 2


@pytest.mark.parametrize(
    ("words", "status", "named"),
    [
        (["--recipe", "none"], 2, "--recipe must be one of"),
        (["--recipe", "demo", "--steps", "0"], 2, "--steps: must be an integer of at least 1"),
        (["--recipe", "demo", "--model.name=swin_xxl"], 1, "swin_nano"),
    ],
)
def test_what_cannot_be_timed_is_refused(words, status, named, capsys):
    with pytest.raises(SystemExit) as caught:
        sys.exit(speed.main([*words, *suite.MACHINE]))
    assert caught.value.code == status
    out, err = capsys.readouterr()
    assert named in err
    assert "Traceback" not in err
    assert "clips/s" not in out
