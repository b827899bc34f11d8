"""docs/accuracy.md: what the script finds is what the page says, and nothing is left out."""

import re
import subprocess
import sys
from pathlib import Path

import operator_suite as suite
import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/accuracy.md"
ROW = re.compile(r"^\| (\w+) \| (\w+) \| ([\w ]+) \|(.+)\|$", re.MULTILINE)
ROUNDING = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}


def rows(page):
    """{(operator, dtype, result): errors of eager and each kernel set, None where it has none}."""
    found = {}
    for operator, dtype, result, cells in ROW.findall(page)[1:]:
        errors = [None if cell.strip() == "-" else float(cell) for cell in cells.split("|")]
        found[operator, dtype, result] = errors
    return found


def assert_near(errors, dtype):
    """No kernel set is off by more than twice what eager is, and a part of a rounding."""
    eager, *ours = errors
    assert 0 <= eager < 16 * ROUNDING[dtype]
    for error in ours:
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


@suite.every("window_attention", compiled=True)
def test_the_script_finds_every_row_of_the_page(run, tmp_path):
    page = tmp_path / "new" / "accuracy.md"
    script = [sys.executable, ROOT / "bench/accuracy.py", "--tiny", "--output", page]
    subprocess.run(script, check=True, cwd=tmp_path)
    found = rows(page.read_text(encoding="utf-8"))
    assert list(found) == list(rows(PAGE.read_text(encoding="utf-8")))
    # On a CPU the interpreter gets bfloat16 wrong, and the page has no number of it.
    for (operator, dtype, _), errors in found.items():
        is_taken = dtype in {str(d).removeprefix("torch.") for d in run.dtypes(operator)}
        assert (errors[1] is not None) == is_taken
        assert_near(errors, dtype)


def test_rows_are_read_with_their_gaps():
    page = "| operator | dtype | of | eager | triton |\n|---|---|---|---|---|\n"
    page += "| residual_norm | bfloat16 | norm | 1.7e-03 | - |\n"
    assert rows(page) == {("residual_norm", "bfloat16", "norm"): [1.7e-3, None]}
    with pytest.raises(ValueError, match="could not convert"):
        rows(page.replace("1.7e-03", "n/a"))
