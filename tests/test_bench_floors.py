"""bench/floors.py and bench/sizes.py: agreement with arithmetic that others made."""

import pytest
import torch

from bench import floors
from bench.attention_peers import Problem, Windows
from bench.harness import Rows
from bench.sizes import stages
from videoswin_kernels.testing import ATTENTION, PRODUCTION, Case, Stage

# swin_t, 8 clips of 32x224x224 in bfloat16: MB, GFLOP and Gexp of forward and backward, then their
# floors in microseconds on an H200, as a calculation of its own found them.
KNOWN = {
    1: ((313.1, 60.4, 0.472, 112.9), (626.2, 151.1, 0.472, 191.2)),
    2: ((156.5, 30.2, 0.236, 56.4), (313.1, 75.5, 0.236, 95.6)),
    3: ((78.3, 15.1, 0.118, 28.2), (156.5, 37.8, 0.118, 47.8)),
    4: ((39.1, 7.6, 0.059, 14.1), (78.3, 18.9, 0.059, 23.9)),
}
# The same with the window (16, 7, 7).
KNOWN_LONG = {
    1: ((313.1, 120.8, 0.944, 225.8), (626.2, 302.1, 0.944, 382.4)),
    2: ((156.5, 60.4, 0.472, 112.9), (313.1, 151.1, 0.472, 191.2)),
    3: ((78.3, 30.2, 0.236, 56.4), (156.5, 75.5, 0.236, 95.6)),
    4: ((39.1, 15.1, 0.118, 28.2), (78.3, 37.8, 0.118, 47.8)),
}


@pytest.mark.parametrize("window", [(8, 7, 7), (16, 7, 7)])
@pytest.mark.parametrize("number", KNOWN)
def test_work_and_floors_are_those_of_the_roofline(number, window):
    stage = PRODUCTION[f"swin_t stage {number}"]
    stage = stage._replace(case=stage.case._replace(window=window))
    known = (KNOWN if window[0] == 8 else KNOWN_LONG)[number]
    for direction, (megabytes, gflop, gexps, floor_us) in zip(floors.PASSES, known, strict=True):
        work = floors.attention(stage, 8, direction)
        assert work.bytes / 1e6 == pytest.approx(megabytes, abs=0.05)
        assert work.flops / 1e9 == pytest.approx(gflop, abs=0.05)
        assert work.exps / 1e9 == pytest.approx(gexps, abs=0.0005)
        floor_ms, bound = floors.floor([work], floors.H200)
        assert floor_ms * 1e3 == pytest.approx(floor_us, abs=0.05)
        assert bound == {"forward": "exps", "backward": "flops"}[direction]


# Clips a second of 8 clips of 32x224x224 on an H200, inference and training, as a calculation of
# its own found them: of blocks whose residual stream is as narrow as all else, and of autocast's.
WHOLE = {
    ("swin_t", None, "same"): (3167, 1068),
    ("swin_b", None, "same"): (1224, 412),
    ("swin_t", (16, 7, 7), "same"): (2641, 909),
    ("swin_b_w1677", None, "same"): (1060, 363),
    ("swin_t", None, "autocast"): (2734, 921),
    ("swin_b", None, "autocast"): (1149, 386),
}


@pytest.mark.parametrize(("name", "window", "stream"), WHOLE)
def test_floors_of_whole_models_are_those_of_the_roofline(name, window, stream):
    for training, known in zip((False, True), WHOLE[name, window, stream], strict=True):
        works = floors.model(name, 8, window=window, training=training, stream=stream)
        milliseconds, _ = floors.floor(works, floors.H200)
        assert 8e3 / milliseconds == pytest.approx(known, rel=1e-3)


def test_pairs_that_the_mask_separates_are_counted():
    shares = {
        stage.case: floors.unmasked_pairs(stage.case) / (stage.case.windows * stage.case.tokens**2)
        for stage in (*PRODUCTION.values(), *stages("swin_b_w1677"))
    }
    assert list(shares.values()) == pytest.approx(
        [0.661, 0.578, 0.428, 0.750, 0.881, 0.770, 0.570, 1.0], abs=5e-4
    )
    for case in ATTENTION.values():
        mask = eager_mask(case)
        expected = case.windows * case.tokens**2 if mask is None else int((mask == 0).sum())
        assert floors.unmasked_pairs(case) == expected


def eager_mask(case):
    """The mask of plain PyTorch, None without a shift."""
    problem = Problem.random(Stage(case, 8, 2), 1, torch.float32, torch.device("cpu"))
    return Windows.of(problem).mask


def test_stages_are_those_of_the_released_models():
    assert stages("swin_t") == list(PRODUCTION.values())
    *_, last = stages("swin_b", (3, 9, 60, 100), window=(2, 3, 3))
    assert last == Stage(Case((5, 2, 4), (2, 3, 3), (1, 1, 1)), 1024, 32)


def test_padding_is_computed_but_not_moved_and_passes_add():
    exact, padded = (Stage(Case((8, 7, w), (8, 7, 7), (0, 0, 0)), 32, 1) for w in (14, 13))
    works = [floors.attention(stage, 1, "forward") for stage in (exact, padded)]
    assert works[0][1:] == works[1][1:]
    assert works[0].bytes * 13 == works[1].bytes * 14
    one, both = (floors.floor(works[:count], floors.H200)[0] for count in (1, 2))
    assert both == pytest.approx(2 * one)


def test_ceilings_are_measured_once_in_a_run_and_only_if_they_are_asked_for(monkeypatch):
    asked = []
    monkeypatch.setattr(floors, "measure_ceilings", lambda *a, **k: asked.append(k) or floors.H200)
    rows = Rows(None, {})
    ceilings = floors.CeilingsOf(rows, torch.device("cpu"), "bfloat16", "small", 0.3)
    assert not asked
    assert ceilings() == ceilings() == floors.H200
    assert asked == [{"seconds": 0.3}]
    row = rows.find({"bench": "ceilings", "preset": "small", "dtype": "bfloat16"})
    assert row["bytes"] == 4.3e12
    # Every row has those of its own run.
    found = floors.items([floors.Work(43 * 10**9, 0, 0)], ceilings(), 20.0)
    assert (found["floor_ms"], found["floor_bound"]) == (pytest.approx(10), "bytes")
    assert found["floor_percent"] == pytest.approx(50)
    assert found["ceilings"]["flops"] == 790e12


def test_a_processors_ceilings_are_measured():
    found = floors.measure_ceilings("cpu", torch.float32, seconds=0.0)
    assert min(found[:3]) > 1e8
    assert found.source == "measured, torch.exp of one thread, times the threads"
