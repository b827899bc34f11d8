"""The C++ libraries beside this file, each loaded once, or remembered with the reason why not.

    _ops       the kernels, in C++ for processors and in CUDA C++ for GPUs
    _emulated  the same CUDA sources run on CPU tensors, for tests; a wheel does not hold it

Where a function takes a name, "_ops" is the kernels for GPUs, and "_ops_cpu" those for processors.

`python setup.py build_ext` writes them. Nothing here logs, warns, or loads before it is asked.
"""

from __future__ import annotations

import ctypes
import json
import os
import threading
from hashlib import sha256
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch

_FOLDER = Path(__file__).resolve().parent
BUILD = "python setup.py build_ext"
# The namespaces of operators in `torch.ops`, and the libraries that they are in.
NAMESPACES = {
    "_ops": "videoswin_ops",
    "_ops_cpu": "videoswin_ops_cpu",
    "_emulated": "videoswin_emulated",
}
LIBRARIES = {"_ops": "_ops", "_ops_cpu": "_ops", "_emulated": "_emulated"}


class Loaded(NamedTuple):
    """What came of loading a library; `why_not` is None where its operators can be called."""

    why_not: str | None
    facts: dict[str, Any]


_loaded: dict[str, Loaded] = {}
_started: dict[int, str | None] = {}
_lock = threading.RLock()


def why_not(name: str) -> str | None:
    """Why the operators of a library cannot run, in words that end a sentence; None if they can."""
    return _library(name).why_not


def operators(name: str) -> Any:
    """The namespace of a library's operators in `torch.ops`, or None: `why_not` says why."""
    return getattr(torch.ops, NAMESPACES[name]) if why_not(name) is None else None


def why_not_started(index: int | None) -> str | None:
    """Why a GPU cannot run the kernels of `_ops`, which can be loaded, or None; asked once of each.

    It has no machine code for that GPU, say, or the driver is older than the CUDA it is built with.
    """
    index = torch.cuda.current_device() if index is None else index
    with _lock:
        if index not in _started:
            ask = ctypes.CDLL(str(_path("_ops"))).videoswin_why_not_started
            ask.restype = ctypes.c_char_p
            with torch.cuda.device(index):
                said = ask()
            _started[index] = said and f"the C++ library cannot start on it: {said.decode()}"
        return _started[index]


def cpu_level(level: int = -1) -> str | None:
    """The level of x86-64 whose kernels run on CPU tensors: "baseline", "v3" or "v4".

    A number from 0 chooses the level first, for the whole process, as tests and benches do; None
    where this processor has not that one. The library must be there.
    """
    ask = ctypes.CDLL(str(_path("_ops_cpu"))).videoswin_cpu_level
    ask.restype = ctypes.c_char_p
    said = ask(level)
    return said and said.decode()


def build_facts(name: str) -> dict[str, Any]:
    """What a library says of its own build; {} where it could not be asked.

    Returns:
        cuda: the version of nvcc, "13.0", or None. why_no_cuda: a sentence, or None.
        architectures: as CMake writes them, ["80-real", ...]. torch: the version of its headers.
        compiler: "GNU 12.2.0". emulated: whether it is the emulation. sources: the `fingerprint`
        of what it was built from.
    """
    return _library(name).facts


def control() -> ModuleType:
    """The module `_C`, which sets how `_emulated` runs.

    Raises:
        ImportError: it is not built, or not for this Python; or the library is not there.
    """
    # In this order: the loader gives the module the library of that name that is there already.
    reason = why_not("_emulated")
    if reason is not None:
        raise ImportError(f"videoswin_kernels._C: {reason}")
    try:
        return import_module("videoswin_kernels._C")
    except ImportError as error:
        first = str(error).partition("\n")[0]
        raise ImportError(f"videoswin_kernels._C: {first}; run {BUILD}") from error


def fingerprint(root: Path) -> str | None:
    """A hash of all that a checkout's libraries are made of; None where there is no checkout.

    CMakeLists.txt computes the same. Times would not do: git and copies set them as they like.
    """
    build, suffixes = root / "CMakeLists.txt", (".cpp", ".cu", ".cuh", ".h")
    files = [path for path in (root / "csrc").rglob("*") if path.suffix in suffixes]
    if not files or not build.is_file():
        return None
    names = sorted(path.relative_to(root).as_posix() for path in [build, *files])
    lines = (f"{sha256((root / name).read_bytes()).hexdigest()} {name}\n" for name in names)
    return sha256("".join(lines).encode()).hexdigest()


def _library(name: str) -> Loaded:
    with _lock:
        if name not in _loaded:
            _loaded[name] = load(_path(name), needs_cuda=name == "_ops", root=_FOLDER.parent)
        return _loaded[name]


def _path(name: str) -> Path:
    """Where a library is: beside this file, or for `_emulated` where VIDEOSWIN_EMULATED says.

    That variable lets tests take one that was built with sanitizers.
    """
    named = os.environ.get("VIDEOSWIN_EMULATED") if name == "_emulated" else None
    return Path(named).resolve() if named else _FOLDER / f"{LIBRARIES[name]}.so"


def load(path: Path, needs_cuda: bool, root: Path) -> Loaded:
    """Loads a library that is to be made of the sources under `root`, if there are any."""
    sources = fingerprint(root)
    if not path.is_file():
        if sources is None:
            return Loaded(f"{path.name} is not part of an installed package", {})
        where = "" if path.parent == _FOLDER else f" as {path}"
        return Loaded(f"the C++ library is not built{where}; run {BUILD}", {})
    try:
        # torch's loader calls this one, and says less of what is wrong.
        ask = ctypes.CDLL(str(path)).videoswin_build_facts
        ask.restype = ctypes.c_char_p
        facts = json.loads(ask())
        torch.ops.load_library(path)
    except (OSError, AttributeError, ValueError) as error:
        first = str(error).partition("\n")[0]
        return Loaded(f"the C++ library cannot be loaded: {first}", {})
    # After `git pull`, say: its operators may take other arguments than Python gives them.
    if sources not in (None, facts["sources"]):
        return Loaded(f"the C++ library was built from other sources; run {BUILD}", facts)
    if needs_cuda and facts["cuda"] is None:
        return Loaded(f"the C++ library was built without CUDA: {facts['why_no_cuda']}", facts)
    return Loaded(None, facts)
