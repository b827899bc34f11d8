"""bench/on_gpu.sh and what it runs: refusals, deadlines, continuing, what is left behind."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from argparse import Namespace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", minversion="3.6")

from bench import machine, on_gpu, report, sanitize, smoke, stages, suite
from bench.harness import Rows
from bench.jobs import CUT_OFF, ENDED, TOO_LONG, Done, Job, run
from bench.smoke import judge
from bench.stages import Context, Part, Stage, scripts
from videoswin_kernels import extension
from videoswin_kernels.selection import OPERATORS, UnavailableError

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "bench" / "on_gpu.sh"
HEADER = {"card": "a card", "commit": "0123", "date": "today"}


def call(*words, **environment):
    """What on_gpu.sh says and ends with, on a machine whose GPUs are hidden."""
    return subprocess.run(
        ["bash", SCRIPT, *map(str, words)],
        env={**os.environ, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": "", **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def python(program):
    return [sys.executable, "-c", program]


def part(name, program, row=None, **options):
    """A part that runs a program, and whose one row says how that went."""

    def rows(done):
        return [{"value": 1, **(row or {}), **({"failed": done.failure} if done.failure else {})}]

    return Part(Job(name, python(program), **options), {"bench": "fake", "name": name}, rows)


def conduct(output, parts, *, seconds=60, header=HEADER, processes=2):
    """The report of a stage of these parts."""
    context = Context(output, "cpu", time.monotonic() + seconds, seconds / 60, ())
    context.logs.mkdir(exist_ok=True)
    stage = Stage(parts, processes, lambda rows: report.tabulate(rows, ("name", "value")))
    return on_gpu.conduct("fake", stage, Rows(context.rows, header), context)


def test_the_script_is_right_for_bash():
    subprocess.run(["bash", "-n", SCRIPT], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", SCRIPT], check=True)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ((), "STAGE is missing"),
        (("fly", "out"), "no stage is called fly"),
        (("suite",), "OUTPUT, a folder for the results, is missing"),
        (("suite", "--minutes", "2"), "OUTPUT, a folder for the results, is missing"),
        (("tune", "out"), "tune needs a FILE"),
        (("tune", "out", "no such file"), "tune needs a FILE of variants, got 'no such file'"),
        (("smoke", "out", "--minutes", "soon"), "--minutes must be a whole number above 0"),
        (("smoke", "out", "--minutes"), "--minutes needs a value"),
    ],
)
def test_a_wrong_call_is_refused_in_one_sentence(words, sentence, tmp_path):
    done = call(*words)
    assert done.returncode == 2
    assert sentence in done.stderr.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_without_a_gpu_only_the_interpreted_smoke_runs(tmp_path):
    done = call("suite", tmp_path / "out")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("on_gpu.sh: torch finds no CUDA GPU here")
    done = call("attention", tmp_path / "out", "--device", "cpu")
    assert done.returncode == 2
    assert "--device cpu is for smoke alone, got attention" in done.stderr
    assert not (tmp_path / "out").exists()


def test_what_is_missing_is_said_in_one_sentence(tmp_path):
    fake = tmp_path / "triton-3.5.1.dist-info"
    fake.mkdir()
    (fake / "METADATA").write_text("Metadata-Version: 2.1\nName: triton\nVersion: 3.5.1\n")
    done = call("smoke", tmp_path / "out", "--device", "cpu", PYTHONPATH=str(tmp_path))
    assert done.returncode == 2
    assert done.stderr == "on_gpu.sh: triton 3.6 or newer is needed, this is 3.5.1\n"
    done = call("smoke", tmp_path / "out", PYTHON="no-such-python")
    assert done.returncode == 2
    assert "no-such-python is not there" in done.stderr


def test_help_names_every_stage():
    done = call("--help")
    assert done.returncode == 0
    assert all(f"\n  {stage} " in done.stdout for stage in on_gpu.STAGES)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there, smoke itself runs on the GPU")
@pytest.mark.slow
def test_smoke_on_a_cpu_leaves_rows_a_report_and_packed_logs(tmp_path):
    output = tmp_path / "out"
    words = ["--device", "cpu", "--operators", "patch_merging", "--dtypes", "float16", "bfloat16"]
    done = call("smoke", output, "--minutes", "3", *words)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "smoke: nothing failed"
    assert sorted(path.name for path in output.iterdir()) == [
        "logs.tar.gz",
        "report.txt",
        "rows.jsonl",
    ]
    rows = [json.loads(line) for line in (output / "rows.jsonl").read_text().splitlines()]
    # Emulated, bfloat16 is computed, too.
    ran = {(row["kernels"], row["dtype"]) for row in rows if "reason" not in row}
    is_built = extension.why_not("_emulated") is None
    emulated = {("cuda", "float16"), ("cuda", "bfloat16")} if is_built else set()
    assert ran == {("triton", "float16"), *emulated}
    for kernels, dtype in ran:
        mine = [row for row in rows if (row["kernels"], row["dtype"]) == (kernels, dtype)]
        assert {row["direction"] for row in mine} == {"forward", "backward"}
        assert all(row["within"] and 0 < row["error"] <= row["bound"] for row in mine)
    text = (output / "report.txt").read_text()
    assert re.search(r"^commit  ", text, re.MULTILINE)
    assert re.search(r"^patch_merging +triton +float16 .+ yes$", text, re.MULTILINE)
    with tarfile.open(output / "logs.tar.gz") as logs:
        assert any(name.endswith(".log") for name in logs.getnames())


def test_rows_of_before_are_continued(tmp_path):
    log = tmp_path / "ran"
    program = f"open({str(log)!r}, 'a').write('x')"
    parts = [part(name, program) for name in "abc"]
    first = conduct(tmp_path, parts[:2])
    assert first.status == 0
    second = conduct(tmp_path, parts)
    assert log.read_text() == "xxx"
    assert second.ran[0] == "2 of 3 parts ran before"
    assert [line.split()[0] for line in second.table.splitlines()] == ["name", "a", "b", "c"]
    # Of another commit or card, everything is new.
    conduct(tmp_path, parts, header={**HEADER, "commit": "4567"})
    conduct(tmp_path, parts, header={**HEADER, "card": "another"})
    assert log.read_text() == "x" * 9


def test_what_failed_is_named_told_and_tried_again(tmp_path):
    flag = tmp_path / "repaired"
    program = f"import os; print('words'); os.path.exists({str(flag)!r}) or 1 / 0"
    parts = [part("good", "pass"), part("bad", program)]
    told = conduct(tmp_path, parts)
    assert told.status == 1
    assert [name for name, _ in told.failures] == ["fake bad"]
    assert "1 failed: fake bad" in told.text(HEADER).splitlines()[0]
    assert "failed: fake bad" in told.text(HEADER)
    flag.touch()
    told = conduct(tmp_path, parts, header={**HEADER, "date": "tomorrow"})
    assert told.ran[0] == "1 of 2 parts ran before"
    assert told.status == 0


def test_the_deadline_ends_what_runs_and_says_what_is_left(tmp_path):
    slow = "import subprocess; subprocess.run(['sleep', '60'])"
    parts = [part("quick", "pass"), part("slow", slow), part("never", "pass")]
    began = time.monotonic()
    told = conduct(tmp_path, parts, seconds=3, processes=1)
    assert time.monotonic() - began < 20
    assert told.status == 3
    assert told.left == "2 of 3 parts are left"
    assert "this rows.jsonl continues" in told.verdict
    rows = (tmp_path / "rows.jsonl").read_text().splitlines()
    assert [json.loads(row)["name"] for row in rows] == ["quick"]


def test_a_signal_ends_the_stage_and_what_there_is_is_told(tmp_path, monkeypatch):
    parts = [part("quick", "pass"), part("slow", "import time; time.sleep(60)")]
    before = signal.signal(signal.SIGTERM, on_gpu.stop)
    # As soon as the first part has its row.
    monkeypatch.setattr(
        on_gpu, "add", lambda *words, add=on_gpu.add: (add(*words), signal.raise_signal(15))
    )
    try:
        told = conduct(tmp_path, parts, processes=2)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert told.ran[-1] == "ended by signal 15"
    assert told.status == 3
    assert [line.split()[0] for line in told.table.splitlines()] == ["name", "quick"]


def test_a_job_that_hangs_is_ended_alone(tmp_path):
    hung = Job("hung", python("import time; time.sleep(60)"), limit=0.5)
    other = Job("other", python("print(1)"))
    done = {d.job.name: d for d in run([hung, other], tmp_path, deadline=time.monotonic() + 60)}
    assert done["hung"].end == TOO_LONG
    assert "still running after" in done["hung"].failure
    assert (done["other"].end, done["other"].failure) == (ENDED, None)


def test_a_job_has_its_environment_its_folder_and_its_log(tmp_path, monkeypatch):
    monkeypatch.setenv("AWAY", "1")
    program = "import os; print(os.getcwd(), os.environ.get('AWAY'), os.environ['HERE'])"
    job = Job("job", python(program), {"AWAY": None, "HERE": "2"})
    (done,) = run([job], tmp_path, deadline=time.monotonic() + 60)
    assert done.output.split() == [str(ROOT), "None", "2"]
    assert done.log == tmp_path / "job.log"


def script_stage(tmp_path, program, monkeypatch):
    """The report of a stage of one script, which this program stands for."""
    script = tmp_path / "script.py"
    script.write_text(program)
    monkeypatch.setattr("bench.stages.ROOT", tmp_path)
    (tmp_path / "bench").mkdir()
    script.rename(tmp_path / "bench" / "script.py")
    context = Context(tmp_path, "cpu", time.monotonic() + 60, 1, ["--more", "7"])
    context.logs.mkdir()
    stage = scripts(["script", "--mine"])(context)
    return on_gpu.conduct("script", stage, Rows(context.rows, HEADER), context)


def test_a_script_gets_its_options_and_its_output_is_the_table(tmp_path, monkeypatch):
    told = script_stage(tmp_path, "import sys; print(*sys.argv[1:])", monkeypatch)
    rows = tmp_path / "rows.jsonl"
    assert told.table.strip() == f"--mine --device cpu --json {rows} --minutes 1.00 --more 7"
    assert told.status == 0


def test_a_script_says_how_it_went(tmp_path, monkeypatch):
    told = script_stage(tmp_path, "print('said'); raise SystemExit(2)", monkeypatch)
    assert told.status == 1
    assert told.failures == [("script", "said\n")]


def test_a_script_says_what_is_left(tmp_path, monkeypatch):
    told = script_stage(
        tmp_path, "print('a table'); print('3 places are left after 8')", monkeypatch
    )
    assert told.status == 3
    assert "continues" in told.verdict


def test_the_suite_counts_names_and_explains(tmp_path):
    (tmp_path / "test_it.py").write_text(
        "import pytest\n"
        "def test_good(): pass\n"
        "def test_bad(): assert 1 == 2, 'a reason'\n"
        "@pytest.mark.skip('not today')\n"
        "def test_skipped(): pass\n"
    )
    (tmp_path / "test_absent.py").write_text("import pytest\npytest.importorskip('no_such')\n")
    done, results = {}, {}
    for name in ("test_it", "test_absent"):
        results[name] = tmp_path / f"{name}.xml"
        command = [*suite.PYTEST, f"--junitxml={results[name]}", tmp_path / f"{name}.py"]
        (done[name],) = run([Job(name, command)], tmp_path, deadline=time.monotonic() + 60)
    row = suite.row_of(done["test_it"], results["test_it"])
    assert (row["passed"], row["failing"], row["skipped"]) == (1, 1, 1)
    ((name, trace),) = row["failures"]
    assert name.endswith("::test_bad")
    assert "a reason" in trace
    assert row["reasons"] == ["not today"]
    absent = suite.row_of(done["test_absent"], results["test_absent"])
    assert "failed" not in absent
    assert absent["reasons"] == ["could not import 'no_such': No module named 'no_such'"]
    table = suite.by_file([{"file": "test_it.py", **row}, {"file": "test_absent.py", **absent}])
    assert table.splitlines()[-1].split()[:4] == ["all", "1", "1", "2"]


def test_a_test_process_that_dies_fails(tmp_path):
    (tmp_path / "test_it.py").write_text("import os\ndef test_it(): os.abort()\n")
    results = tmp_path / "results.xml"
    job = Job("it", [*suite.PYTEST, f"--junitxml={results}", tmp_path / "test_it.py"])
    (done,) = run([job], tmp_path, deadline=time.monotonic() + 60)
    assert suite.row_of(done, results)["failed"] == "killed by signal 6"


def test_the_suite_begins_with_the_kernels_and_cuts_their_files(tmp_path, monkeypatch):
    files = ["metrics", "sampling", "emulation", "cuda_rows", "attention_windows"]
    files = [f"tests/test_{name}.py" for name in files]
    names = {file: [f"{file}::test[{n}]" for n in range(100)] for file in files[1:]}
    monkeypatch.setattr(suite, "collect", lambda files, context: names)
    context = Context(tmp_path, "cuda", time.monotonic(), 1, files)
    parts = suite.stage(context).parts
    assert [(p.key["file"].removeprefix("tests/test_"), p.key["part"]) for p in parts] == [
        ("attention_windows.py", "1/3"),
        ("attention_windows.py", "2/3"),
        ("attention_windows.py", "3/3"),
        ("cuda_rows.py", "1/3"),
        ("cuda_rows.py", "2/3"),
        ("cuda_rows.py", "3/3"),
        # Its programs are built by each process that runs a part of it.
        ("emulation.py", "1/1"),
        ("metrics.py", "1/1"),
        ("sampling.py", "1/1"),
    ]
    # What could not be collected is run as a file, and says why.
    assert parts[-2].job.command[-1] == "tests/test_metrics.py"
    assert len({p.job.name for p in parts}) == len(parts)
    # Tests that a missing library skipped have not been asked.
    other = suite.stage(context._replace(without=("cuda",))).parts
    assert all(p.key not in [q.key for q in parts] for p in other)


def test_what_other_sources_gave_is_not_continued(tmp_path, monkeypatch):
    for name in ("tests/emulation/faults.cu", "tests/test_it.py", "bench/a.py", "CMakeLists.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1")
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    for name in ("tests/emulation/faults.cu", "tests/test_it.py"):
        before = suite.digest(tmp_path / "tests")
        (tmp_path / name).write_text("2")
        assert suite.digest(tmp_path / "tests") != before
    for name in ("bench/a.py", "CMakeLists.txt"):
        before = machine.sources()
        (tmp_path / name).write_text("2")
        assert machine.sources() != before


def said(folder, text, status=0, end=ENDED):
    """A job that printed a text."""
    log = folder / "job.log"
    log.write_text(text)
    return Done(Job("job", ["job"]), end, status, 1.0, log)


CLEAN = "========= COMPUTE-SANITIZER\nsmoke's table\n========= {} SUMMARY: 0 {}\n"


def test_the_sanitizer_is_read(tmp_path):
    for text in (
        CLEAN.format("ERROR", "errors"),
        CLEAN.format("RACECHECK", "hazards displayed (0 errors, 0 warnings)"),
    ):
        assert sanitize.row_of(said(tmp_path, text)) == [{"errors": 0, "seconds": 1.0}]
    text = "========= COMPUTE-SANITIZER\n========= Invalid __global__ read of size 4 bytes\n"
    text += "=========     at kernel+0x70\n========= ERROR SUMMARY: 2 errors\n"
    (row,) = sanitize.row_of(said(tmp_path, text, sanitize.FOUND))
    assert row["failed"] == "2 errors, the first: Invalid __global__ read of size 4 bytes"
    assert "at kernel" in row["failures"][0][1]
    # A program that fails under it is no clean one.
    (row,) = sanitize.row_of(said(tmp_path, CLEAN.format("ERROR", "errors"), 1))
    assert row["failed"] == "smoke.py: exit status 1"
    (row,) = sanitize.row_of(said(tmp_path, "", -9, TOO_LONG))
    assert "still running" in row["failed"]
    (row,) = sanitize.row_of(said(tmp_path, "smoke's table\n"))
    assert row["failed"] == "it printed no summary"


def test_a_sanitizer_that_cannot_work_has_a_reason_and_no_failure(tmp_path):
    text = "========= COMPUTE-SANITIZER\n========= Error: Device not supported.\n"
    text += "========= ERROR SUMMARY: 1 error\n"
    (row,) = sanitize.row_of(said(tmp_path, text, 1))
    assert row == {"reason": "compute-sanitizer does not work here: Error: Device not supported."}
    (row,) = sanitize.row_of(said(tmp_path, "no injection library\n", 255))
    assert row["reason"].endswith("no injection library")


def test_each_tool_watches_each_operator_of_each_kernel_set(tmp_path, monkeypatch):
    monkeypatch.setattr(sanitize, "find", lambda: "/tools/compute-sanitizer")
    context = Context(tmp_path, "cuda", 0.0, 1, ["--dtypes", "float16"])
    parts = sanitize.stage(context).parts
    assert len(parts) == len({p.job.name for p in parts}) == 4 * 2 * 6
    uncached = {
        p.key["tool"] for p in parts if "PYTORCH_NO_CUDA_MEMORY_CACHING" in p.job.environment
    }
    assert uncached == {"memcheck", "initcheck"}
    for each in parts:
        words = " ".join(map(str, each.job.command))
        asked = "--kernels {kernels} --operators {operator} --dtypes float16".format(**each.key)
        assert words.endswith(asked)
        assert f"--tool {each.key['tool']} " in words
    chosen = sanitize.stage(context._replace(without=("cuda",))).parts
    assert {p.key["kernels"] for p in chosen} == {"triton"}


def test_without_the_sanitizer_there_is_a_reason_and_nothing_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(sanitize, "find", lambda: None)
    parts = sanitize.stage(Context(tmp_path, "cuda", 0.0, 1, ())).parts
    assert {" ".join(p.job.command) for p in parts} == {"true"}
    for each in parts:
        assert each.rows(said(tmp_path, "")) == [{"reason": "compute-sanitizer is not installed"}]


def keys(parts):
    return [tuple(p.key[name] for name in ("kernels", "operator", "dtype")) for p in parts]


def test_smoke_asks_both_kernel_sets_and_on_a_gpu_the_intrinsics(tmp_path):
    context = Context(tmp_path, "cuda", 0.0, 1, ())
    *parts, last = stages.smoke(context).parts
    every = [(k, o, d) for k in ("triton", "cuda") for o in OPERATORS for d in smoke.DTYPES]
    assert keys(parts) == every
    assert last.key == {"bench": "intrinsics"}
    assert last.job.command[1].endswith("bench/intrinsics.py")
    names = [p.job.name for p in (*parts, last)]
    assert len(set(names)) == len(names)
    # What could not be built is not asked; what there is is.
    without = stages.smoke(context._replace(without=("cuda",))).parts
    assert keys(without) == [key for key in every if key[0] == "triton"]
    # A CPU has nothing to compare its emulation with.
    assert keys(stages.smoke(context._replace(device="cpu")).parts) == every
    words = ["--kernels", "cuda", "--operators", "patch_merging", "--dtypes", "float16", "--x"]
    (one, _) = stages.smoke(context._replace(arguments=words)).parts
    asked = "--kernels cuda --operators patch_merging --dtypes float16 --x"
    assert asked in " ".join(map(str, one.job.command))


def test_a_script_that_dies_after_a_row_has_failed(tmp_path):
    file = tmp_path / "rows.jsonl"
    died = said(tmp_path, "", -11)
    assert stages.rows_of(died, file, {"of": "all"}) == [
        {"of": "all", "failed": "killed by signal 11"}
    ]
    file.write_text('{"of": "one"}\n')
    assert stages.rows_of(died, file, {"of": "all"})[0] == {"of": "one"}
    assert stages.rows_of(died, file, {"of": "all"})[1]["failed"] == "killed by signal 11"
    assert stages.rows_of(said(tmp_path, ""), file, {"of": "all"}) == [{"of": "one"}]
    # A row that says how it failed is enough.
    file.write_text('{"of": "one", "failed": "it is off"}\n')
    assert len(stages.rows_of(said(tmp_path, "", 1), file, {"of": "all"})) == 1


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_on_a_gpu_every_operator_that_a_kernel_set_has_must_run(device, monkeypatch):
    def refuse(asked, kernels, device):
        raise UnavailableError("a sentence")

    monkeypatch.setattr(smoke, "answers", refuse)
    options = Namespace(device=device, shapes="small", sanitized=False)
    for kernels in smoke.KERNELS:
        for operator in OPERATORS:
            (row,) = smoke.ask(operator, kernels, "float32", options)
            kind = "failed" if device == "cuda" else "reason"
            assert (row["kernels"], row["operator"]) == (kernels, operator)
            assert row.get(kind) == "a sentence"
            assert ("failed" in row) == (kind == "failed")


def test_a_row_that_was_cut_off_is_not_written(tmp_path):
    assert said(tmp_path, "", -9, CUT_OFF).failure is None


def test_smoke_judges_by_the_references_own_error():
    exact = torch.linspace(1, 2, 5, dtype=torch.float64)
    naive = (exact + 1e-3).float()
    good, bad = (exact + 1.5e-3).float(), (exact + 3e-3).float()
    for got, is_right in ((good, True), (bad, False), (good * float("nan"), False)):
        off, bound = judge(got, exact, naive, False)
        assert (off <= bound) == is_right
    # Movement is exact, shapes and dtypes are the reference's.
    for got in ((exact + 1e-6).float(), exact, exact.float()[:4]):
        off, bound = judge(got, exact, exact.float(), True)
        assert not off <= bound
