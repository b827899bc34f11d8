"""The build of the C++ libraries, in copies of this tree, and how extension.py loads them or not.

Most copies are thin: their sources are emptied, since it is the build that is asked and not what it
builds; that takes seconds instead of a minute.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from videoswin_kernels import extension

ROOT = Path(__file__).parents[1]
PACKAGE = "videoswin_kernels"
NVCC_OF_PIP = Path(torch.__file__).parents[1] / "nvidia/cu13/bin/nvcc"
pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="the libraries are built on Linux alone"),
    pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler here"),
    pytest.mark.skipif(
        not all(find_spec(name) or shutil.which(name) for name in ("cmake", "ninja")),
        reason="cmake or ninja is missing here",
    ),
]


def copy_tree(to: Path) -> Path:
    """What a clone would hold if all that git does not ignore were committed."""
    if not (ROOT / ".git").exists():
        pytest.skip("this tree is no clone, and so does not say what one would hold")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listing.split("\0")):
        if (ROOT / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, to / name)
    return to


def run(tree: Path, *command: str, **environment: str) -> subprocess.CompletedProcess:
    """Runs a command in a copy, which alone it can import from."""
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("VIDEOSWIN", "PYTHONPATH", "PYTEST", "TRITON", "CUDA_HOME"))
    }
    environment = {**inherited, "VIDEOSWIN_ARCHITECTURES": "80-real", **environment}
    return subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)


def build(tree: Path, *options: str, **environment: str) -> subprocess.CompletedProcess:
    return run(tree, sys.executable, "setup.py", "build_ext", *options, **environment)


def built(tree: Path, *options: str, **environment: str) -> str:
    done = build(tree, *options, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def refusal(done: subprocess.CompletedProcess, status: int) -> str:
    """The last line that a failed build leaves; nothing like a traceback comes with it."""
    assert done.returncode == status, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("videoswin_kernels: ")
    return last


def libraries(tree: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (tree / PACKAGE).glob("*.so*")}


def loaded(tree: Path, name: str) -> extension.Loaded:
    return extension.load(tree / PACKAGE / f"{name}.so", name == "_ops", tree)


@pytest.fixture
def thin(tmp_path):
    tree = copy_tree(tmp_path / "a tree, as some are named")
    for path in (tree / "csrc").rglob("*.c*"):
        if path.suffix in (".cpp", ".cu"):
            path.write_text("")
    return tree


@pytest.fixture
def no_nvcc(tmp_path):
    """A PATH without nvcc."""
    if NVCC_OF_PIP.exists():
        pytest.skip("nvcc is beside torch, where no variable hides it")
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("c++", "as", "ld", "cmake", "ninja"):
        if shutil.which(name):
            (tools / name).symlink_to(shutil.which(name))
    return str(tools)


needs_nvcc = pytest.mark.skipif(
    shutil.which("nvcc") is None and not NVCC_OF_PIP.exists(), reason="there is no nvcc here"
)


def test_every_source_is_listed():
    listed = (ROOT / "CMakeLists.txt").read_text(encoding="utf-8")
    sources = [path for path in (ROOT / "csrc").rglob("*.c*") if path.suffix in (".cpp", ".cu")]
    assert sources
    assert [path for path in sources if path.relative_to(ROOT).as_posix() not in listed] == []


@needs_nvcc
def test_a_plain_build_leaves_libraries_in_place_and_a_second_one_does_nothing(thin):
    built(thin)
    names = {"_ops.so", "_emulated.so", *(["_C.so"] if find_spec("pybind11") else [])}
    assert set(libraries(thin)) == names
    times = {path: path.stat().st_mtime_ns for path in thin.rglob("*.*o")}
    assert "no work to do" in built(thin)
    assert times == {path: path.stat().st_mtime_ns for path in thin.rglob("*.*o")}
    for name in ("_ops", "_emulated"):
        reason, facts = loaded(thin, name)
        assert reason is None
        assert facts["torch"] == torch.__version__.partition("+")[0]
        assert re.fullmatch(r"\w+ [\d.]+", facts["compiler"])
        assert facts["emulated"] == (name == "_emulated")
        assert facts["sources"] == extension.fingerprint(thin)
    assert re.fullmatch(r"\d+\.\d+", loaded(thin, "_ops").facts["cuda"])
    assert loaded(thin, "_ops").facts["architectures"] == ["80-real"]
    assert loaded(thin, "_ops").facts["why_no_cuda"] is None


@pytest.mark.slow
def test_cuda_off_says_so_and_is_not_kept_for_the_next_build(thin):
    assert "VIDEOSWIN_CUDA=off" in built(thin, VIDEOSWIN_CUDA="off")
    reason, facts = loaded(thin, "_ops")
    assert reason == "the C++ library was built without CUDA: VIDEOSWIN_CUDA=off was set"
    assert facts["cuda"] is None
    assert facts["architectures"] == []
    assert loaded(thin, "_emulated").why_not is None
    # Read, not loaded: the process holds the one that was there under this name.
    assert b"VIDEOSWIN_CUDA" in libraries(thin)["_ops.so"]
    built(thin)
    assert b"VIDEOSWIN_CUDA" not in libraries(thin)["_ops.so"]


def test_without_nvcc_the_rest_is_built_and_the_reason_is_kept(thin, no_nvcc):
    built(thin, PATH=no_nvcc)
    reason = loaded(thin, "_ops").why_not
    assert reason.startswith("the C++ library was built without CUDA: no nvcc in CUDA_HOME")
    assert "; pip install 'cuda-toolkit[nvcc,cccl]" in reason
    assert loaded(thin, "_emulated").why_not is None


def test_cuda_on_without_nvcc_is_refused(thin, no_nvcc):
    said = refusal(build(thin, PATH=no_nvcc, VIDEOSWIN_CUDA="on"), 1)
    assert "VIDEOSWIN_CUDA=on was set, but no nvcc in CUDA_HOME" in said
    assert libraries(thin) == {}


def test_the_reason_of_a_broken_nvcc_is_its_own_first_error(thin):
    compiler = thin / "toolkit/bin/nvcc"
    compiler.parent.mkdir(parents=True)
    says = 'nvcc warming up\\nnvcc fatal   : the host "g++" is\\tunknown; sorry \\\\o/\\nmore\\n'
    compiler.write_text(f"#!/bin/sh\nprintf '{says}' >&2\nexit 1\n")
    compiler.chmod(0o755)
    built(thin, CUDA_HOME=str(thin / "toolkit"))
    reason = r'does not work: nvcc fatal : the host "g++" is unknown; sorry \o/'
    assert loaded(thin, "_ops").why_not.endswith(f"built without CUDA: {compiler} {reason}")
    said = refusal(build(thin, CUDA_HOME=str(thin / "toolkit"), VIDEOSWIN_CUDA="on"), 1)
    assert said.endswith(f"VIDEOSWIN_CUDA=on was set, but {compiler} {reason}")


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("VIDEOSWIN_CUDA", "maybe", "VIDEOSWIN_CUDA must be auto, on or off, got maybe"),
        ("VIDEOSWIN_ARCHITECTURES", "native", "VIDEOSWIN_ARCHITECTURES must be like 80-real;"),
        ("CXX", "no-such", "CXX names no program: no-such"),
    ],
)
def test_wrong_wishes_are_refused(thin, name, value, sentence):
    assert sentence in refusal(build(thin, **{name: value}), 1)


def test_what_is_missing_is_named_with_its_cure(thin, tmp_path):
    (tmp_path / "none").mkdir()
    said = refusal(build(thin, PATH=str(tmp_path / "none")), 3)
    assert said.endswith("pip install cmake") or said.endswith("apt install g++")


@pytest.mark.parametrize(
    ("module", "text", "sentence"),
    [
        ("torch", "2.9.1", "torch 2.10 or newer is needed, 2.9.1 is installed"),
        ("cmake", "cmake version 3.20.1", "CMake 3.25 or newer is needed"),
    ],
)
def test_what_is_too_old_is_refused(thin, tmp_path, module, text, sentence):
    package = tmp_path / "old" / module
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("CMAKE_BIN_DIR = __path__[0]")
    (package / "version.py").write_text(f"__version__ = '{text}'\n")
    program = package / "cmake"
    program.write_text(f"#!/bin/sh\necho '{text}'\n")
    program.chmod(0o755)
    done = build(thin, PYTHONPATH=str(tmp_path / "old"))
    assert sentence in refusal(done, done.returncode)
    assert done.returncode in (1, 3)


def test_without_pybind11_the_module_is_left_out_and_an_old_one_removed(thin, tmp_path):
    (tmp_path / "hidden").mkdir()
    hide = tmp_path / "hidden/sitecustomize.py"
    hide.write_text("import sys\nsys.modules['pybind11'] = None\n")
    (thin / PACKAGE / "_C.so").write_text("of another build")
    said = built(thin, VIDEOSWIN_CUDA="off", PYTHONPATH=str(tmp_path / "hidden"))
    assert "videoswin_kernels: no _C.so: pybind11 is not installed; pip install pybind11" in said
    assert set(libraries(thin)) == {"_ops.so", "_emulated.so"}


def test_a_mistake_in_a_source_fails_and_leaves_the_libraries_as_they_were(thin):
    built(thin, VIDEOSWIN_CUDA="off")
    before = libraries(thin)
    (thin / "csrc/library.cpp").write_text("int unused_and_unfinished(int x {\n")
    assert "the build failed" in refusal(build(thin, VIDEOSWIN_CUDA="off"), 1)
    assert libraries(thin) == before
    stale = "the C++ library was built from other sources; run python setup.py build_ext"
    assert loaded(thin, "_emulated").why_not == stale


def test_a_warning_in_a_source_is_a_mistake(thin):
    (thin / "csrc/library.cpp").write_text("static int never_called() { return 1; }\n")
    assert "the build failed" in refusal(build(thin, VIDEOSWIN_CUDA="off"), 1)


def test_two_builds_at_once_follow_each_other(thin):
    with ThreadPoolExecutor(2) as threads:
        for done in threads.map(lambda _: build(thin, VIDEOSWIN_CUDA="off"), range(2)):
            assert done.returncode == 0, done.stdout + done.stderr
    assert loaded(thin, "_emulated").why_not is None


@pytest.mark.parametrize("target", ["emulated_address", "emulated_thread"])
def test_a_target_asked_for_by_name_stays_in_the_build_folder(thin, target):
    said = built(thin, f"--target={target}", VIDEOSWIN_CUDA="off")
    path = Path(said.splitlines()[-1])
    assert path.is_relative_to(thin / "build")
    assert path.name == "_emulated.so"
    assert path.is_file()
    assert libraries(thin) == {}
    assert "--target must be one of ops, " in refusal(build(thin, "--target=all"), 1)


def test_a_wheel_without_a_compiler_is_one_without_kernels(thin, tmp_path):
    tools = tmp_path / "tools"
    tools.mkdir()
    pip = (sys.executable, "-m", "pip", "wheel", ".", "--no-build-isolation", "--no-deps")
    done = run(thin, *pip, "-v", "--wheel-dir", str(tmp_path), PATH=str(tools), CXX="")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "there is no C++ compiler in PATH" in done.stdout + done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert f"{PACKAGE}/selection.py" in names
    assert not [name for name in names if name.endswith(".so")]


def test_a_wheel_holds_the_package_and_its_kernels_alone(thin, tmp_path):
    (thin / PACKAGE / "_C.so").write_text("of a build in place")
    old = f"build/lib.{sysconfig.get_platform()}-{sys.implementation.cache_tag}/{PACKAGE}/gone.py"
    (thin / old).parent.mkdir(parents=True)
    (thin / old).write_text("# of a wheel that was built before")
    pip = (sys.executable, "-m", "pip", "wheel", ".", "--no-build-isolation", "--no-deps")
    done = run(thin, *pip, "--wheel-dir", str(tmp_path), VIDEOSWIN_CUDA="off")
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert re.fullmatch(r"videoswin_kernels-[\w.]+-py3-none-linux_\w+\.whl", wheel.name)
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    python = {path.relative_to(thin).as_posix() for path in (thin / PACKAGE).rglob("*.py")}
    assert names == {*python, f"{PACKAGE}/py.typed", f"{PACKAGE}/_ops.so"}
    zipfile.ZipFile(wheel).extractall(tmp_path / "installed")
    ask = "from videoswin_kernels import extension; print(extension.why_not('_ops'))"
    said = run(tmp_path / "installed", sys.executable, "-c", ask).stdout
    assert said == "the C++ library was built without CUDA: VIDEOSWIN_CUDA=off was set\n"


def test_an_editable_install_builds_in_place(thin, tmp_path):
    pip = (sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps")
    prefix = ("--prefix", str(tmp_path / "prefix"), "--ignore-installed", "--editable", ".")
    done = run(thin, *pip, *prefix, VIDEOSWIN_CUDA="off")
    assert done.returncode == 0, done.stdout + done.stderr
    assert {"_ops.so", "_emulated.so"} <= set(libraries(thin))
    (packages,) = (tmp_path / "prefix").rglob("site-packages")
    ask = (
        f"import site; site.addsitedir({str(packages)!r}); from videoswin_kernels import extension;"
        " print(extension.__file__, extension.why_not('_emulated'))"
    )
    said = run(tmp_path, sys.executable, "-c", ask).stdout
    assert said == f"{thin / PACKAGE / 'extension.py'} None\n"


@pytest.mark.slow
def test_a_fresh_clone_builds_and_its_commands_run(tmp_path):
    tree = copy_tree(tmp_path / "tree")
    built(tree)
    assert "no work to do" in built(tree)
    for command in (("bench/attention.py", "--help"), ("-m", PACKAGE), ("-m", "train", "--help")):
        done = run(tree, sys.executable, *command)
        assert done.returncode == 0, done.stdout + done.stderr
    for name in ("_ops", "_emulated"):
        ask = f"from videoswin_kernels import extension; print(extension.why_not({name!r}))"
        said = run(tree, sys.executable, "-c", ask).stdout
        assert said == "None\n" or (name == "_ops" and "without CUDA" in said)


def own(name: str) -> Path:
    """A library of this tree, or a skipped test."""
    path = ROOT / PACKAGE / f"{name}.so"
    reason = extension.why_not(name)
    if reason is not None and "without CUDA" not in reason:
        pytest.skip(reason)
    return path


def tool(*command: str) -> str:
    if shutil.which(command[0]) is None:
        pytest.skip(f"there is no {command[0]} here")
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("name", ["_ops", "_emulated"])
def test_a_library_needs_torch_and_the_compilers_own_alone(name):
    needed = re.findall(r"NEEDED.*\[(.+)\]", tool("readelf", "-d", str(own(name))))
    allowed = r"libtorch\.so|lib(stdc\+\+|gcc_s|m|c|dl|rt|pthread)\.so\.\d+|ld-linux\S+"
    assert "libtorch.so" in needed
    assert [entry for entry in needed if not re.fullmatch(allowed, entry)] == []


@pytest.mark.parametrize("name", ["_ops", "_emulated"])
def test_a_library_names_no_folder(name):
    path = own(name)
    assert "PATH" not in tool("readelf", "-d", str(path))
    assert str(ROOT).encode() not in path.read_bytes()


@pytest.mark.parametrize(("name", "namespace"), extension.NAMESPACES.items())
def test_a_library_registers_its_operators_where_they_are_looked_for(name, namespace):
    """The headers of torch 2.10 do not expand a macro that is given to theirs as the namespace."""
    own(name)
    if extension.operators(name) is not None:
        names = {schema.name for schema in torch._C._jit_get_all_schemas()}
        assert [one for one in names if one.startswith(f"{namespace}::")]


def test_a_torch_without_cuda_can_load_the_kernels():
    lines = tool("nm", "-D", "--undefined-only", str(own("_ops"))).splitlines()
    strong = {name for kind, name in map(str.split, lines) if kind == "U"}
    assert "aoti_torch_get_current_cuda_stream" not in strong
    assert not {name for name in strong if "_cuda_" in name}


@pytest.mark.parametrize("name", ["_ops", "_emulated"])
def test_a_library_shows_what_others_call_and_nothing_else(name):
    shown = tool("nm", "-DC", "--defined-only", str(own(name))).splitlines()
    allowed = r".*\b(videoswin_(build_facts|cpu_level|why_not_started)|videoswin::\w+.*)"
    assert [line for line in shown if not re.fullmatch(allowed, line)] == []


def test_a_missing_library_says_how_to_build_it(tmp_path):
    path = tmp_path / "_emulated.so"
    reason = f"the C++ library is not built as {path}; run python setup.py build_ext"
    assert extension.load(path, False, ROOT) == (reason, {})
    reason = "_emulated.so is not part of an installed package"
    assert extension.load(path, False, tmp_path) == (reason, {})


@pytest.mark.parametrize("content", [b"", b"this is text, of some length" * 99])
def test_a_file_that_is_no_library_says_what_the_loader_says(tmp_path, content):
    path = tmp_path / "_ops.so"
    path.write_bytes(content)
    reason = extension.load(path, True, tmp_path).why_not
    assert reason.startswith(f"the C++ library cannot be loaded: {path}: ")
    assert "\n" not in reason


def test_a_foreign_library_is_refused(tmp_path):
    import _ctypes

    if not hasattr(_ctypes, "__file__"):
        pytest.skip("this Python has no extension of its own to load")
    reason = extension.load(Path(_ctypes.__file__), True, tmp_path).why_not
    assert reason.startswith("the C++ library cannot be loaded: ")
    assert "videoswin_build_facts" in reason


def test_a_library_is_loaded_once_whoever_asks(monkeypatch):
    calls = []

    def load(path, needs_cuda, root):
        time.sleep(0.05)
        calls.append((path.name, needs_cuda))
        return extension.Loaded("a reason", {"cuda": None})

    monkeypatch.setattr(extension, "load", load)
    monkeypatch.setattr(extension, "_loaded", {})
    with ThreadPoolExecutor(8) as threads:
        reasons = set(threads.map(lambda _: extension.why_not("_emulated"), range(8)))
    assert reasons == {"a reason"}
    assert extension.operators("_emulated") is None
    assert extension.build_facts("_emulated") == {"cuda": None}
    with pytest.raises(ImportError, match="_C: a reason"):
        extension.control()
    assert calls == [("_emulated.so", False)]


def test_a_variable_names_another_emulation_and_no_other_library(monkeypatch, tmp_path):
    monkeypatch.setenv("VIDEOSWIN_EMULATED", str(tmp_path / "_emulated.so"))
    monkeypatch.setattr(extension, "_loaded", {})
    assert f"is not built as {tmp_path}" in extension.why_not("_emulated")
    assert extension._path("_ops").parent == ROOT / PACKAGE


def test_an_installed_package_has_no_sources_to_compare(tmp_path):
    assert extension.fingerprint(tmp_path) is None
