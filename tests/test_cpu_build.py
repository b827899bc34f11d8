"""Objects of the C++ kernels for processors: a level's code must never run on an older processor.

Of a symbol that several objects define, such as an inline function of the standard library, the
linker keeps one copy for all levels. So each that a level's object defines must bear its name.
"""

import ctypes
import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LISTS = (ROOT / "CMakeLists.txt").read_text(encoding="utf-8")
LEVEL = "v3"
pytestmark = [
    pytest.mark.skipif(platform.machine() != "x86_64", reason="levels are those of x86-64"),
    pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler here"),
]
needs_nm = pytest.mark.skipif(shutil.which("nm") is None, reason="there is no nm here")


def setting(name):
    """The words of `set(name ...)` in CMakeLists.txt."""
    (found,) = re.findall(rf"^set\({name}\s+([^)]*)\)", LISTS, re.MULTILINE)
    return found.split()


STANDARD = f"-std=c++{setting('CMAKE_CXX_STANDARD')[0]}"
SOURCE = pytest.mark.parametrize("source", setting("LEVEL_KERNELS"))


def said(*command):
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def strange_symbols(source, folder):
    """{symbol: what is wrong with it} of a source compiled for a level as CMakeLists.txt has it."""
    features = setting(f"{LEVEL}_features")
    if subprocess.run(
        ["c++", *features, "-xc++", "-E", "/dev/null"], capture_output=True
    ).returncode:
        pytest.skip("this compiler knows no levels of x86-64")
    own_name = f"-DVIDEOSWIN_LEVEL={LEVEL}"
    visibility = ["-fPIC", "-fvisibility=hidden", "-fvisibility-inlines-hidden"]
    made = folder / "made.o"
    options = [STANDARD, *visibility, *setting("level_options"), *features, own_name]
    said("c++", *options, "-c", source, "-o", made)
    lines = said("nm", "-C", made).splitlines()
    # An address or spaces, one letter, the name as it is in C++.
    names = [re.fullmatch(r"[0-9a-f ]* (\S) (.+)", line).groups() for line in lines]
    assert names
    c, own, strange = ctypes.CDLL("libm.so.6"), f"videoswin::cpu::{LEVEL}::", {}
    for kind, name in names:
        # V and W: weak ones; u: unique ones.
        if kind in "VWu" and own not in name:
            strange[name] = "one copy of it serves all levels"
        # The level's, or compiled once for all. Names of libm are also looked for in libc.
        is_ours = re.match(rf"(?:\S+ )?{own}|videoswin::cpu::\w+\(", name)
        if kind in "Uvw" and not (is_ours or hasattr(c, name) or name.startswith("_GLOBAL_")):
            strange[name] = "neither ours nor of the C library"
    return strange


def headers(source):
    """What a source includes, directly or not."""
    listed = said("c++", STANDARD, "-M", source).replace("\\\n", " ")
    return {(ROOT / name).resolve() for name in listed.partition(":")[2].split()} - {
        (ROOT / source).resolve()
    }


def strange_headers(source, folder):
    """Headers that a source includes beside those of csrc/cpu, <cstdint> and what that includes."""
    allowed = folder / "allowed.cpp"
    allowed.write_text("#include <cstdint>\n")
    found = headers(source) - headers(allowed)
    return {path for path in found if path.parent != ROOT / "csrc/cpu"}


@needs_nm
@SOURCE
def test_what_objects_of_levels_share_bears_the_name_of_the_level(source, tmp_path):
    assert strange_symbols(source, tmp_path) == {}


@SOURCE
def test_kernels_include_nothing_with_functions_in_it(source, tmp_path):
    assert strange_headers(source, tmp_path) == set()


# What the checks are there for: a header, a namespace, what stands in it, and what is seen.
PLANTED = [
    ("vector", "v3", "int f(std::vector<int>& x) { x.push_back(1); return 0; }", "std::vector<int"),
    ("new", "v3", "int* f() { return new int(3); }", "operator new(unsigned long)"),
    (
        "cstdint",
        "v4",
        "int g(); } namespace videoswin::cpu::v3 { int f() { return v4::g(); }",
        "v4::",
    ),
    ("cstdint", "any", "inline int g(int n) { return n; } int (*f())(int) { return g; }", "any::g"),
    # Which is right: it has the level's name.
    ("cstdint", "v3", "inline int g(int n) { return n; } int (*f())(int) { return g; }", None),
]


@needs_nm
@pytest.mark.parametrize(("header", "namespace", "text", "seen"), PLANTED, ids=range(len(PLANTED)))
def test_the_checks_see_what_they_are_there_for(header, namespace, text, seen, tmp_path):
    source = tmp_path / "planted.cpp"
    source.write_text(
        f"#include <{header}>\nnamespace videoswin::cpu::{namespace} {{\n{text}\n}}\n"
    )
    symbols = strange_symbols(source, tmp_path)
    assert bool(symbols) == (seen is not None)
    assert seen is None or any(seen in name for name in symbols), symbols
    names = {path.name for path in strange_headers(source, tmp_path)}
    assert names == set() if header == "cstdint" else header in names
