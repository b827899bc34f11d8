"""Every Triton kernel compiles to machine code for each architecture, without spilling.

The interpreter proves what a kernel computes, and not that Triton's compiler takes it.
"""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", minversion="3.6")
PROGRAM = Path(__file__).with_name("triton_compile.py")
# Shared memory that a block of the smallest card of each architecture can have, in bytes.
SHARED = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
TENSOR_CORES = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA", 120: "HMMA"}
KERNELS = {
    "attention_forward_kernel",
    "bias_gradient_kernel",
    "column_sums_kernel",
    "expand_bias_kernel",
    "gather_rows_kernel",
    "key_value_gradient_kernel",
    "patch_merging_backward_kernel",
    "patch_merging_forward_kernel",
    "query_gradient_kernel",
    "residual_norm_backward_kernel",
    "residual_norm_forward_kernel",
    "table_gradient_kernel",
}
ATTENTION = {
    "attention_forward_kernel",
    "bias_gradient_kernel",
    "key_value_gradient_kernel",
    "query_gradient_kernel",
}
FLOAT32 = {"column_sums_kernel", "expand_bias_kernel", "table_gradient_kernel"}


@functools.cache
def compiled(architecture, *options):
    """What the program prints: one row for each kernel and specialisation."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", PROGRAM, str(architecture), *options],
        env=environment,
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def check(rows, architecture, kernels):
    assert {row["kernel"] for row in rows} == kernels
    for row in rows:
        is_half = "float16" in row["case"]
        assert row["shared"] <= SHARED[architecture], row
        most = 0 if is_half and architecture in (80, 90) else 256
        assert row["stack"] <= most, row
        # Tiles of few tokens are too small for the instructions of Hopper and Blackwell.
        if row["kernel"] in ATTENTION and is_half and "(8, 7, 7)" in row["case"]:
            assert TENSOR_CORES[architecture] in row["tensor_cores"], row


def check_halves(rows):
    """What bfloat16 is compiled from is what float16 is, which the interpreter has proven.

    The interpreter itself gets bfloat16 wrong.
    """
    codes = {
        dtype: {
            (row["kernel"], row["case"].removeprefix(dtype), str(row["constants"]), row["ttir"])
            for row in rows
            if row["case"].startswith(dtype)
        }
        for dtype in ("torch.float16", "torch.bfloat16")
    }
    # A float16 in the code of bfloat16, which that would not be equal to, but look alike.
    for row in rows:
        if row["case"].startswith("torch.bfloat16"):
            assert set(row["halves"]) <= {"bf16"}, row
    of_float16, of_bfloat16 = codes.values()
    assert of_bfloat16 <= of_float16
    # What reads float32 alone is compiled once for both.
    assert {name for name, *_ in of_float16 - of_bfloat16} <= FLOAT32
    assert {name for name, *_ in of_bfloat16} >= KERNELS - FLOAT32 - {"gather_rows_kernel"}


@pytest.mark.parametrize(
    "architecture", [90, *(pytest.param(each, marks=pytest.mark.slow) for each in (80, 100, 120))]
)
def test_kernels_of_a_common_model_compile(architecture):
    rows = compiled(architecture, "--quick")
    check(rows, architecture, KERNELS - {"gather_rows_kernel"})
    check_halves(rows)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", SHARED)
def test_all_kernels_compile(architecture):
    check(compiled(architecture), architecture, KERNELS)
