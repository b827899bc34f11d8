"""The smaller benches on a CPU: ceilings, variants, intrinsics of kernels."""

import json
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
import torch
from bench_suite import rows_of

pytest.importorskip("triton", minversion="3.6")

import triton

from bench import ceilings, intrinsics, tune
from bench.attention_providers import MAKERS
from bench.intrinsic_checks import CHECKS
from videoswin_kernels import extension

CPU = torch.device("cpu")

# An operator of the kernels' own, which no other test changes.
CONFIGURATION = "attention.configuration"


@pytest.fixture(autouse=True)
def providers(one_thread):
    """What becomes a provider here, as variants do, is none in the tests of other files."""
    with patch.dict(MAKERS):
        yield


def test_ceilings_of_a_cpu(tmp_path, capsys):
    assert ceilings.main(["--device", "cpu", "--json", str(tmp_path / "rows.jsonl")]) == 0
    rows = {row["what"]: row for row in rows_of(tmp_path / "rows.jsonl")}
    assert rows["device copy"]["value"] > 0
    assert rows["matrix product in torch"]["value"] > 0
    assert {name for name, row in rows.items() if "reason" in row} == {
        "exp2 in Triton",
        *ceilings.OF_CUDA,
    }


def test_without_a_compiler_each_of_its_ceilings_says_so(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    rows = list(ceilings.cuda_rates(CPU))
    assert [row["what"] for row in rows] == list(ceilings.OF_CUDA)
    assert {row["reason"] for row in rows} == {"nvcc is not installed"}


def test_ceilings_compile_to_the_instructions_they_are_named_for(tmp_path):
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc is not installed")
    binary = tmp_path / "ceilings"
    flags = [*ceilings.flags("90a", True), "-Xptxas", "-warn-spills,-Werror"]
    ceilings.run([nvcc, *flags, "-o", binary, ceilings.SOURCE])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    code = subprocess.run([tool, "-sass", binary], capture_output=True, text=True, check=True)
    for instruction in ("MUFU.EX2", "LDS.128", "HMMA.16816.F32.BF16", "HGMMA.64x128x16.F32.BF16"):
        assert instruction in code.stdout


def test_a_compiler_that_fails_says_why(tmp_path):
    with pytest.raises(RuntimeError, match="ended with 3: no good"):
        ceilings.run(["sh", "-c", "echo no good >&2; exit 3"])


def variants(tmp_path, *lines):
    path = tmp_path / "variants.jsonl"
    path.write_text("\n".join(lines))
    return path


def variant(**items):
    plain = {"name": "small", "predicted": 0.5, "stage": 1, "direction": "forward"}
    return json.dumps({**plain, "set": {CONFIGURATION: {"block_queries": 16}}, **items})


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        ([], "no variants"),
        (["{"], "line 1"),
        (["[]"], "line 1: a variant is a JSON object"),
        (['{"name": "a"}'], "missing .*predicted"),
        ([variant(colour="red")], r"unknown \['colour'\]"),
        ([variant(direction="up")], "direction must be one of forward"),
        ([variant(stage=5)], "stage must be 1 to 4, got 5"),
        ([variant(name="as it is")], "there are two of 'as it is'"),
        ([variant(), "", variant()], "line 3: there are two of 'small'"),
        ([variant(set={CONFIGURATION: {"speed": 9}})], r"attention.configuration has no .'speed'"),
        ([variant(set={"attention.nothing": {"num_warps": 9}})], "attention.nothing has no"),
        ([variant(set={"no_file.configuration": {"num_warps": 9}})], "no_file"),
    ],
)
def test_a_file_of_variants_is_checked(lines, sentence, tmp_path):
    with pytest.raises(tune.VariantError, match=sentence):
        tune.read(variants(tmp_path, *lines))


def test_a_variant_changes_what_is_launched_and_no_more():
    module, name = tune.locate(CONFIGURATION)
    original = getattr(module, name)
    arguments = (90, torch.float16, 392, 32)
    before = original(*arguments)
    kernels = tune.Kernels([json.loads(variant())])
    try:
        kernels.become({CONFIGURATION: {"block_queries": 16}})
        assert getattr(module, name)(*arguments) == before._replace(block_queries=16)
        kernels.become({CONFIGURATION: {"num_warps": 1}})
        assert getattr(module, name)(*arguments) == before._replace(num_warps=1)
    finally:
        kernels.become({})
    assert getattr(module, name) is original


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs interpreted kernels")
def test_variants_are_judged_timed_and_told(tmp_path, capsys):
    lines = [
        variant(),
        variant(name="impossible", set={CONFIGURATION: {"block_queries": 48}}),
    ]
    words = [str(variants(tmp_path, *lines)), "--device", "cpu", "--preset", "tiny"]
    output = tmp_path / "rows.jsonl"
    assert tune.main([*words, "--json", str(output)]) == 0
    rows = {row["variant"]: row for row in rows_of(output) if row["bench"] == "tune"}
    assert list(rows) == ["as it is", "small", "impossible"]
    assert rows["small"]["predicted"] == 0.5
    assert rows["small"]["ms"] > 0
    assert "power of 2" in rows["impossible"]["reason"]
    assert "small" in capsys.readouterr().out
    # Called again, it measures nothing; a CPU is not timed but for this.
    assert tune.main([*words, "--json", str(output)]) == 0
    assert len(rows_of(output)) == 4
    with pytest.raises(SystemExit):
        tune.main([words[0], "--device", "cpu"])
    assert "interpreted kernels are not timed" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs interpreted kernels")
def test_a_wrong_variant_has_no_time(tmp_path, monkeypatch, capsys):
    module, name = tune.locate(CONFIGURATION)
    launch = module.launch_window_attention

    def broken(out, *arguments):
        launch(out, *arguments)
        if getattr(module, name)(90, torch.float32, 392, 32).num_stages == 7:
            out.mul_(1.01)

    monkeypatch.setattr(module, "launch_window_attention", broken)
    file = variants(tmp_path, variant(set={CONFIGURATION: {"num_stages": 7}}))
    output = tmp_path / "rows.jsonl"
    words = [str(file), "--device", "cpu", "--preset", "tiny", "--json", str(output)]
    assert tune.main(words) == 1
    row = next(row for row in rows_of(output) if row.get("variant") == "small")
    assert "the output is off" in row["wrong"]
    assert "ms" not in row


@pytest.fixture(scope="module")
def control():
    try:
        return extension.control()
    except ImportError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def emulate(control):
    run = intrinsics.runner(control, control.run_emulated, "cpu", intrinsics.EMULATED_FILL)
    # Many are asked the same, and only what stands for the GPU differs.
    known = {}

    def once(name, given):
        key = name, given.tobytes()
        if key not in known:
            known[key] = run(name, given)
        return known[key].copy()

    return once


def test_intrinsics_are_the_same_in_another_order_of_threads(control, emulate):
    before = control.settings()
    control.set_settings(order="random", seed=1, poison=False, late_copies=False)
    try:
        run = intrinsics.runner(control, control.run_emulated, "cpu", intrinsics.NATIVE_FILL)
        rows = list(intrinsics.rows(control, emulate, run))
    finally:
        control.set_settings(**before)
    assert [row["intrinsic"] for row in rows] == list(control.intrinsics())
    # None is asked that is not there, and none that is there is not asked.
    assert set(CHECKS) == set(control.intrinsics())
    for row in rows:
        assert (row["differ"], row["worst"], row["within"]) == (0, 0, True), row
        assert row["words"] >= control.intrinsics()[row["intrinsic"]][1]
        assert "failed" not in row


@pytest.mark.parametrize("name", CHECKS)
def test_an_intrinsic_with_another_bit_has_failed(name, emulate):
    # Of a float the first of its fraction, of two halves that of one of them.
    row = intrinsics.compare(name, emulate, lambda *asked: emulate(*asked) ^ 0x00400000)
    assert not row["within"]
    assert row["failed"].startswith(f"{row['differ']} of {row['words']} words differ")


APPROXIMATE = ("mma_float16", "mma_bfloat16", "exp2_approx")


@pytest.mark.parametrize("name", [name for name in CHECKS if name not in APPROXIMATE])
def test_the_last_bit_of_one_word_is_enough(name, emulate):
    def run(name, given):
        found = emulate(name, given)
        # Of all runs it is a word without NaN.
        found[len(found) // 3] ^= 1
        return found

    row = intrinsics.compare(name, emulate, run)
    assert 1 <= row["differ"] <= 6
    assert row["worst"] == 1
    assert "failed" in row


@pytest.mark.parametrize("name", APPROXIMATE)
def test_what_is_approximate_may_differ_within_its_bound(name, emulate):
    def off_by(part):
        def run(name, given):
            number = emulate(name, given).view(np.float32)
            return (number * np.float32(1 + part)).view(np.uint32)

        return intrinsics.compare(name, emulate, run)

    bound = CHECKS[name].bound
    near, far = off_by(bound / 2), off_by(4 * bound)
    assert 0 < near["worst"] <= bound
    assert near["within"]
    assert far["worst"] > bound
    assert "failed" in far


@pytest.mark.parametrize("name", ["mma_float16", "mma_bfloat16"])
def test_whole_numbers_are_added_exactly(name, emulate):
    def run(name, given):
        sums = emulate(name, given).view(np.float32)
        whole = np.flatnonzero(sums == sums.round())
        sums[whole[:1]] += 1
        return sums.view(np.uint32)

    row = intrinsics.compare(name, emulate, run)
    assert row["differ"] >= 1
    assert "failed" in row


def test_powers_are_subnormal_nowhere(emulate):
    def run(name, given):
        with np.errstate(all="ignore"):
            x = given.view(np.float32).astype(np.float64)
            power = np.exp2(x).astype(np.float32)
        return np.where(np.isnan(x), np.uint32(0x7FFFFFFF), power.view(np.uint32))

    assert "failed" in intrinsics.compare("exp2_approx", emulate, run)
    # They alone are wrong.
    flushed = intrinsics.compare(
        "exp2_approx", emulate, lambda *asked: np.where(run(*asked) < 0x00800000, 0, run(*asked))
    )
    assert flushed["within"]


@pytest.mark.parametrize(("name", "nan"), [("round_to_float16", 0x7E01), ("pack_bfloat16", 0xFFC1)])
def test_any_nan_will_do(name, nan, emulate):
    def run(name, given):
        halves = emulate(name, given).view(np.uint16)
        halves[halves == 0x7FFF] = nan
        return halves.view(np.uint32)

    assert (
        run(name, CHECKS[name].inputs(np.random.default_rng(0))[-1]).view(np.uint16) == nan
    ).any()
    assert intrinsics.compare(name, emulate, run)["within"]


def test_a_word_that_nobody_writes_has_failed(control):
    emulate, run = (
        intrinsics.runner(control, lambda *words: 0, "cpu", fill)
        for fill in (intrinsics.EMULATED_FILL, intrinsics.NATIVE_FILL)
    )
    for name in CHECKS:
        assert "failed" in intrinsics.compare(name, emulate, run), name


def test_an_intrinsic_that_cannot_be_run_says_so(control, emulate):
    run = intrinsics.runner(control, lambda *words: 7, "cpu", intrinsics.NATIVE_FILL)
    row = intrinsics.compare("votes", emulate, run)
    assert row == {"failed": "RuntimeError: its launch on cpu ends with error 7"}
    assert "has none for it" in intrinsics.compare("new", emulate, emulate)["failed"]


@pytest.mark.parametrize(
    ("error", "kind", "sentence"),
    [
        (ModuleNotFoundError("No module"), "reason", "_C is not built; pip install pybind11"),
        (ImportError("_C: it is not built"), "failed", "_C: it is not built"),
        (None, "failed", "_C has none for a GPU"),
    ],
)
def test_without_the_module_there_is_a_row_that_says_why(error, kind, sentence, monkeypatch):
    def control():
        if error is not None:
            raise error
        return SimpleNamespace()

    monkeypatch.setattr(extension, "control", control)
    (row,) = intrinsics.asked()
    assert row[kind].startswith(sentence)
    assert {*row} == {"bench", "intrinsic", kind}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to compare with")
def test_an_emulation_is_never_compared_with_itself(capsys):
    with pytest.raises(SystemExit) as ended:
        intrinsics.main([])
    assert ended.value.code == 2
    assert "torch finds no CUDA GPU here" in capsys.readouterr().err
