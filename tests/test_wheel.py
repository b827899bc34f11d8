"""What is released: the wheel and the source distribution, their metadata, and how they are made.

A wheel is made of the source distribution, and installed where there is nothing but what it
requires: an environment of its own, with links to those packages of this one that metadata name.
"""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_bytes
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from test_build import copy_tree, own, run, tool

import videoswin_kernels

ROOT = Path(__file__).parents[1]
PACKAGE = "videoswin_kernels"
VERSION = videoswin_kernels.__version__
TWO_LINES = ROOT / ".ci/installed.py"


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def built(tree: Path, what: str, to: Path) -> Path:
    """A "sdist" or a "wheel" of a tree, as `python -m build --no-isolation` has it made."""
    to.mkdir(exist_ok=True)
    ask = f"from setuptools import build_meta as b; print(b.build_{what}({str(to)!r}))"
    done = run(tree, sys.executable, "-c", ask, VIDEOSWIN_CUDA="off")
    assert done.returncode == 0, done.stdout + done.stderr
    return to / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The source distribution of this tree, and the folder that it unpacks to."""
    folder = tmp_path_factory.mktemp("source")
    path = built(copy_tree(folder / "tree"), "sdist", folder / "dist")
    with tarfile.open(path) as tar:
        tar.extractall(folder, filter="data")
    return path, folder / path.name.removesuffix(".tar.gz")


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory):
    if sys.platform != "linux" or shutil.which("c++") is None:
        pytest.skip("there is no C++ compiler for a wheel here")
    return built(source[1], "wheel", tmp_path_factory.mktemp("wheel"))


def required(*names: str) -> list[metadata.Distribution]:
    """These distributions, and all that they require here."""
    found, seen, waiting = {}, set(), [Requirement(name) for name in names]
    while waiting:
        asked = waiting.pop()
        if (asked.name, *sorted(asked.extras)) in seen:
            continue
        seen.add((asked.name, *sorted(asked.extras)))
        found[asked.name] = metadata.distribution(asked.name)
        for other in map(Requirement, found[asked.name].requires or []):
            marker = other.marker
            if marker is None or any(marker.evaluate({"extra": e}) for e in ("", *asked.extras)):
                waiting.append(other)
    return list(found.values())


def environment(folder: Path, wheel: Path, *names: str) -> Path:
    """The Python of a new environment that holds a wheel, these packages, and what they require."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    for one in required(*names):
        for top in {file.parts[0] for file in one.files} - {"..", "__pycache__"}:
            if not (packages / top).is_symlink():
                (packages / top).symlink_to(one.locate_file(top))
    python = folder / "bin/python"
    pip = (sys.executable, "-m", "pip", "--python", str(python), "install", "--no-index")
    # Of what the metadata require nothing may be missing: there is no place to get it from.
    nowhere = {"PIP_CONFIG_FILE": os.devnull, "PIP_FIND_LINKS": ""}
    done = run(folder, *pip, str(wheel), **nowhere)
    assert done.returncode == 0, done.stdout + done.stderr
    return python


def said(python: Path, *words: str) -> str:
    """What a command prints, run in the folder of the environment."""
    done = run(python.parent, str(python), *words)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def beside_torchvision(wheel, tmp_path_factory):
    names = ("torch", "numpy", "einops", "torchvision")
    return environment(tmp_path_factory.mktemp("with") / "venv", wheel, *names)


@pytest.fixture(scope="module")
def alone(wheel, tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone") / "venv"
    return environment(folder, wheel, "torch", "numpy", "einops")


def test_the_source_distribution_holds_what_a_build_reads_and_no_test(source):
    path, unpacked = source
    names = files(unpacked)
    clone = path.parents[1] / "tree"
    wanted = {"setup.py", "pyproject.toml", "CMakeLists.txt", "README.md", "CHANGELOG.md"}
    wanted |= {"LICENSE", "NOTICE", "CITATION.cff", f"{PACKAGE}/py.typed"}
    folders = (f"{PACKAGE}/", "csrc/")
    wanted |= {name for name in files(clone) if name.startswith(folders)}
    assert wanted <= names
    others = {name.partition("/")[0] for name in names - wanted}
    assert others <= {"PKG-INFO", "MANIFEST.in", "setup.cfg", f"{PACKAGE}.egg-info"}


# What manylinux_2_28 has of each library, the newest version of its symbols.
NEWEST = {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 24), "CXXABI": (1, 3, 11), "GCC": (7, 0, 0)}
# Names with a newer version in a newer C library, which 2.28 has as well: functions without their
# old errors, and all that was in libraries beside it until 2.34. And what newer headers prefer.
IN_BOTH = r"(exp|log|pow)@GLIBC_2\.29|(pthread|sem|shm|dl)\w*@GLIBC_2\.34"
PREFERRED = "__libc_single_threaded@GLIBC_2.32"


def test_the_library_asks_a_c_library_for_nothing_that_came_after_2_28():
    """Built with an older one, as `.ci/wheel` does, it can then be manylinux_2_28."""
    lines = tool("nm", "-D", "--undefined-only", str(own("_ops"))).splitlines()
    symbols = [line.split()[-1].replace("@@", "@") for line in lines]
    versioned = [symbol for symbol in symbols if "@" in symbol]
    assert versioned
    newer = []
    for symbol in versioned:
        library, _, version = symbol.partition("@")[2].rpartition("_")
        if tuple(map(int, version.split("."))) > NEWEST[library]:
            newer.append(symbol)
    assert [one for one in newer if not re.fullmatch(IN_BOTH, one) and one != PREFERRED] == []


@pytest.mark.slow
def test_a_wheel_of_the_source_distribution_is_for_every_python(wheel):
    assert re.fullmatch(rf"{PACKAGE}-{re.escape(VERSION)}-py3-none-linux_\w+\.whl", wheel.name)
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {f"{PACKAGE}/_ops.so", f"{PACKAGE}/py.typed"} <= names
    assert {name.partition("/")[0] for name in names} == {
        PACKAGE,
        f"{PACKAGE}-{VERSION}.dist-info",
    }


@pytest.mark.slow
def test_the_metadata_of_a_wheel(wheel):
    archive = zipfile.ZipFile(wheel)
    folder = f"{PACKAGE}-{VERSION}.dist-info"
    told = message_from_bytes(archive.read(f"{folder}/METADATA"))
    assert told["Name"] == "videoswin-kernels"
    assert told["Version"] == VERSION
    assert told["Requires-Python"] == ">=3.10"
    assert told["License-Expression"] == "Apache-2.0"
    assert told.get_all("License-File") == ["LICENSE", "NOTICE"]
    for name in told.get_all("License-File"):
        assert archive.read(f"{folder}/licenses/{name}") == (ROOT / name).read_bytes()
    always = [each for each in told.get_all("Requires-Dist") if "extra ==" not in each]
    assert always == ["torch>=2.10", "numpy>=1.26", "einops>=0.8"]
    assert "Typing :: Typed" in told.get_all("Classifier")
    # A README that PyPI shows as text, or not at all, is a mistake of this line.
    assert told["Description-Content-Type"] == "text/markdown"


@pytest.mark.slow
def test_the_two_lines_run_in_an_empty_environment(beside_torchvision):
    told = said(beside_torchvision, str(TWO_LINES)).splitlines()
    assert told[0].startswith("torch.float64: the logits of swin3d_t, within ")
    assert told[-1].startswith(f"videoswin_kernels {VERSION} is as it should be, in ")
    done = run(beside_torchvision.parent, str(beside_torchvision), str(TWO_LINES), "--cuda")
    assert done.returncode == 1
    assert "there are no kernels for GPUs: VIDEOSWIN_CUDA=off was set" in done.stderr


@pytest.mark.slow
def test_the_command_runs_in_an_empty_environment(beside_torchvision):
    told = said(beside_torchvision, "-m", PACKAGE)
    assert told.startswith(f"{PACKAGE} {VERSION}, torch ")
    row = re.search("^window_attention +(.+)$", told, re.MULTILINE)[1].split()
    assert row[2] == "reference"
    assert row[5] == "cpu"
    assert "_emulated.so is not part of an installed package" in told


@pytest.mark.slow
@pytest.mark.parametrize("name", ["model", "train", "bench", "tests"])
def test_nothing_else_is_installed(alone, name):
    done = run(alone.parent, str(alone), "-c", f"import {name}")
    assert f"ModuleNotFoundError: No module named '{name}'" in done.stderr


@pytest.mark.slow
def test_torchvision_is_not_needed(alone):
    ask = (
        "import torch, videoswin_kernels; from videoswin_kernels import accelerate, extension; "
        "from importlib import resources, util; assert util.find_spec('torchvision') is None; "
        "assert resources.files(videoswin_kernels).joinpath('py.typed').is_file(); "
        "assert extension.why_not('_ops_cpu') is None, extension.why_not('_ops_cpu'); "
        "print(tuple(videoswin_kernels.cyclic_shift(torch.ones(1, 2, 3, 4, 5), (1, 1, 1)).shape))"
    )
    assert said(alone, "-c", ask) == "(1, 2, 3, 4, 5)\n"
    ask = (
        f"import sys, torch; sys.path.append({str(ROOT / 'tests')!r}); "
        "from official_structures import official; from videoswin_kernels import accelerate; "
        "model = official.SwinTransformer3D().eval(); clips = torch.randn(1, 3, 6, 28, 24); "
        "expected = model(clips); torch.testing.assert_close(accelerate(model)(clips), expected); "
        "print(type(model.layers[0].blocks[0]).kernels)"
    )
    assert said(alone, "-c", ask) == "fused\n"
    ask = "from videoswin_kernels import accelerate; from torch import nn; accelerate(nn.ReLU())"
    done = run(alone.parent, str(alone), "-c", ask)
    assert "ValueError: accelerate: module must hold 3-D Swin blocks" in done.stderr
