"""bench/operators.py: its calls, bytes and gate, and the rows that it leaves."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bench_suite import MACHINE, know_the_machine, rows_of

import videoswin_kernels
from bench import floors, operators
from bench.operator_problems import random_problem, wrong
from bench.operators import MEASURED
from videoswin_kernels import extension
from videoswin_kernels.selection import MOVEMENT
from videoswin_kernels.testing import Case, Stage

CPU = torch.device("cpu")
# Padded on each axis, and shifted.
STAGE = Stage(Case((3, 5, 5), (2, 3, 3), (1, 1, 1)), 8, 2)
TINY = (*MACHINE, "--preset", "tiny")


@pytest.fixture(autouse=True)
def quick(monkeypatch, one_thread):
    know_the_machine(monkeypatch)


def problem_of(operator, dtype=torch.float32):
    return random_problem(operator, STAGE, 2, dtype, CPU)


def test_each_operator_has_rows_at_each_stage_that_it_is_of(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    words = (*TINY, "--json", str(path))
    assert operators.main((*words, "--minutes", "0")) == 0
    assert "38 settings are left after 0.0 minutes" in capsys.readouterr().err
    words += ("--stage", "4", "--operators", "residual_norm", "patch_merging", "window_reverse")
    assert operators.main(words) == 0
    rows = rows_of(path, "operators")
    asked = {(row["operator"], row["direction"]) for row in rows}
    directions = ("forward", "forward+backward")
    both = ("residual_norm", "window_reverse")
    assert asked == {(operator, direction) for operator in both for direction in directions}
    is_built = extension.why_not("_ops_cpu") is None
    for row in rows:
        is_timed = row["provider"] == "reference" or (row["provider"] == "cpu" and is_built)
        assert ("ms" in row) == is_timed, row
        assert ("reason" in row) != is_timed, row
        if is_timed:
            assert row["gb_per_s"] == pytest.approx(row["bytes"] / row["ms"] / 1e6)
            assert row["peak_mb"] >= 0
            assert row["error"] < 1e-5
            assert row["floor_percent"] == pytest.approx(100 * row["floor_ms"] / row["ms"])
            assert row["floor_bound"] == "bytes"
            # From one round nothing is known of noise.
            assert row["noise_percent"] is None
    assert capsys.readouterr().out.startswith("allocator  operator")
    # Called again, it measures nothing.
    assert operators.main(words) == 0
    assert len(rows_of(path, "operators")) == len(rows)


@pytest.mark.parametrize("operator", MEASURED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_plain_pytorch_is_right_and_so_are_the_kernels(operator, dtype):
    problem = problem_of(operator, dtype)
    for provider in ("reference", *(["cpu"] if extension.why_not("_ops_cpu") is None else [])):
        for with_gradients in (False, True):
            assert "wrong" not in wrong(problem, provider, with_gradients)


@pytest.mark.parametrize("operator", MEASURED)
@pytest.mark.parametrize("part", ["output", "gradient"])
def test_what_is_wrong_is_seen(operator, part, monkeypatch):
    plain = getattr(videoswin_kernels, operator)

    class Halved(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad / 2

    def broken(*inputs, kernels, **options):
        if kernels == "reference":
            return plain(*inputs, kernels=kernels, **options)
        if part == "gradient":
            inputs = (*inputs[:-1], Halved.apply(inputs[-1]))
        out = plain(*inputs, kernels="reference", **options)
        if part == "gradient":
            return out
        outputs = out if isinstance(out, tuple) else (out,)
        # The last number of the last output.
        nudge = torch.zeros_like(outputs[-1])
        nudge.view(-1)[-1] = 1.0
        return *outputs[:-1], outputs[-1] + nudge

    monkeypatch.setattr(videoswin_kernels, operator, broken)
    problem = problem_of(operator)
    said = wrong(problem, "broken", True)["wrong"]
    assert said.startswith("the gradient of " if part == "gradient" else "output ")
    assert ("bit for bit" in said) == (operator in MOVEMENT)
    assert ("wrong" in wrong(problem, "broken", False)) == (part == "output")
    assert "wrong" not in wrong(problem, "reference", True)


def test_a_wrong_provider_has_no_time(monkeypatch, tmp_path):
    monkeypatch.setattr(operators, "wrong", lambda *_: {"error": 1.0, "wrong": "it is off"})
    path = tmp_path / "rows.jsonl"
    words = ("--stage", "1", "--operators", "cyclic_shift", "--providers", "reference")
    assert operators.main((*TINY, *words, "--json", str(path))) == 1
    assert [("ms" in row, row["wrong"]) for row in rows_of(path, "operators")] == [
        (False, "it is off")
    ] * 2
    # Neither does it pass when the run continues, where nothing is left to measure.
    assert operators.main((*TINY, *words, "--json", str(path))) == 1
    assert len(rows_of(path, "operators")) == 2


@pytest.mark.parametrize("operator", MEASURED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_those_of_inputs_outputs_and_what_is_read_again(operator, dtype):
    problem = problem_of(operator, dtype)
    tensors = [
        problem.inputs[name] for name in ("x", "windows", "branch") if name in problem.inputs
    ]
    ends = sum(tensor.nbytes for tensor in (*tensors, *problem.outputs("reference")))
    again = 0 if operator in MOVEMENT else tensors[0].nbytes
    moved = [
        floors.movement(operator, STAGE, 2, direction, dtype.itemsize)
        for direction in floors.PASSES
    ]
    assert [work.bytes for work in moved] == [ends, ends + again]
    assert all(work[1:] == (0, 0) for work in moved)


def test_bytes_on_paper():
    def moved(operator, itemsize=4):
        return [floors.movement(operator, STAGE, 2, d, itemsize).bytes for d in floors.PASSES]

    # Two clips of 3 x 5 x 5 tokens, 8 channels of 4 bytes; padded to 4 x 6 x 6 in windows; merged
    # to 3 x 3 x 3 of 32 channels.
    plane, windows, merged = 2 * 75 * 32, 2 * 144 * 32, 2 * 27 * 128
    assert moved("cyclic_shift") == [2 * plane, 2 * plane]
    assert moved("cyclic_shift", itemsize=2) == [plane, plane]
    assert moved("window_partition") == moved("window_reverse") == [plane + windows] * 2
    assert moved("patch_merging") == [plane + merged, 2 * plane + merged]
    assert moved("residual_norm") == [4 * plane, 5 * plane]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--providers", "eager"), "--providers: eager is none of reference, triton, cuda, cpu"),
        (("--operators", "window_attention"), "invalid choice: 'window_attention'"),
        (("--batch", "0"), "--batch must be at least 1, got 0"),
    ],
)
def test_wrong_options_are_refused(capsys, words, said):
    with pytest.raises(SystemExit) as caught:
        operators.main((*TINY, *words))
    assert caught.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    "script", ["cyclic_shift", "window_partition", "patch_merging", "residual_norm"]
)
def test_a_script_of_its_own_measures_its_operators_alone(script):
    module = importlib.import_module(f"bench.{script}")
    assert set(module.OPERATORS) <= set(MEASURED)
    assert script in module.OPERATORS
    path = Path(module.__file__)
    done = subprocess.run(
        [sys.executable, path, *TINY, "--stage", "5"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert f"usage: bench/{script}.py" in done.stderr


def test_the_scripts_have_all_operators_between_them():
    scripts = ("cyclic_shift", "window_partition", "patch_merging", "residual_norm")
    found = [name for s in scripts for name in importlib.import_module(f"bench.{s}").OPERATORS]
    assert sorted(found) == sorted(MEASURED)


def test_micro_benchmarks_run(tmp_path):
    pytest.importorskip("pytest_benchmark")
    root = Path(operators.__file__).parents[1]
    words = ["-q", "-p", "no:cacheprovider", "--benchmark-disable", "-k", "cyclic_shift"]
    command = [sys.executable, "-m", "pytest", *words, "bench/test_micro.py"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    # Both directions of the reference and of the kernels, which may have a reason not to run.
    assert re.search(r"4 passed|2 passed, 2 skipped|2 skipped, 2 passed", done.stdout)
