"""Builds the C++ libraries of csrc/; all else about the package stands in pyproject.toml.

    python setup.py build_ext                             # into videoswin_kernels/, always
    python setup.py build_ext --target=emulated_thread    # one target of CMakeLists.txt, left in
                                                          # build/: the last line says where

From the environment, read here alone:
    VIDEOSWIN_CUDA           auto (as unset): CUDA kernels where nvcc works; on: or fail; off: none
    VIDEOSWIN_ARCHITECTURES  "80-real", say, in place of those that CMakeLists.txt names
    CXX, CUDA_HOME           the compilers, where they are not the first of PATH

Ends with status 3 where a tool is missing; the last line says which, and how to get it.
"""

import filecmp
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar, NamedTuple, NoReturn

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
PACKAGE = ROOT / "videoswin_kernels"
BUILD = ROOT / "build"
MISSING = 3
# Where CMakeLists.txt leaves each target.
TARGETS = {
    "ops": "lib/_ops.so",
    "emulated": "lib/_emulated.so",
    "module": "lib/_C.so",
    "emulated_address": "address/_emulated.so",
    "emulated_thread": "thread/_emulated.so",
}


def refuse(sentence: str, status: int = 1) -> NoReturn:
    print(f"videoswin_kernels: {sentence}", file=sys.stderr)
    raise SystemExit(status)


def number(text: str) -> tuple[int, ...]:
    """The first two parts of the first version that a text names; () if it names none."""
    found = re.search(r"(\d+)\.(\d+)", text)
    return tuple(map(int, found.groups())) if found else ()


if number(setuptools.__version__) < (77, 0):
    refuse(f"setuptools 77 or newer is needed, {setuptools.__version__} is installed; "
           "pip install -U setuptools", MISSING)  # fmt: skip

from setuptools.command.bdist_wheel import bdist_wheel  # noqa: E402 (older ones lack it)


def find_torch() -> tuple[Path, str]:
    """The folder of the torch package, and its version; it is not imported, which takes seconds."""
    spec = find_spec("torch")
    if spec is None:
        refuse(f"torch is not installed for {sys.executable}; pip install torch", MISSING)
    folder = Path(spec.submodule_search_locations[0]).resolve()
    version = re.search(r"__version__ = ['\"](.+)['\"]", (folder / "version.py").read_text())[1]
    if number(version) < (2, 10):
        refuse(f"torch 2.10 or newer is needed, {version} is installed; pip install -U torch")
    return folder, version


def find_tool(name: str, folder: str) -> str:
    """A program of the pip package of that name, which says its folder, or else of PATH."""
    path = os.environ.get("PATH", "")
    if find_spec(name) is not None:
        path = os.pathsep.join([getattr(import_module(name), folder), path])
    found = shutil.which(name, path=path)
    if found is None:
        refuse(f"{name} is neither in PATH nor installed by pip; pip install {name}", MISSING)
    return found


def find_cmake() -> str:
    cmake = find_tool("cmake", "CMAKE_BIN_DIR")
    version = number(run(cmake, "--version").stdout)
    if version < (3, 25):
        found = ".".join(map(str, version)) or "no version"
        refuse(f"CMake 3.25 or newer is needed, {cmake} is {found}; pip install cmake", MISSING)
    return cmake


def find_compiler() -> str:
    named = os.environ.get("CXX")
    for name in [named] if named else ["c++", "g++", "clang++"]:
        found = shutil.which(name)
        if found is not None:
            # c++ and g++ are often one; clang++ is a link to clang, which asks what it is called.
            real = os.path.realpath(found)
            return real if "++" in os.path.basename(real) else found
    if named:
        refuse(f"CXX names no program: {named}")
    refuse("there is no C++ compiler in PATH; on Debian: apt install g++", MISSING)


def how_to_get_nvcc() -> str:
    """pip's packages of nvcc, of the release that this torch asks for: another would replace it."""
    for requirement in metadata.requires("torch") or []:
        found = re.match(r"cuda-toolkit\[.*\]==([\d.]+)", requirement)
        if found:
            return f"pip install 'cuda-toolkit[nvcc,cccl]=={found[1]}' and build again"
    return "install the CUDA toolkit and build again"


def find_nvcc(torch: Path) -> str | None:
    """The CUDA compiler: that of CUDA_HOME, or of PATH, or of the pip packages beside torch."""
    home, path = (os.environ.get(name) for name in ("CUDA_HOME", "PATH"))
    places = [home and f"{home}/bin", path, f"{torch.parent}/nvidia/cu13/bin"]
    found = shutil.which("nvcc", path=os.pathsep.join(filter(None, places)))
    return found and os.path.abspath(found)


def run(*command: str, **options: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        command, capture_output=True, encoding="utf-8", errors="replace", **options
    )


def why_nvcc_fails(nvcc: str, compiler: str, architectures: str) -> str | None:
    """What a CUDA compiler says first of an empty kernel; None if it compiles and links it."""
    options = ["-ccbin", compiler]
    for architecture in architectures.split(";"):
        level, _, kind = architecture.partition("-")
        code = f"compute_{level}" if kind == "virtual" else f"sm_{level}"
        options.append(f"-gencode=arch=compute_{level},code={code}")
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "empty.cu").write_text("__global__ void empty() {}\nint main() {}\n")
        try:
            done = run(nvcc, *options, "-o", f"{folder}/empty", f"{folder}/empty.cu")
        except OSError as error:
            return str(error)
    if done.returncode == 0:
        return None
    lines = [" ".join(line.split()) for line in (done.stderr + done.stdout).splitlines()]
    errors = [line for line in lines if re.search("error|fatal|cannot|not found", line, re.I)]
    return next(filter(None, [*errors, *lines]), f"it ends with status {done.returncode}")


def find_cuda(torch: Path, compiler: str, architectures: str, proven: Path) -> tuple[str, str]:
    """(the CUDA compiler, "") or ("", why there is none); `proven` remembers what has worked."""
    wish = os.environ.get("VIDEOSWIN_CUDA") or "auto"
    if wish not in ("auto", "on", "off"):
        refuse(f"VIDEOSWIN_CUDA must be auto, on or off, got {wish}")
    if wish == "off":
        return "", "VIDEOSWIN_CUDA=off was set"
    nvcc = find_nvcc(torch)
    if nvcc is None:
        reason = f"no nvcc in CUDA_HOME, in PATH, or beside torch; {how_to_get_nvcc()}"
    else:
        attempt = "\n".join([nvcc, compiler, architectures])
        failure = None
        if not proven.exists() or proven.read_text() != attempt:
            failure = why_nvcc_fails(nvcc, compiler, architectures)
        if failure is None:
            proven.write_text(attempt)
            return nvcc, ""
        reason = f"{nvcc} does not work: {failure}"
    if wish == "on":
        refuse(f"VIDEOSWIN_CUDA=on was set, but {reason}")
    return "", reason


class Build(NamedTuple):
    """A build folder that CMake has configured; `without` says what is left out, and why."""

    folder: Path
    cmake: str
    libraries: tuple[str, ...]
    without: tuple[str, ...]

    def make(self, *targets: str) -> None:
        jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL") or str(len(os.sched_getaffinity(0)))
        command = [self.cmake, "--build", str(self.folder), "--parallel", jobs]
        if subprocess.run([*command, *(["--target", *targets] if targets else [])]).returncode:
            refuse("the build failed; the libraries in place are those from before")


def architectures() -> str:
    default = re.search(
        r'VIDEOSWIN_ARCHITECTURES "(.+?)"', (ROOT / "CMakeLists.txt").read_text(encoding="utf-8")
    )[1]
    chosen = os.environ.get("VIDEOSWIN_ARCHITECTURES") or default
    if not re.fullmatch(r"\d+[af]?(-real|-virtual)?(;\d+[af]?(-real|-virtual)?)*", chosen):
        refuse(f"VIDEOSWIN_ARCHITECTURES must be like {default}, got {chosen}")
    return chosen


def configure() -> Build:
    """Has CMake write what ninja builds, in a folder for this Python and its torch."""
    torch, version = find_torch()
    cmake, ninja, compiler = find_cmake(), find_tool("ninja", "BIN_DIR"), find_compiler()
    here = hashlib.sha256(sys.prefix.encode()).hexdigest()[:8]
    folder = BUILD / f"{sys.implementation.cache_tag}-torch{version}-{here}"
    # A folder of CMake's stays with the tools, and at the place, that it was made with.
    tools = {"root": str(ROOT)}
    for name, program in (("cmake", cmake), ("compiler", compiler), ("nvcc", find_nvcc(torch))):
        if program is not None:
            real = os.path.realpath(program)
            tools[name] = f"{program} {real} {os.stat(real).st_mtime_ns}"
    record = folder / "tools.json"
    known = json.loads(record.read_text()) if record.exists() else None
    if known is None or any(known.get(name, tool) != tool for name, tool in tools.items()):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    record.write_text(json.dumps({**(known or {}), **tools}))

    nvcc, why_no_cuda = find_cuda(torch, compiler, architectures(), folder / "proven")
    include = sysconfig.get_path("include")
    without = [f"no CUDA kernels: {why_no_cuda}"] if why_no_cuda else []
    pybind11 = ""
    if find_spec("pybind11") is None:
        without.append("no _C.so: pybind11 is not installed; pip install pybind11")
    elif not Path(include, "Python.h").exists():
        without.append(
            f"no _C.so: there is no Python.h in {include}; on Debian: apt install python3-dev"
        )
    else:
        pybind11 = import_module("pybind11").get_include()
    done = run(
        *(cmake, "-S", str(ROOT), "-B", str(folder), "-G", "Ninja", "-Wno-dev"),
        *(f"-DCMAKE_MAKE_PROGRAM={ninja}", f"-DCMAKE_CXX_COMPILER={compiler}"),
        *(f"-DTORCH_PATH={torch}", f"-DTORCH_VERSION={version.partition('+')[0]}"),
        *(f"-DVIDEOSWIN_NVCC={nvcc}", f"-DVIDEOSWIN_WHY_NO_CUDA={why_no_cuda}"),
        *(f"-DVIDEOSWIN_ARCHITECTURES={architectures()}",),
        *(f"-DPYBIND11_INCLUDE={pybind11}", f"-DPYTHON_INCLUDE={include}"),
    )
    if done.returncode:
        print(done.stdout, done.stderr, sep="\n", file=sys.stderr)
        refuse("CMake failed; the libraries in place are those from before")
    libraries = ("_ops.so", "_emulated.so", *(["_C.so"] if pybind11 else []))
    return Build(folder, cmake, libraries, tuple(without))


@contextmanager
def alone() -> Iterator[None]:
    """Builds of one checkout, whatever Python they are for, follow each other."""
    import fcntl

    BUILD.mkdir(exist_ok=True)
    with (BUILD / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def put(library: Path, folder: Path) -> None:
    """Copies a library so that nobody ever reads half of it, and only where it differs."""
    there = folder / library.name
    if there.exists() and filecmp.cmp(library, there, shallow=False):
        return
    folder.mkdir(parents=True, exist_ok=True)
    half = folder / f".{os.getpid()}{library.name}"
    try:
        shutil.copy2(library, half)
        half.replace(there)
    finally:
        half.unlink(missing_ok=True)


class BuildLibraries(build_ext):
    """All libraries into the source tree, or for a wheel _ops.so alone."""

    user_options: ClassVar = [*build_ext.user_options, ("target=", None, "build this one alone")]

    def initialize_options(self) -> None:
        super().initialize_options()
        self.target = None

    def run(self) -> None:
        if self.target not in (None, *TARGETS):
            refuse(f"--target must be one of {', '.join(TARGETS)}, got {self.target}")
        is_in_place = bool(self.target or self.inplace) or "build_ext" in self.distribution.commands
        try:
            self.build_libraries(is_in_place)
        except SystemExit as end:
            # The sentence is printed. A wheel without the library is good for all but its kernels.
            if is_in_place or end.code != MISSING:
                raise

    def build_libraries(self, is_in_place: bool) -> None:
        if sys.platform != "linux":
            refuse(f"the C++ libraries are built on Linux alone, this is {sys.platform}", MISSING)
        with alone():
            build = configure()
            for sentence in build.without:
                print(f"videoswin_kernels: {sentence}", flush=True)
            if self.target:
                build.make(self.target)
                print(build.folder / TARGETS[self.target])
            elif is_in_place:
                build.make()
                for name in build.libraries:
                    put(build.folder / "lib" / name, PACKAGE)
                # Left by another build, it would not fit the library it belongs to.
                if "_C.so" not in build.libraries:
                    (PACKAGE / "_C.so").unlink(missing_ok=True)
            else:
                build.make("ops")
                put(build.folder / "lib" / "_ops.so", Path(self.build_lib, PACKAGE.name))

    def get_ext_filename(self, fullname: str) -> str:
        # No letter of it depends on the version of Python.
        return fullname.replace(".", "/") + ".so"


class Wheel(bdist_wheel):
    """One for every Python: what _ops.so asks of it and of torch is the same in all of them."""

    def initialize_options(self) -> None:
        super().initialize_options()
        # Of its own, as what another build has left would go into the wheel.
        self.emptied = tempfile.TemporaryDirectory()
        self.distribution.get_command_obj("build").build_base = self.emptied.name

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[Extension("videoswin_kernels._ops", sources=[])],
    cmdclass={"build_ext": BuildLibraries, "bdist_wheel": Wheel},
)
