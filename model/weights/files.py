"""Files of weights: read without running their code, written whole or not at all."""

from __future__ import annotations

import json
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

# What our own files call themselves: training checkpoints, and weights alone.
FORMAT = "videoswin-kernels/1"
SUFFIXES = (".safetensors", ".pt", ".pth")


class WeightsError(RuntimeError):
    """Weights that cannot be had, read or used: one sentence with their source and the reason."""


class _Inert:
    """Takes the place of an object that is not wanted: swallows whatever it is given."""

    def __new__(cls, *_: object) -> _Inert:
        return super().__new__(cls)

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, _: object) -> None:
        pass


# Leftovers of training beside the weights: mmengine's message hub with its NumPy arrays, the
# configuration of 2-D Swin, the options of torchvision's scripts. None is imported or called.
_LEFTOVERS = {
    "mmengine.logging.history_buffer.HistoryBuffer": _Inert,
    "numpy.core.multiarray._reconstruct": _Inert,
    "numpy._core.multiarray._reconstruct": _Inert,
    "numpy.core.multiarray.scalar": _Inert,
    "numpy._core.multiarray.scalar": _Inert,
    "numpy.ndarray": _Inert,
    "numpy.dtype": _Inert,
    "__builtin__.getattr": _Inert,
    "builtins.getattr": _Inert,
    "argparse.Namespace": _Inert,
    "types.SimpleNamespace": _Inert,
    "datetime.datetime": _Inert,
    "pathlib.PosixPath": _Inert,
    "pathlib._local.PosixPath": _Inert,
    # A dict; torch fills no other kind than its own few.
    "yacs.config.CfgNode": OrderedDict,
}
_READING = threading.Lock()


def read_file(path: str | Path) -> Mapping[str, Any]:
    """What a `.pth`, `.pt` or `.safetensors` file holds, its tensors on the CPU.

    The content decides which it is, not the name. A safetensors file becomes
    `{"format": ..., "window_size": ..., "model": tensors}`, the window only if it is one of ours.

    Raises:
        WeightsError: no such file, neither of the two kinds, damaged, or a pickle with code.
    """
    path = Path(path)
    where = f"load_weights: cannot read {shown(path)}"
    try:
        with open(path, "rb") as file:
            head = file.read(9)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise WeightsError(f"{where}: {reason}") from error
    # In this order: the length that a safetensors file begins with may look like a pickle's start.
    if head[8:] == b"{":
        content = _read_safetensors(path, where)
    elif head[:4] == b"PK\x03\x04" or head[:1] == b"\x80":
        content = _read_torch(path, where)
    else:
        kind = f"it starts with {head!r}" if head else "it is empty"
        raise WeightsError(f"{where}: neither a PyTorch nor a safetensors file, {kind}")
    if not isinstance(content, Mapping):
        raise WeightsError(f"{where}: it holds a {type(content).__name__}, not a state dict")
    return content


def _read_torch(path: Path, where: str) -> Any:
    stand_ins = [(kind, name) for name, kind in _LEFTOVERS.items()]
    try:
        # The list that torch keeps of what may be read is one for all threads.
        with _READING, torch.serialization.safe_globals(stand_ins):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # torch raises half a dozen types here, from KeyError to UnpicklingError, with paragraphs
        # of advice; the name of what the pickle would call is the part that says something.
        code = re.search(r"GLOBAL (\S+) w", str(error))
        reason = f"it is damaged, or no checkpoint ({type(error).__name__})"
        if code is not None:
            reason = f"its pickle calls {code[1]}, and what it calls is not run; where you trust "
            reason += "it, save its tensors alone"
        elif "Unsupported operand" in str(error):
            reason = "its pickle is none that can be read without running its code"
        raise WeightsError(f"{where}: {reason}") from error


def _read_safetensors(path: Path, where: str) -> dict[str, Any]:
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
        is_ours = metadata.get("format") == FORMAT
        window_size = json.loads(metadata.get("window_size", "null")) if is_ours else None
    except (SafetensorError, ValueError, RecursionError) as error:
        raise WeightsError(f"{where}: it is damaged ({' '.join(str(error).split())})") from error
    return {"format": metadata.get("format"), "window_size": window_size, "model": tensors}


def shown(name: object) -> str:
    """A name from a file, or of one, as it can stand in a sentence."""
    text = str(name)
    return text if text.isprintable() else repr(text)


def write_file(path: str | Path, state: Mapping[str, Any]) -> None:
    """Write `state`, atomically, in the kind that the suffix of `path` names.

    A safetensors file takes the tensors of `state["model"]` or `state["state_dict"]`, or `state`
    itself where there is neither, and the other entries as metadata.

    Raises:
        ValueError: a suffix that is none of `SUFFIXES`.
        OSError: the file cannot be written.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise ValueError(
            f"save_weights: path must end in one of {', '.join(SUFFIXES)}, got {str(path)!r}"
        )
    if path.suffix != ".safetensors":
        write_atomically(path, lambda file: torch.save(dict(state), file))
        return
    inner = next((name for name in ("model", "state_dict") if name in state), None)
    tensors: Mapping[str, Tensor] = state if inner is None else state[inner]
    others = {} if inner is None else {n: v for n, v in state.items() if n != inner}
    metadata = {n: v if isinstance(v, str) else json.dumps(v) for n, v in others.items()}
    # Cloned, as the format takes neither views nor two names for the same memory.
    copies = {n: v.clone(memory_format=torch.contiguous_format) for n, v in tensors.items()}
    data = save(copies, metadata)
    write_atomically(path, lambda file: file.write(data))


def write_atomically(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Call `write(file)` on a binary file that replaces `path` only once it is safe on disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    try:
        with open(partial, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        # Half a file would take room from the next attempt on a full disk.
        partial.unlink(missing_ok=True)
        raise
    os.replace(partial, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder as safe on disk as what they stand for."""
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
