"""The kernels of csrc/cpu in a program without torch, under sanitizers and without.

Memory has the exact size of what is in it. AddressSanitizer and UndefinedBehaviorSanitizer see what
reads or writes beyond, ThreadSanitizer two threads that meet, and the program itself a number that
is wrong, was left as it was, or depends on how many threads there are.
"""

import subprocess
from pathlib import Path

import pytest
from emulation_suite import COMPILER, ENVIRONMENT, call, fixed_addresses, objects

PROGRAM = tuple(Path(__file__).with_name("cpu").glob("*.cpp"))
# Each program has kernels of one level: there is no choice.
KERNELS = tuple(
    path
    for path in (Path(__file__).parents[1] / "csrc" / "cpu").glob("*.cpp")
    if path.name != "choice.cpp"
)
# As CMakeLists.txt has them.
OPTIONS = ("-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-fstrict-aliasing")
# How kernels are compiled. The program itself is not instrumented: its loops take long enough.
BUILDS = {
    "plain": ("-O2",),
    "address": ("-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"),
    "thread": ("-O1", "-fsanitize=thread"),
}
# What a processor must have for a level, as csrc/cpu/choice.cpp asks it.
V3 = ("avx2", "fma", "bmi", "bmi2")
LEVELS = {
    "baseline": (),
    "v3": V3,
    "v4": (*V3, *(f"avx512{part}" for part in ("f", "bw", "cd", "dq", "vl"))),
}
slow = pytest.mark.slow
CASES = [
    pytest.param(level, build, marks=[] if (level, build) == ("baseline", "plain") else slow)
    for level in LEVELS
    for build in BUILDS
]


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("cpu")


def options_of(level, folder):
    """The compiler's options for a level; skips where it, or this processor, does not know it."""
    if not LEVELS[level]:
        return ()
    asked = " && ".join(f'__builtin_cpu_supports("{name}")' for name in LEVELS[level])
    source, probe = folder / "probe.cpp", folder / "probe"
    features = [f"-m{name}" for name in LEVELS[level]]
    source.write_text(f"int main() {{ return !({asked}); }}\n")
    command = [COMPILER, *features, source, "-o", probe]
    if subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip(f"{COMPILER} knows no {' '.join(features)}")
    if subprocess.run([probe], check=False).returncode != 0:
        pytest.skip(f"this processor has no {level}")
    return (*features, f"-DVIDEOSWIN_LEVEL={level}")


@pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler: set CXX")
@pytest.mark.parametrize(("level", "build"), CASES)
def test_kernels_are_clean(level, build, folder):
    options = (*OPTIONS, *options_of(level, folder))
    program = folder / f"{level}_{build}"
    call(
        *(COMPILER, *BUILDS[build], "-pthread", "-o", program),
        *objects(folder, level, PROGRAM, ("-O1", *options)),
        *objects(folder, program.name, KERNELS, (*BUILDS[build], *options)),
    )
    done = subprocess.run(
        [*(fixed_addresses() if build == "thread" else []), program],
        capture_output=True,
        text=True,
        # The kernels take no memory of their own, and not every place lets one look for leaks.
        env={**ENVIRONMENT, "ASAN_OPTIONS": "detect_leaks=0"},
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    assert done.stdout == f"{level}\n"
