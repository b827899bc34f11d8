"""Programs of tests/emulation: the emulator and kernels for it, built by the host's compiler."""

import functools
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

HERE = Path(__file__).with_name("emulation")
EMULATOR = Path(__file__).parents[1] / "csrc" / "emulation"
COMPILER = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++")
OPTIONS = [
    *("-std=c++17", "-g", "-fno-strict-aliasing", "-fvisibility=hidden", "-pthread"),
    *("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"),
]
# How kernels are compiled. The emulator, as everywhere, is not instrumented.
BUILDS = {
    "plain": ("-O2",),
    "ucontext": ("-O2",),
    "address": ("-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"),
    "thread": ("-O1", "-fsanitize=thread"),
}
PROGRAMS = {
    "faults": (HERE / "faults.cu", HERE / "faults_main.cpp"),
    "launches": (HERE / "launches.cu",),
    "intrinsics": (EMULATOR / "intrinsics.cu", HERE / "intrinsics_main.cpp"),
}
# ThreadSanitizer would wait for a second in case that some thread races with the end.
ENVIRONMENT = {**os.environ, "TSAN_OPTIONS": "atexit_sleep_ms=0"}


def call(*command):
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-5000:]


@functools.cache
def objects(folder, kind, sources, options):
    def compiled(source):
        target = folder / f"{source.stem}_{kind}.o"
        call(COMPILER, *OPTIONS, *options, "-x", "c++", "-c", source, "-o", target)
        return target

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(compiled, sources))


@functools.cache
def program(folder, name, build):
    """The path of a program, built when it is first asked for."""
    fibers = ("ucontext", "-DVIDEOSWIN_UCONTEXT") if build == "ucontext" else ("assembly",)
    emulator = objects(folder, fibers[0], tuple(EMULATOR.glob("*.cpp")), ("-O2", *fibers[1:]))
    own = objects(folder, build, PROGRAMS[name], BUILDS[build])
    target = folder / f"{name}_{build}"
    call(COMPILER, *BUILDS[build], *own, *emulator, "-pthread", "-o", target)
    return target


@functools.cache
def fixed_addresses():
    """What a command begins with to get no random addresses, where that is allowed.

    Older ThreadSanitizers stop where a kernel makes more of an address random than they expect.
    """
    prefix = ["setarch", "-R"]
    if shutil.which(prefix[0]) is None:
        return []
    return [] if subprocess.run([*prefix, "true"], check=False).returncode else prefix


def run_program(folder, name, build, *arguments, given=None):
    prefix = fixed_addresses() if build == "thread" else []
    return subprocess.run(
        [*prefix, program(folder, name, build), *arguments],
        input=given,
        capture_output=True,
        env=ENVIRONMENT,
        timeout=600,
        check=False,
    )


def runner(tmp_path_factory):
    """run(program, build, *arguments, given=bytes) runs one of PROGRAMS in one of BUILDS."""
    if COMPILER is None:
        pytest.skip("there is no C++ compiler: set CXX")
    return functools.partial(run_program, tmp_path_factory.mktemp("emulation"))
