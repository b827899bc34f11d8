"""The benches: their arithmetic, clock, gate and files, and one of them as a user runs it."""

import contextlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from operator_suite import random

from bench import allocators, attention, attention_providers, floors, harness, machine
from bench.attention_peers import Problem, eager, sdpa
from bench.harness import Rows, Timing, error, gate, measure
from videoswin_kernels import extension, window_attention
from videoswin_kernels.testing import ATTENTION, PRODUCTION, Case, Stage

ROOT = Path(__file__).parents[1]
HEADER = {"card": "a card", "commit": "a commit", "allocator": "default", "clocks": {"sm": 1980}}
# Pooling would outlive the test in this process.
TINY = (
    *("--device", "cpu", "--allocator", "default"),
    *("--preset", "tiny", "--window", "2,3,3", "--stage", "1"),
)

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


def test_padding_is_computed_but_not_moved_and_passes_add():
    exact, padded = (Stage(Case((8, 7, w), (8, 7, 7), (0, 0, 0)), 32, 1) for w in (14, 13))
    works = [floors.attention(stage, 1, "forward") for stage in (exact, padded)]
    assert works[0][1:] == works[1][1:]
    assert works[0].bytes * 13 == works[1].bytes * 14
    one, both = (floors.floor(works[:count], floors.H200)[0] for count in (1, 2))
    assert both == pytest.approx(2 * one)


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


def test_measure_takes_functions_in_turn_and_moves_their_order_on():
    clock = FakeClock()
    functions = {name: clock.taking(name, 1.0) for name in "abc"}
    measure(functions, "cpu", seconds=0, least=4, clock=clock)
    # The first three calls are warming up.
    assert "".join(clock.calls) == "abc" + "abc" + "bca" + "cab" + "abc"


def test_measure_reads_a_known_effect_and_leaves_the_first_call_out():
    clock = FakeClock()
    functions = {"a": clock.taking("a", 500, 10, 11, 12, 13, 14), "b": clock.taking("b", 12.36)}
    timings = measure(functions, "cpu", seconds=0, least=5, clock=clock)
    assert timings["a"] == pytest.approx(Timing(12, 10.8, 13.2, 5))
    assert timings["b"].median / timings["a"].median == pytest.approx(1.03)


def test_measure_stops_by_its_seconds_its_least_and_its_most():
    def count(**bounds):
        clock = FakeClock()
        functions = {name: clock.taking(name, 10) for name in "ab"}
        return {t.count for t in measure(functions, "cpu", clock=clock, **bounds).values()}

    assert count(seconds=0.09, least=1) == {5}
    assert count(seconds=0.09, least=7) == {7}
    assert count(seconds=9.0, most=3, least=1) == {3}
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


def test_a_gpu_sweeps_its_cache_as_long_as_the_slowest_host_launches(monkeypatch):
    clock = FakeEvent.clock = FakeClock()
    properties = type("Properties", (), {"L2_cache_size": 2**20})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(harness.time, "perf_counter", clock)
    monkeypatch.setattr(harness._Events, "sweep", staticmethod(clock.taking("s", 0.1)))
    timer = harness._Events(torch.device("cpu"))
    assert timer.buffer.nbytes >= 4 * properties.L2_cache_size
    slow, quick = clock.taking("slow", 9000, 0.45), clock.taking("quick", 0.02)
    for _ in range(3):
        timer.warm(slow)
        timer.warm(quick)
    clock.calls.clear()
    assert timer.time(quick) == pytest.approx(0.02)
    # 0.45 ms of launching and a fifth more take six sweeps of 0.1 ms; and there is always one.
    assert clock.calls == ["s"] * 7 + ["quick"]


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
    assert [json.loads(line)["stage"] for line in path.read_text().splitlines()] == [1, 2]
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


@pytest.mark.parametrize("case", ATTENTION.values(), ids=ATTENTION)
def test_peers_compute_window_attention(case):
    problem = Problem.random(Stage(case, 8, 2), 2, torch.float32, torch.device("cpu"))
    problem = problem.leaves(torch.float64)
    options = {"window": case.window, "shift": case.shift, "num_heads": 2}
    out = window_attention(
        problem.qkv, problem.bias_table, pad_qkv=problem.pad_qkv, kernels="reference", **options
    )
    upstream = random(*out.shape)
    exact = (out, *attention_providers.differentiate(out, problem, upstream))
    for peer in (eager(problem), sdpa(problem, trains_table=True)):
        out = peer()
        assert out.is_contiguous()
        got = (out, *attention_providers.differentiate(out, problem, upstream))
        assert max(map(error, got, exact)) < 1e-12
    assert error(sdpa(problem, trains_table=False)(), exact[0]) < 1e-12


@pytest.fixture
def quick(monkeypatch):
    """Takes ceilings and machine as known: to measure takes a second, and sources may change."""
    monkeypatch.setattr(floors, "measure_ceilings", lambda *_, **__: floors.H200)
    monkeypatch.setattr(allocators, "header", lambda device: HEADER)
    # Two threads that wait for each other take seconds where other programs run.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def scaled_output(problem, trains_table):
    """Right but for one percent."""
    function = eager(problem)
    return lambda: function() * 1.01


def lost_bias(problem, trains_table):
    """Right, but for a bias table that gets half its gradient."""
    table = problem.bias_table
    return eager(problem._replace(bias_table=table / 2 + table.detach() / 2))


def unwritten(problem, trains_table):
    """Right but for one number."""

    def function():
        out = eager(problem)()
        return torch.cat([out.flatten()[:-1], out.new_full((1,), float("nan"))]).view(out.shape)

    return function


def raising(problem, trains_table):
    """Breaks when it is called."""
    return lambda: (_ for _ in ()).throw(RuntimeError("it broke\nin a long story"))


@pytest.mark.parametrize(
    ("broken", "direction", "said"),
    [
        (scaled_output, "forward", "wrong: the output is off by 1.0e-02"),
        (scaled_output, "backward", "wrong: the output is off by 1.0e-02"),
        (lost_bias, "backward", "wrong: the gradient of bias_table is off by 5.0e-01"),
        (lost_bias, "forward+backward", "wrong: the gradient of bias_table is off by 5.0e-01"),
        (unwritten, "forward", "wrong: the output is off by inf"),
        (raising, "forward", "failed: RuntimeError: it broke"),
    ],
)
def test_a_wrong_provider_has_no_time(
    quick, monkeypatch, tmp_path, capsys, broken, direction, said
):
    monkeypatch.setitem(attention_providers.MAKERS, "sdpa", broken)
    path = tmp_path / "rows.jsonl"
    options = ("--direction", direction, "--shifted", "yes", "--json", str(path))
    assert attention.main((*TINY, *options, "--providers", "eager,sdpa")) == 1
    rows = {row.get("provider"): row for row in map(json.loads, path.read_text().splitlines())}
    assert "ms" in rows["eager"]
    assert not {"ms", "spread", "tflops", "times_eager"} & set(rows["sdpa"])
    table = capsys.readouterr().out
    assert said in table
    assert "long story" not in table
    # Neither does it pass for measured when the run continues.
    assert attention.main((*TINY, *options, "--providers", "eager,sdpa")) == 1


def test_a_broken_device_ends_the_run_and_leaves_a_row(quick, monkeypatch, tmp_path):
    def broken(problem, trains_table):
        return lambda: (_ for _ in ()).throw(torch.AcceleratorError("illegal memory access"))

    monkeypatch.setitem(attention_providers.MAKERS, "sdpa", broken)
    path = tmp_path / "rows.jsonl"
    with pytest.raises(torch.AcceleratorError, match="illegal"):
        attention.main((*TINY, "--json", str(path), "--providers", "eager,sdpa,reference"))
    last = json.loads(path.read_text().splitlines()[-1])
    assert last["failed"] == "AcceleratorError: illegal memory access"


def test_a_forward_alone_is_not_judged_by_its_gradients(quick, monkeypatch, capsys):
    monkeypatch.setitem(attention_providers.MAKERS, "sdpa", lost_bias)
    options = ("--direction", "forward", "--shifted", "no", "--providers", "sdpa")
    assert attention.main((*TINY, *options)) == 0
    assert "wrong" not in capsys.readouterr().out


def test_an_interrupted_bench_continues_where_it_stopped(quick, tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    command = (*TINY, "--providers", "eager,reference", "--json", str(path))
    assert attention.main((*command, "--minutes", "0")) == 0
    assert "6 settings are left after 0.0 minutes" in capsys.readouterr().err
    assert len(path.read_text().splitlines()) == 1  # The ceilings.
    assert attention.main((*command, "--direction", "backward")) == 0
    begun = path.read_text()
    assert len(begun.splitlines()) == 5
    assert attention.main(command) == 0
    whole = path.read_text()
    assert whole.startswith(begun)
    assert len(whole.splitlines()) == 13
    assert attention.main(command) == 0
    assert path.read_text() == whole


def test_interpreted_kernels_are_not_timed():
    """Whether this process interprets or not: each way the refusal names the switch."""
    problem = Problem.random(Stage(ATTENTION["exact"], 32, 2), 1, torch.float32, "cpu")
    assert "TRITON_INTERPRET" in attention_providers.refusal("triton", problem, False)
    assert attention_providers.refusal("cuda", problem, needs_grad=True)
    reason = attention_providers.refusal("cpu", problem, needs_grad=True)
    assert (reason is None) == (extension.why_not("_ops_cpu") is None)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--providers", "eager,other"), "--providers: other is none of eager, sdpa"),
        (("--window", "8,7"), "--window: window must be three integers"),
        (("--window", "8,7,x"), "x"),
        (("--batch", "0"), "--batch must be at least 1, got 0"),
        (("--stage", "5"), "5"),
    ],
)
def test_wrong_options_are_refused(capsys, options, said):
    with pytest.raises(SystemExit) as caught:
        attention.parse(options)
    assert caught.value.code == 2
    assert said in capsys.readouterr().err


def test_the_script_has_a_line_for_every_provider_in_both_states(tmp_path):
    if machine.host_allocator() != "default":
        pytest.skip(f"the allocator is {machine.host_allocator()} here")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    path = tmp_path / "rows.jsonl"
    words = ("--allocator", "both", "--shifted", "yes", "--direction", "forward+backward")
    done = subprocess.run(
        [sys.executable, ROOT / "bench" / "attention.py", *TINY, *words, "--json", path],
        cwd=tmp_path,
        env={**environment, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    count = 1 + len(attention_providers.MAKERS)
    assert [row["allocator"] for row in rows] == ["default"] * count + ["pooled"] * count
    assert rows[0]["bench"] == rows[count]["bench"] == "ceilings"
    lines = done.stdout.splitlines()
    header = next(number for number, line in enumerate(lines) if line.startswith("allocator"))
    assert [line.split()[0] for line in lines[header + 1 :]] == ["default"] * (count - 1) + [
        "pooled"
    ] * (count - 1)
    refused = ["triton", "cuda", *(["cpu"] if extension.why_not("_ops_cpu") else [])]
    for row in rows[1:count] + rows[count + 1 :]:
        is_timed = row["provider"] not in refused
        assert ("ms" in row) == ("floor_percent" in row) == ("peak_mb" in row) == is_timed, row
        assert ("reason" in row) != is_timed, row
        assert row["preset"] == "tiny"
    for provider in refused:
        first = next(line for line in lines[header:] if f"  {provider}  " in line)
        # Where the emulator is built it runs, and is not timed.
        why = "(cannot run: |is emulated here, )"
        assert re.search(f"window_attention: kernels='{provider}' {why}", first), first
