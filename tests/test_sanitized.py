"""The CUDA C++ kernels under sanitizers: emulated, on the small shapes of the operators' tests.

AddressSanitizer and UndefinedBehaviorSanitizer see an access outside of a tensor or of a block's
shared memory, and one that is not aligned. ThreadSanitizer is told of every CUDA thread: it sees
two of them meet in memory without a barrier between, whatever came of it.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROWS = ("cyclic_shift", "window_partition", "patch_merging", "residual_norm", "cuda_rows")
FILES = (*ROWS, "attention", "attention_backward", "cuda_attention")
# Not Inductor, nor more memory than a sanitizer has shadows for.
LEFT_OUT = ("compiles", "beyond", "far", "65535", "settings", "order")
# Nor attention at length: windows of more than 392 tokens, or what other tests come to as well.
LEFT_OUT += ("16x7x7", "whose", "14001", "10500", "rise_late")
VARIANTS = {
    "emulated_address": (("libasan.so", "libubsan.so"), r"AddressSanitizer|runtime error"),
    "emulated_thread": (("libtsan.so",), r"WARNING: ThreadSanitizer|data race"),
}
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="the sanitizers are those of g++"),
]


def runtime(name):
    """Where g++ has a sanitizer's library."""
    command = ["g++", f"-print-file-name={name}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.parametrize("target", VARIANTS)
def test_kernels_are_clean(target):
    command = [sys.executable, "setup.py", "build_ext", f"--target={target}"]
    environment = {**os.environ, "VIDEOSWIN_CUDA": "off", "CXX": "g++"}
    built = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert built.returncode == 0, built.stderr
    preloaded, report = VARIANTS[target]
    environment |= {
        "VIDEOSWIN_EMULATED": built.stdout.splitlines()[-1],
        "LD_PRELOAD": ":".join(map(runtime, preloaded)),
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "halt_on_error=1",
        "OMP_NUM_THREADS": "1",
    }
    chosen = "cuda-cpu" + "".join(f" and not {name}" for name in LEFT_OUT)
    files = [f"tests/test_{name}.py" for name in FILES]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-s", "-k", chosen, *files],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    said = done.stdout + done.stderr
    assert not re.search(report, said), said[-6000:]
    assert done.returncode == 0, said[-3000:]
    assert int(re.search(r"(\d+) passed", said)[1]) > 600
