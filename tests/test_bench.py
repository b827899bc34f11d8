"""The benches: their arithmetic, clock, gate and files, and one of them as a user runs it."""

import contextlib
import json
import subprocess
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from bench_suite import HEADER, rows_of
from operator_suite import random

from bench import harness, machine
from bench.harness import Rows, error, gate, largest, measure
from bench.timing import interval_of_median

ROOT = Path(__file__).parents[1]


class FakeClock:
    """Seconds that pass only where a function says so."""

    def __init__(self):
        self.now, self.calls = 0.0, []

    def __call__(self):
        return self.now

    def taking(self, name, *milliseconds):
        """A function that takes these times in turn; the last one again and again."""
        left = list(milliseconds)

        def function():
            self.calls.append(name)
            self.now += (left.pop(0) if len(left) > 1 else left[0]) / 1e3

        return function


def test_measure_takes_functions_twice_in_rounds_and_each_behind_every_other():
    clock = FakeClock()
    functions = {name: clock.taking(name, 1.0) for name in "abc"}
    measure(functions, "cpu", seconds=0, least=60, clock=clock)
    warm, calls = clock.calls[:3], clock.calls[3:]
    assert warm == ["a", "b", "c"]
    rounds = [calls[start : start + 6] for start in range(0, len(calls), 6)]
    assert all(sorted(each) == list("aabbcc") for each in rounds)
    pairs = Counter(pairwise(calls))
    # As often as chance has it, which no carry-over of one provider to the next can hide behind.
    assert min(pairs[one, other] for one in "abc" for other in "abc") > 360 / 9 / 3
    first = Counter(each[0] for each in rounds)
    assert min(first[name] for name in "abc") > 60 / 3 / 2


def test_measure_reads_a_known_effect_and_leaves_the_first_call_out():
    clock = FakeClock()
    taken = [10, 11, 12, 13, 14, 10, 11, 12, 13, 14, 12, 12]
    functions = {"a": clock.taking("a", 500, *taken), "b": clock.taking("b", 12.36)}
    timings = measure(functions, "cpu", seconds=0, least=6, clock=clock)
    assert timings["a"][:4] == pytest.approx((12, 11, 13, 12))
    assert timings["b"].median / timings["a"].median == pytest.approx(1.03)
    # Six pairs of times, in the rounds' order, whose smallest and largest ratio are the interval.
    assert timings["b"].ratio == (1, 1)
    assert timings["b"].noise_percent == 0
    assert timings["a"].ratio[0] < 1 < timings["a"].ratio[1]


def noisy(generator, milliseconds, calls):
    """Times as a busy machine gives them: mostly near, sometimes far above."""
    noise = generator.lognormal(0, 0.02, calls) + 0.5 * (generator.random(calls) < 0.05)
    return (milliseconds * noise).tolist()


def test_three_percent_are_read_as_three_percent_through_noise():
    """And what is claimed of the noise is smaller than they are."""
    generator, clock = np.random.default_rng(0), FakeClock()
    functions = {
        name: clock.taking(name, *noisy(generator, milliseconds, 800))
        for name, milliseconds in (("a", 1.0), ("b", 1.03))
    }
    timings = measure(functions, "cpu", seconds=0, least=300, clock=clock)
    effect = timings["b"].median / timings["a"].median
    assert effect == pytest.approx(1.03, abs=0.004)
    assert max(timing.noise_percent for timing in timings.values()) < 1.5


def test_the_interval_of_a_provider_beside_itself_contains_one():
    """In 95 % of runs at least: here of four providers in five runs, a hundred times."""
    generator, contained, runs = np.random.default_rng(1), 0, 0
    for _ in range(500):
        clock = FakeClock()
        times = {name: noisy(generator, ms, 41) for ms, name in enumerate("abcd", 1)}
        functions = {name: clock.taking(name, *own) for name, own in times.items()}
        timings = measure(functions, "cpu", seconds=0, least=20, clock=clock)
        contained += sum(low <= 1 <= high for low, high in (t.ratio for t in timings.values()))
        runs += len(timings)
    assert contained / runs >= 0.95


@pytest.mark.parametrize(("count", "rank"), [(5, 0), (6, 1), (8, 1), (9, 2), (20, 6), (100, 40)])
def test_the_interval_of_a_median_is_that_of_the_tables(count, rank):
    """Ranks as printed in tables of the sign test at 5 %."""
    values = list(range(1, count + 1))
    np.random.default_rng(0).shuffle(values)
    expected = (rank, count + 1 - rank) if rank else None
    assert interval_of_median(values) == expected


def test_measure_stops_by_its_seconds_its_least_and_its_most():
    def count(**bounds):
        clock = FakeClock()
        functions = {name: clock.taking(name, 10) for name in "ab"}
        return {t.count for t in measure(functions, "cpu", clock=clock, **bounds).values()}

    # A round is four calls of 10 ms, two of each.
    assert count(seconds=0.19, least=1) == {2 * 5}
    assert count(seconds=0.19, least=7) == {2 * 7}
    assert count(seconds=9.0, most=3, least=1) == {2 * 3}
    assert measure({}, "cpu") == {}


class FakeEvent:
    """A device event of a device that does nothing but what a fake clock says."""

    clock = None

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = FakeEvent.clock()

    def synchronize(self):
        pass

    def elapsed_time(self, end):
        return (end.at - self.at) * 1e3


def test_a_gpu_sweeps_its_cache_and_waits_as_long_as_the_slowest_host_launches(monkeypatch):
    clock = FakeEvent.clock = FakeClock()
    properties = type("Properties", (), {"L2_cache_size": 2**20})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(harness.time, "perf_counter", clock)
    monkeypatch.setattr(harness._Events, "sweep", staticmethod(clock.taking("s", 0.1)))
    waits = []
    monkeypatch.setattr(torch.cuda, "_sleep", waits.append)
    timer = harness._Events(torch.device("cpu"))
    assert timer.buffer.nbytes >= 4 * properties.L2_cache_size
    slow, quick = clock.taking("slow", 9000, 0.45), clock.taking("quick", 0.02)
    for _ in range(3):
        timer.warm(slow)
        timer.warm(quick)
    clock.calls.clear()
    assert timer.time(quick) == pytest.approx(0.02)
    # The cache is swept, then the device waits for 0.45 ms of launching and a fifth more.
    assert clock.calls == ["s", "quick"]
    assert waits == [pytest.approx(1.2 * 0.45 * 2e6, abs=1)]
    assert timer.launch_ms[slow] == pytest.approx(0.45)
    # It waits for no host for ever; what the host takes is told in the row.
    timer.launch_ms[slow] = 9000
    timer.time(quick)
    assert waits[-1] == pytest.approx(200 * 2e6)


def test_peak_memory_is_beyond_what_was_held():
    held = torch.empty(2**20)

    def call():
        first = torch.empty(2**18)
        del first
        return torch.empty(2**17), torch.empty(2**16)

    peak = harness.peak_memory(call, "cpu")
    assert held.nbytes > 4 * 2**18 <= peak < 4 * 2**18 + 4096
    # A number becomes a tensor.
    assert harness.peak_memory(lambda: held.add_(1), "cpu") < 64


def test_error_is_relative_and_no_number_is_infinitely_wrong():
    exact = random(5)
    assert error(exact.clone(), exact) == 0
    assert error(1.01 * exact, exact) == pytest.approx(0.01)
    assert error(torch.zeros(5), torch.zeros(5)) == 0
    for wrong in (None, exact[:4], exact / 0, torch.ones(5)):
        truth = torch.zeros(5) if wrong is not None and len(wrong) == 5 else exact
        assert error(wrong, truth) == float("inf")
    assert error(torch.full((5,), float("nan")), exact) == float("inf")


def test_gate_allows_twice_the_naive_error_and_caps_it():
    exact = {"x": torch.ones(4)}

    def wrong(got, naive, dtype):
        return gate({"x": torch.full((4,), got)}, exact, {"x": torch.full((4,), naive)}, dtype)

    assert wrong(1 + 1.9e-6, 1 + 1e-6, torch.float32) is None
    assert wrong(1 + 2.5e-6, 1 + 1e-6, torch.float32).startswith("x is off by 2.5e-06")
    # The naive result is a provider, too: it does not pass for being as wrong as itself.
    assert wrong(1.01, 1.01, torch.float32) is not None
    assert wrong(1.1, 1.1, torch.bfloat16) is not None
    assert gate({}, exact, exact, torch.float32) is not None


def test_rows_continue_an_interrupted_run(tmp_path):
    path = tmp_path / "folder" / "rows.jsonl"
    Rows(path, HEADER).append({"stage": 1, "grid": (8, 7, 7), "ms": 1.5, "bad": float("inf")})
    with path.open("a") as file:
        file.write('{"card": "a card", "comm')  # The power went here.
    rows = Rows(path, HEADER)
    assert rows.has({"stage": 1})
    assert rows.has({"stage": 1, "grid": (8, 7, 7), "bad": "inf"})
    assert not rows.has({"stage": 2})
    assert not rows.has({"stage": 1, "unheard of": None, "ms": 2})
    rows.append({"stage": 2})
    assert [row["stage"] for row in rows_of(path)] == [1, 2]
    assert Rows(path, HEADER).find({"stage": 1})["clocks"] == {"sm": 1980}


@pytest.mark.parametrize("other", ["card", "commit", "sources", "threads", "allocator"])
def test_rows_of_another_machine_or_commit_are_kept_but_not_used(tmp_path, other):
    path = tmp_path / "rows.jsonl"
    Rows(path, {**HEADER, other: "another"}).append({"stage": 1})
    rows = Rows(path, HEADER)
    assert not rows.has({"stage": 1})
    assert rows.table(["stage"]) == "stage"
    rows.append({"stage": 1})
    assert len(path.read_text().splitlines()) == 2


def test_rows_refuse_a_file_that_is_none_and_try_again_what_failed(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("something else\n")
    with pytest.raises(ValueError, match=r"rows\.jsonl: line 1 is no row"):
        Rows(path, HEADER)
    rows = Rows(None, HEADER)
    rows.append({"stage": 1, "failed": "RuntimeError: no"})
    assert not rows.has({"stage": 1})


def test_table_is_aligned_and_shows_a_sentence_in_place_of_numbers():
    rows = Rows(None, HEADER)
    rows.append({"stage": 1, "provider": "a", "ms": 12.345, "tflops": None})
    rows.append({"stage": 1, "provider": "bcd", "reason": "it cannot run here, and this says why"})
    rows.append({"stage": 2, "provider": "bcd", "reason": "it cannot run here, and this says why"})
    rows.append({"stage": 2, "provider": "e", "wrong": "the output is off"})
    rows.append({"provider": "of another bench"})
    columns = {"stage": "stage", "provider": "provider", "ms": "median ms", "tflops": "TFLOP/s"}
    assert rows.table(columns).splitlines() == [
        "stage  provider  median ms  TFLOP/s",
        "1      a         12.3       -",
        "1      bcd       it cannot run here, and this says why",
        "2      bcd       as above",
        "2      e         wrong: the output is off",
    ]
    assert len(rows.table(columns, {"stage": 2}).splitlines()) == 3


def test_header_names_the_machine_and_the_code(monkeypatch, tmp_path):
    header = harness.header("cpu")
    for name in ("card", "python", "torch", "sources", "threads", "allocator", "date"):
        assert header[name], name
    assert header["capability"] is header["driver"] is header["clocks"] is None
    assert json.loads(json.dumps(header)) == header
    # A copy without history says what it is told, or nothing.
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    monkeypatch.delenv("VIDEOSWIN_COMMIT", raising=False)
    assert machine.commit() is None
    monkeypatch.setenv("VIDEOSWIN_COMMIT", "0123456789ab")
    assert machine.commit() == "0123456789ab"


def test_sources_differ_where_a_source_does_and_the_commit_is_dirty(monkeypatch, tmp_path):
    def git(*arguments):
        identity = ("-c", "user.name=a", "-c", "user.email=a@b")
        subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True)

    monkeypatch.setattr(machine, "ROOT", tmp_path)
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "a.py").write_text("1")
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "a")
    commit, sources = machine.commit(), machine.sources()
    assert len(commit) == 12
    (tmp_path / "rows.jsonl").write_text("{}")
    assert (machine.commit(), machine.sources()) == (commit, sources)
    (tmp_path / "bench" / "a.py").write_text("2")
    assert machine.commit() == f"{commit}-dirty"
    assert machine.sources() != sources


@pytest.mark.parametrize("most", [0, 1, 2, 3, 7, 8, 100])
def test_the_largest_batch_is_found(most):
    tried = []

    def fill(number):
        tried.append(number)
        if number > most:
            raise torch.OutOfMemoryError("no room")

    assert largest(fill) == most
    assert len(tried) <= 2 + 2 * most.bit_length()
    with pytest.raises(RuntimeError, match="illegal"):
        largest(lambda number: (_ for _ in ()).throw(RuntimeError("illegal memory access")))


@pytest.mark.parametrize(
    ("fault", "is_one"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (torch.AcceleratorError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_a_device_has_many_words_for_having_no_room(fault, is_one):
    assert harness.is_out_of_memory(fault) == is_one


def test_providers_without_room_beside_each_other_have_a_reason_in_place_of_times():
    def full():
        raise torch.OutOfMemoryError("no room")

    found = {"one": (full, {"error": 0.0}), "other": (None, {"reason": "it is not here"})}
    assert harness.time_all(found, torch.device("cpu"), seconds=0) == {}
    assert found["one"][0] is None
    assert found["one"][1]["reason"].startswith("out of memory beside the others")
    assert found["other"][1]["reason"] == "it is not here"

    def broken():
        raise RuntimeError("it broke")

    with pytest.raises(RuntimeError, match="it broke"):
        harness.time_all({"one": (broken, {})}, torch.device("cpu"), seconds=0)
