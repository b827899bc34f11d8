"""bench/attention.py: its peers, its gate, and the script as a user runs it."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bench_suite import MACHINE, know_the_machine, rows_of
from operator_suite import random

from bench import (
    attention,
    attention_options,
    attention_providers,
    machine,
)
from bench.attention_compiled import compiled, flex
from bench.attention_peers import Problem, eager, sdpa
from bench.attention_torchvision import Torchvision
from bench.harness import error
from videoswin_kernels import extension, window_attention
from videoswin_kernels.selection import UnavailableError
from videoswin_kernels.testing import ATTENTION, Stage

ROOT = Path(__file__).parents[1]
TINY = (*MACHINE, "--preset", "tiny", "--window", "2,3,3", "--stage", "1")


@pytest.mark.parametrize("case", ATTENTION.values(), ids=ATTENTION)
def test_peers_compute_window_attention(case):
    problem = Problem.random(Stage(case, 8, 2), 2, torch.float32, torch.device("cpu"))
    problem = problem.leaves(torch.float64)
    options = {"window": case.window, "shift": case.shift, "num_heads": 2}
    out = window_attention(
        problem.qkv, problem.bias_table, pad_qkv=problem.pad_qkv, kernels="reference", **options
    )
    upstream = random(*out.shape)
    exact = (out, *attention_providers.differentiate(out, problem.tensors, upstream))
    peers = [eager(problem), sdpa(problem, trains_table=True)]
    peers += [Torchvision(problem)] if importlib.util.find_spec("torchvision") else []
    for peer in peers:
        out = peer()
        assert out.is_contiguous()
        got = (out, *attention_providers.differentiate(out, problem.tensors, upstream))
        assert max(map(error, got, exact)) < 1e-12
    assert error(sdpa(problem, trains_table=False)(), exact[0]) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torchvisions_function_is_asked_under_autocast_and_for_what_it_makes(dtype):
    pytest.importorskip("torchvision")
    case = ATTENTION["odd everything"]
    problem = Problem.random(Stage(case, 8, 2), 2, dtype, torch.device("cpu"))
    for with_gradients in (False, True):
        said, off = attention_providers.Judge(problem).check("torchvision", with_gradients)
        assert said is None
        assert off < (1e-2 if dtype == torch.bfloat16 else 1e-5)
    # Under the clock it has leaves of its own: the grid before the qkv Linear, its windows behind.
    problem = problem.leaves()
    peer = Torchvision(problem)
    peer.isolate()
    x, windows, table = peer.leaves
    assert (x.shape, windows.shape) == (
        (2, *case.grid, 8),
        (2 * case.windows, case.tokens, 24),
    )
    assert table is problem.bias_table
    out = peer()
    grads = attention_providers.differentiate(out, peer.leaves, torch.ones_like(out))
    assert [g.shape for g in grads] == [t.shape for t in peer.leaves]
    assert all(g.isfinite().all() and g.any() for g in grads)
    assert all(leaf.is_leaf for leaf in peer.leaves)


def test_without_torchvision_its_row_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision.models.video.swin_transformer", None)
    problem = Problem.random(Stage(ATTENTION["exact"], 8, 2), 1, torch.float32, "cpu")
    with pytest.raises(UnavailableError, match="torchvision has no shifted_window_attention_3d"):
        Torchvision(problem)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["exact", "padded", "D clamped", "all clamped"])
def test_compiled_peers_compute_window_attention(name):
    torch._dynamo.reset()
    problem = Problem.random(Stage(ATTENTION[name], 32, 2), 2, torch.float32, torch.device("cpu"))
    assert attention_providers.Judge(problem).check("flex", False)[1] < 1e-5
    problem = problem.leaves(torch.float64)
    expected, got = (peer(problem)() for peer in (eager, compiled))
    upstream = random(*got.shape)
    exact = attention_providers.differentiate(expected, problem.tensors, upstream)
    grads = attention_providers.differentiate(got, problem.tensors, upstream)
    assert max(map(error, (got, *grads), (expected, *exact))) < 1e-12


def test_flex_attention_has_no_backward_on_a_cpu():
    problem = Problem.random(Stage(ATTENTION["exact"], 32, 2), 1, torch.float32, "cpu")
    with pytest.raises(UnavailableError, match="no backward on a CPU"):
        flex(problem.leaves(), trains_table=True)
    # Neither is compiled where it is made.
    assert callable(compiled(problem))


def test_what_takes_minutes_to_compile_is_left_out_of_small_presets_unless_it_is_named():
    def excused(*words):
        return attention.parse((*TINY, *words)).excused

    assert set(excused()) == set(excused("--preset", "small")) == {"compiled", "flex"}
    assert not excused("--preset", "clip")
    assert not excused("--providers", "compiled,flex")
    problem = Problem.random(Stage(ATTENTION["exact"], 8, 2), 1, torch.float32, "cpu")
    _, items = attention.attempt("flex", problem, None, "forward", ("flex",))
    assert items["reason"] == "takes minutes to compile; --providers flex asks for it"


def test_what_was_left_out_is_measured_once_it_is_named(quick, monkeypatch, tmp_path):
    monkeypatch.setitem(attention_providers.MAKERS, "flex", lambda problem, _: eager(problem))
    path = tmp_path / "rows.jsonl"
    words = (*TINY, "--shifted", "no", "--direction", "forward", "--json", str(path))
    monkeypatch.setattr(attention_options, "MAKERS", {"eager": eager, "flex": eager})
    assert attention.main(words) == 0
    assert attention.main(words) == 0
    rows = rows_of(path, "attention")
    assert [(row["provider"], "ms" in row) for row in rows] == [("eager", True), ("flex", False)]
    assert attention.main((*words, "--providers", "eager,flex")) == 0
    last = rows_of(path)[-1]
    assert last["provider"] == "flex"
    assert last["ms"] > 0


def test_what_is_wrong_at_the_size_that_is_timed_alone_is_seen(quick, monkeypatch, capsys):
    """As a kernel is that was compiled for it."""

    def wrong_of_many(problem, trains_table):
        function = eager(problem)
        return (lambda: function() * 1.01) if len(problem.qkv) > 2 else function

    def wrong_gradient_of_many(problem, trains_table):
        qkv = problem.qkv
        return eager(problem._replace(qkv=qkv / 2 + qkv.detach() / 2 if len(qkv) > 2 else qkv))

    options = (*TINY, "--shifted", "yes", "--batch", "3", "--providers", "eager,sdpa")
    for broken, direction, said in (
        (wrong_of_many, "forward", "the output is off by 1.0e-02"),
        (wrong_of_many, "forward+backward", "the output is off by 1.0e-02"),
        (wrong_gradient_of_many, "backward", "the gradient of qkv is off by 5.0e-01"),
    ):
        monkeypatch.setitem(attention_providers.MAKERS, "sdpa", broken)
        assert attention.main((*options, "--direction", direction)) == 1
        assert f"wrong: {said}" in capsys.readouterr().out


@pytest.fixture
def quick(monkeypatch, one_thread):
    know_the_machine(monkeypatch)


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
    rows = {row["provider"]: row for row in rows_of(path, "attention")}
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
    last = rows_of(path)[-1]
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
    assert not path.exists()
    assert attention.main((*command, "--direction", "backward")) == 0
    begun = path.read_text()
    # The ceilings, and two providers, shifted and not.
    assert len(begun.splitlines()) == 5
    assert attention.main(command) == 0
    whole = path.read_text()
    assert whole.startswith(begun)
    # Those of this run, and of two more directions.
    assert len(whole.splitlines()) == 5 + 1 + 8
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
        (("--providers", "eager,other"), "--providers: other is none of eager, compiled, sdpa"),
        (("--window", "8,7"), "--window: window must be three integers"),
        (("--window", "8,7,x"), "x"),
        (("--model", "swin_x"), "invalid choice: 'swin_x'"),
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
    rows = rows_of(path)
    count = 1 + len(attention_providers.MAKERS)
    assert [row["allocator"] for row in rows] == ["default"] * count + ["pooled"] * count
    assert rows[0]["bench"] == rows[count]["bench"] == "ceilings"
    lines = done.stdout.splitlines()
    header = next(number for number, line in enumerate(lines) if line.startswith("allocator"))
    assert [line.split()[0] for line in lines[header + 1 :]] == ["default"] * (count - 1) + [
        "pooled"
    ] * (count - 1)
    refused = [
        "compiled",
        "flex",
        "triton",
        "cuda",
        *(["cpu"] if extension.why_not("_ops_cpu") else []),
    ]
    for row in rows[1:count] + rows[count + 1 :]:
        is_timed = row["provider"] not in refused
        assert ("ms" in row) == ("floor_percent" in row) == ("peak_mb" in row) == is_timed, row
        assert ("reason" in row) != is_timed, row
        assert (row["preset"], row["model"]) == ("tiny", "swin_t")
    for provider in refused:
        first = next(line for line in lines[header:] if f"  {provider}  " in line)
        # Where the emulator is built it runs, and is not timed.
        why = f"window_attention: kernels='{provider}' (cannot run: |is emulated here, )"
        assert re.search(f"{why}|takes minutes to compile", first), first
