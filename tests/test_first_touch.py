"""Whatever a process does first with a kernel set, it gets the reference's numbers.

Index vectors are looked up where they are first needed: in eager code, under tracing, in inference
mode, on the meta device. None of that may leave something behind that a later call trips over.
The rows are programs (first_touch.py); two of them run at a time.
"""

import functools
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import first_touch
import operator_suite as suite
import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

ROOT = Path(__file__).parents[1]
# Beside the others they find little, and take longest.
SLOW_ROWS = ("dynamic", "inductor", "export_strict", "copies")
RUNS = [run for run in suite.runs("window_attention") if run.kernels != "reference"]
# What happens before a kernel is launched is the same code for every kernel set: where the one for
# processors runs, the interpreted and the emulated one are for the hour of `make verify`.
EMULATED = suite.Run("cuda", "cpu") if suite.Run("cpu", "cpu") in RUNS else None
ABSENT = pytest.param(None, marks=pytest.mark.skip("no compiled kernel set runs here"), id="nobody")
EVERY = pytest.mark.parametrize(
    "run",
    [
        pytest.param(
            run,
            marks=[pytest.mark.slow]
            if EMULATED and (run == EMULATED or run.is_interpreted)
            else [],
            id="-".join(run),
        )
        for run in RUNS
    ]
    or [ABSENT],
)


def cell(run, row, subject):
    marks = []
    if row in first_touch.CUDA_ROWS and run.device != "cuda":
        marks = [pytest.mark.skip("CUDA graphs need a CUDA GPU")]
    elif row == "inductor" and not (shutil.which("g++") or shutil.which(os.environ.get("CXX", ""))):
        marks = [pytest.mark.skip("Inductor needs a C++ compiler for the CPU")]
    elif row in SLOW_ROWS or (EMULATED and (run == EMULATED or run.is_interpreted)):
        marks = [pytest.mark.slow]
    return pytest.param(run, row, subject, marks=marks, id=f"{'-'.join(run)}-{row}-{subject}")


CELLS = [
    cell(run, row, subject)
    for run in RUNS
    for row in first_touch.ROWS
    for subject in first_touch.subjects(row)
]


def environment(run):
    """The environment of a program that starts cold: nothing compiled is found on the disk."""
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    return variables | {"TRITON_INTERPRET": "1"} if run.is_interpreted else variables


def play(run, row, files):
    """{subject: traceback} of a row."""
    command = [sys.executable, str(ROOT / "tests" / "first_touch.py"), row, *("--kernels", run[0])]
    command += ["--device", run.device, "--files", str(files)]
    variables = environment(run) | {"TORCHINDUCTOR_CACHE_DIR": str(files / "inductor" / row)}
    done = subprocess.run(
        command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=300, check=False
    )
    try:
        return json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        lost = f"exit {done.returncode}: {done.stderr[-2000:]}"
        return dict.fromkeys(first_touch.subjects(row), lost)


@pytest.fixture(scope="module")
def matrix(request, tmp_path_factory):
    """A function of (run, row): the row's results and files, computed two rows at a time.

    Rows of all selected tests start at once, so that the second waits for less.
    """
    files = functools.cache(lambda run: tmp_path_factory.mktemp("-".join(run)))
    with ThreadPoolExecutor(2) as pool:
        start = functools.cache(lambda run, row: pool.submit(play, run, row, files(run)))
        for item in request.session.items:
            asked = item.callspec.params if hasattr(item, "callspec") else {}
            is_ours = item.path == request.path and "row" in asked
            if is_ours and not item.get_closest_marker("skip"):
                start(asked["run"], asked["row"])
        yield lambda run, row: (start(run, row).result(), files(run))


@pytest.mark.skipif(not CELLS, reason="no compiled kernel set runs here")
@pytest.mark.parametrize(("run", "row", "subject"), CELLS)
def test_first_touch(run, row, subject, matrix):
    results, _ = matrix(run, row)
    if results[subject]:
        pytest.fail(results[subject], pytrace=False)


LOAD = """
import sys, pathlib, torch, videoswin_kernels
for path in sorted(pathlib.Path(sys.argv[1]).glob("*.pt2")):
    x, expected = torch.load(path.with_suffix(".pt"))
    out = torch.export.load(path).module()(x)
    assert type(out) is torch.Tensor, path
    torch.testing.assert_close(out.detach(), expected, rtol=1e-4, atol=1e-4, msg=str(path))
    print(path.stem)
assert "model" not in sys.modules
"""


@EVERY
def test_an_exported_program_runs_where_only_the_kernels_are_imported(run, matrix):
    _, files = matrix(run, "export")
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(files)],
        cwd=ROOT,
        env=environment(run),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) == set(first_touch.SUBJECTS)


def test_the_check_of_graphs_sees_what_it_is_there_for():
    """A tensor made in the graph, a constant of it, and a vector of indices that comes in."""
    made = make_fx(lambda x: x + torch.ones(3), tracing_mode="fake")(torch.zeros(3))
    with pytest.raises(AssertionError, match="a tensor is made"):
        first_touch.check_graph(made)
    index = torch.arange(3)
    with pytest.raises(AssertionError, match="a constant"):
        first_touch.check_graph(make_fx(lambda x: x[index])(torch.zeros(3)))
    with pytest.raises(AssertionError, match="a tensor of integers comes in"):
        first_touch.check_graph(make_fx(lambda x, index: x[index])(torch.zeros(3), index))
