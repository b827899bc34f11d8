"""docs/accuracy.md: what the script finds is what the page says, and nothing is left out."""

import re
import subprocess
import sys
from pathlib import Path

import operator_suite as suite
import pytest
import torch

from bench import accuracy

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/accuracy.md"
ROW = re.compile(r"^\| (\w+) \| (\w+) \| ([\w ]+) \|(.+)\|$", re.MULTILINE)
ROUNDING = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}


def rows(page):
    """{(operator, dtype, result): {"eager" or a kernel set: its error, None where it has none}}."""
    (*_, names), *lines = ROW.findall(page)
    names, found = [name.strip() for name in names.split("|")], {}
    for operator, dtype, result, cells in lines:
        errors = [None if cell.strip() == "-" else float(cell) for cell in cells.split("|")]
        found[operator, dtype, result] = dict(zip(names, errors, strict=True))
    return found


def assert_near(errors, dtype):
    """No kernel set is off by more than twice what eager is, and a part of a rounding."""
    eager = errors["eager"]
    assert 0 <= eager < 16 * ROUNDING[dtype]
    for error in errors.values():
        assert error is None or 0 <= error <= 2 * eager + ROUNDING[dtype] / 8


def test_the_page_names_every_operator_dtype_and_gradient():
    found = rows(PAGE.read_text(encoding="utf-8"))
    parts = {
        "window_attention": "out/q/k/v/table/k of pads/v of pads",
        "patch_merging": "out/x/weight/bias",
        "residual_norm": "sum/norm/x/branch/weight/bias",
    }
    assert set(found) == {
        (operator, dtype, part if part in ("out", "sum", "norm") else f"gradient of {part}")
        for operator, names in parts.items()
        for part in names.split("/")
        for dtype in ROUNDING
    }
    for (_, dtype, _), errors in found.items():
        assert_near(errors, dtype)


def test_the_script_finds_every_row_of_the_page(tmp_path):
    page = tmp_path / "new" / "accuracy.md"
    script = [sys.executable, ROOT / "bench/accuracy.py", "--tiny", "--output", page]
    subprocess.run(script, check=True, cwd=tmp_path)
    found = rows(page.read_text(encoding="utf-8"))
    assert list(found) == list(rows(PAGE.read_text(encoding="utf-8")))
    # Interpreted, bfloat16 is wrong, and the page has no number of it; emulated, it is right.
    runs = [suite.Run(kernels, suite.DEVICES[-1]) for kernels in suite.NAMED]
    for (operator, dtype, _), errors in found.items():
        taken = [
            run.kernels
            for run in runs
            if run in suite.runs(operator) and getattr(torch, dtype) in run.dtypes(operator)
        ]
        assert [name for name, error in errors.items() if error is not None] == ["eager", *taken]
        assert_near(errors, dtype)


ON_A_CPU = {"triton": "Triton's kernels interpreted", "cuda": "CUDA C++ kernels emulated"}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("present", [[], ["triton"], ["cuda"], ["triton", "cuda"]])
def test_the_page_says_how_kernels_ran_and_why_some_did_not(present, device):
    row = {"operator": "residual_norm", "dtype": "bfloat16", "of": "norm", "eager": 1e-3}
    row |= dict.fromkeys(present, 1e-3)
    reasons = {kernels: f"{kernels} cannot" for kernels in suite.NAMED}
    facts = {"device": device, "card": "a card", "commit": "0", "torch": "2", "triton": "3"}
    page = accuracy.page([row], reasons, facts, 392)
    for kernels, sentence in ON_A_CPU.items():
        assert (sentence in page) == (kernels in present and device == "cpu")
    said = [line for line in page.splitlines() if line.startswith("- ")]
    assert said == [f"- {kernels} cannot." for kernels in present]
    assert "on a card;" in page or (present and device == "cpu")
    assert list(*rows(page).values()) == ["eager", *present]


def test_rows_are_read_with_their_gaps():
    page = "| operator | dtype | of | eager | triton |\n|---|---|---|---|---|\n"
    page += "| residual_norm | bfloat16 | norm | 1.7e-03 | - |\n"
    key = ("residual_norm", "bfloat16", "norm")
    assert rows(page) == {key: {"eager": 1.7e-3, "triton": None}}
    with pytest.raises(ValueError, match="could not convert"):
        rows(page.replace("1.7e-03", "n/a"))
