"""Imports point one way: train to model to videoswin_kernels, and there from ops to reference."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Each package with those of ours that it may import, itself included.
ALLOWED = {
    "videoswin_kernels": {"videoswin_kernels"},
    "model": {"videoswin_kernels", "model"},
    "train": {"videoswin_kernels", "model", "train"},
}
OURS = {*ALLOWED, "bench", "tests"}
# What the mathematics may use beside Python itself.
FOREIGN = {"torch", "einops"}


def files(folder: str) -> list[Path]:
    found = sorted((ROOT / folder).rglob("*.py"))
    assert found, folder
    return found


def imported(path: Path) -> Iterator[str]:
    """Every name that a file imports, in full: "a.b" for `import a.b`, "a.b.c" for `from a.b`."""
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*above, *filter(None, [node.module])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


def top(name: str) -> str:
    return name.partition(".")[0]


@pytest.mark.parametrize("package", ALLOWED)
def test_a_package_imports_only_those_below_it(package):
    for path in files(package):
        wrong = {name for name in imported(path) if top(name) in OURS - ALLOWED[package]}
        assert not wrong, path


@pytest.mark.parametrize("part", ["ops", "reference"])
def test_the_mathematics_needs_torch_and_einops_alone(part):
    allowed = FOREIGN | {"videoswin_kernels"} | sys.stdlib_module_names
    for path in files(f"videoswin_kernels/{part}"):
        wrong = {name for name in imported(path) if top(name) not in allowed}
        assert not wrong, path


def test_the_rest_of_the_package_adds_numpy_for_the_geometry_and_triton_for_its_kernels():
    allowed = FOREIGN | {"videoswin_kernels"} | sys.stdlib_module_names
    for path in files("videoswin_kernels"):
        extra = {"numpy"} if path.name == "geometry.py" else set()
        extra |= {"triton"} if path.parent.name == "triton" else set()
        wrong = {name for name in imported(path) if top(name) not in allowed | extra}
        assert not wrong, path


def test_a_kernel_set_is_imported_by_nothing_outside_it():
    """It is loaded by name when it is chosen, so that a machine without it loses nothing else."""
    for path in [*files("videoswin_kernels"), *files("model"), *files("train")]:
        for kernels in ("triton", "cuda"):
            if path.parent.name != kernels:
                wrong = {n for n in imported(path) if n.startswith(f"videoswin_kernels.{kernels}")}
                assert not wrong, path


def test_the_reference_does_not_share_the_vectors_of_the_kernels():
    """It judges them: an index vector wrong in both would be found by neither."""
    prefix = "videoswin_kernels.geometry."
    for path in files("videoswin_kernels/reference"):
        names = {n.removeprefix(prefix) for n in imported(path) if n.startswith(prefix)}
        wrong = {n for n in names - {"Triple", "clamp_window"} if not n.startswith("check_")}
        assert not wrong, path
        assert not any(
            n in ("videoswin_kernels.geometry", "videoswin_kernels.WindowGeometry")
            for n in imported(path)
        ), path


def test_the_reference_imports_no_operator():
    for path in files("videoswin_kernels/reference"):
        assert not any(n.startswith("videoswin_kernels.ops") for n in imported(path)), path


def test_importing_the_kernels_loads_nothing_of_training():
    heavy = ["matplotlib", "decord", "av", "PIL", "tqdm", "tyro", "model", "train"]
    heavy += ["videoswin_kernels.triton", "videoswin_kernels.cuda"]
    program = (
        "import sys, torch; before = set(sys.modules); import videoswin_kernels; "
        f"print(*(set({heavy!r}) & (set(sys.modules) - before)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == []
