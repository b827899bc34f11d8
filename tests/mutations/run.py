"""Plants each mistake of this folder in a copy of the last commit; the tests it names must fail.

`python tests/mutations/run.py [--without-control] [NAME...]`. A patch begins with a sentence that
says what is wrong in it, and a line `tests: ` with what pytest is to run; where it touches C++, the
libraries are built anew, and of those tests it is the ones of their kernels, CUDA's emulated. Exits
with 1 where a mistake went unseen, where the tests fail without it (the control), or where a patch
no longer fits the code.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from queue import SimpleQueue

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]
# pytest's own exit statuses: all passed, some failed.
PASSED, FAILED = 0, 1
# That of setup.py where a tool is missing.
MISSING = 3
# Where kernels in C++ and their launchers are, and how pytest tells their tests from others; the
# first that a patch touches counts.
BUILT = {
    "/csrc/cpu/": "cpu-cpu or test_cpu",
    "/csrc/library_cpu.cpp": "cpu-cpu or test_cpu",
    "/videoswin_kernels/cpu/": "cpu-cpu or test_cpu",
    "/csrc/": "cuda",
    "/videoswin_kernels/cuda/": "cuda",
}


@contextmanager
def checkout() -> Iterator[Path]:
    """A worktree of the last commit."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        git = ["git", "-C", ROOT, "worktree"]
        subprocess.run([*git, "add", "--quiet", "--detach", tree, "HEAD"], check=True)
        try:
            yield tree
        finally:
            subprocess.run([*git, "remove", "--force", tree], check=True)


def built(patch: Path) -> str | None:
    """Which tests are those of the kernels that it touches; None where nothing is to be built."""
    text = patch.read_text(encoding="utf-8")
    return next((tests for path, tests in BUILT.items() if path in text), None)


def build(tree: Path) -> int:
    """Builds the libraries from the worktree's sources; the exit status of setup.py."""
    command = [sys.executable, "setup.py", "build_ext"]
    environment = {**os.environ, "VIDEOSWIN_CUDA": "off"}
    return subprocess.run(
        command, cwd=tree, env=environment, capture_output=True, check=False
    ).returncode


def run_tests(tree: Path, tests: list[str], *options: str) -> int:
    """pytest's exit status; the first failure is enough."""
    chosen = ("-m", "not slow or interpreted")
    command = [sys.executable, "-m", "pytest", "-x", "-q", *chosen, *options, *tests]
    return subprocess.run(
        command, cwd=tree, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False
    ).returncode


def judge(tree: Path, patch: Path, tests: list[str]) -> str | None:
    """What is wrong with a mutation, None if its tests catch it."""
    apply = ["git", "-C", tree, "apply", patch]
    if subprocess.run(apply, check=False).returncode:
        return "does not fit the code any more"
    try:
        chosen = built(patch)
        if chosen and build(tree):
            return "does not compile"
        status = run_tests(tree, tests, *(["-k", chosen] if chosen else []))
    finally:
        subprocess.run(["git", "-C", tree, "checkout", "--quiet", "."], check=True)
    # What reads astray in C++ may end the process by a signal, which is a negative status.
    if status == FAILED or status < 0:
        return None
    return "was not seen" if status == PASSED else f"pytest ended with {status}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="patches to try (default: all)")
    help = "where all tests are run without any mistake anyway, of a tree without changes"
    parser.add_argument("--without-control", action="store_true", help=help)
    options = parser.parse_args()
    patches = [FOLDER / f"{name}.patch" for name in options.names] or sorted(FOLDER.glob("*.patch"))
    asked = {}
    for patch in patches:
        lines = patch.read_text(encoding="utf-8").splitlines()
        (tests,) = (line for line in lines if line.startswith("tests: "))
        asked[patch] = tests.removeprefix("tests: ").split()
    unseen, processes = 0, min(len(patches), max(2, min(4, os.cpu_count() or 1)))
    trees = SimpleQueue()

    def judge_somewhere(patch: Path) -> str | None:
        tree = trees.get()
        try:
            return judge(tree, patch, asked[patch])
        finally:
            trees.put(tree)

    with ExitStack() as stack:
        for _ in range(processes):
            trees.put(stack.enter_context(checkout()))
        sound = sorted({test for tests in asked.values() for test in tests})
        tree = trees.get()
        if any(map(built, patches)):
            status = build(tree)
            if status == MISSING:
                print("no mistakes in C++, which cannot be built here")
                patches = [patch for patch in patches if not built(patch)]
            elif status:
                print("the C++ libraries do not compile without any mutation")
                return 1
        spread = (f"-n{processes}", "--dist=loadfile")
        changes = subprocess.run(
            ["git", "-C", ROOT, "status", "--porcelain", "--untracked-files=no"],
            check=True,
            capture_output=True,
        )
        # What is in no commit is not in the copies: then other tests are run elsewhere.
        is_asked = not options.without_control or changes.stdout
        # Else at least the copy must have all that its tests import.
        spread = spread if is_asked else (*spread, "--collect-only")
        if run_tests(tree, sound, *spread) != PASSED:
            print(f"these fail without any mutation: {' '.join(sound)}")
            return 1
        trees.put(tree)
        pool = stack.enter_context(ThreadPoolExecutor(processes))
        for patch, problem in zip(patches, pool.map(judge_somewhere, patches), strict=True):
            print(f"{patch.stem:<44}{problem or 'caught'}", flush=True)
            unseen += problem is not None
    print(f"{len(patches) - unseen} of {len(patches)} caught")
    return 1 if unseen else 0


if __name__ == "__main__":
    sys.exit(main())
