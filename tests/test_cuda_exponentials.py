"""The canonical kernel with a share of its exponentials on the units of float32."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from videoswin_kernels import extension

ROOT = Path(__file__).parents[1]
SHARE = 3
# Of a canonical window, in bfloat16: what the emulated kernel gives, as words.
PRINT = """
import torch
from videoswin_kernels import window_attention
torch.manual_seed(0)
qkv, table = torch.randn(1, 8, 7, 7, 96).bfloat16(), torch.randn(2535, 1)
out = window_attention(qkv, table, window=(8, 7, 7), num_heads=1, kernels="cuda")
print(out.view(torch.int16).flatten().tolist())
"""
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        extension.why_not("_emulated") is not None, reason=str(extension.why_not("_emulated"))
    ),
]


def call(command, where, **environment):
    done = subprocess.run(
        [sys.executable, *command],
        cwd=where,
        env={**os.environ, "VIDEOSWIN_CUDA": "off", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]
    return done.stdout


def test_the_canonical_kernel_is_within_its_budget_with_them(tmp_path):
    for name in ("csrc", "videoswin_kernels"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.so"))
    for name in ("CMakeLists.txt", "setup.py", "pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, tmp_path)
    flags = f"-DVIDEOSWIN_EXP2_ON_FMA={SHARE}"
    built = call(["setup.py", "build_ext", "--target=emulated"], tmp_path, CXXFLAGS=flags)
    library = built.splitlines()[-1]
    # Bits differ, so it is another kernel; and it passes what the one as it is passes.
    assert call(["-c", PRINT], ROOT) != call(["-c", PRINT], ROOT, VIDEOSWIN_EMULATED=library)
    # All but what holds the log-sum-exp to more than the four digits that these exponentials have;
    # the backward makes the weights of a row sum to 1 again.
    files = [f"tests/test_attention{name}.py" for name in ("_windows", "_extremes", "_traps")]
    chosen = "cuda-cpu and float16 and not log_sum_exp"
    said = call(["-m", "pytest", "-q", "-k", chosen, *files], ROOT, VIDEOSWIN_EMULATED=library)
    assert " passed" in said
