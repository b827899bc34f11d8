"""What a number depends on beside the code: card, driver, clocks, versions, commit, allocator."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import subprocess
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
# What can change a number; documents, tests and results cannot.
PACKAGES = ("videoswin_kernels", "csrc", "model", "train", "bench")
SUFFIXES = (".py", ".cu", ".cuh", ".cpp", ".h")
BUILD = "CMakeLists.txt"
CLOCKS = {"sm": "clocks.sm", "sm_max": "clocks.max.sm", "memory": "clocks.mem"}


def header(device: torch.device | str) -> dict:
    """The machine and the code that a row was measured with, each item None where unknown.

    `clocks` (MHz) are read when this is called, so before any warm-up; see `clocks`.
    """
    device = torch.device(device)
    is_cuda = device.type == "cuda"
    properties = torch.cuda.get_device_properties(device) if is_cuda else None
    driver = query(device, "driver_version") if is_cuda else None
    return {
        "card": properties.name if is_cuda else processor(),
        "device": device.type,
        "capability": f"{properties.major}.{properties.minor}" if is_cuda else None,
        "driver": driver and driver[0],
        "clocks": clocks(device),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": installed("triton"),
        "interpret": os.environ.get("TRITON_INTERPRET"),
        "commit": commit(),
        "sources": sources(),
        "threads": torch.get_num_threads(),
        "allocator": torch.cuda.get_allocator_backend() if is_cuda else host_allocator(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def clocks(device: torch.device | str) -> dict[str, int] | None:
    """Clocks of a GPU in MHz, as nvidia-smi reads them now; None without it or on a CPU."""
    device = torch.device(device)
    found = query(device, *CLOCKS.values()) if device.type == "cuda" else None
    if found is None or not all(each.isdigit() for each in found):
        return None
    return dict(zip(CLOCKS, map(int, found), strict=True))


def query(device: torch.device, *fields: str) -> list[str] | None:
    """What nvidia-smi says of these fields of this GPU; None where it cannot be asked."""
    # By identity: nvidia-smi counts all GPUs, torch those of CUDA_VISIBLE_DEVICES.
    identity = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    said = output([*command, f"--id={identity}"]) or output(command) or ""
    found = [each.strip() for each in said.split(",")]
    # More than a line is of more than one GPU, of which this may be any.
    return found if len(found) == len(fields) and "\n" not in said and all(found) else None


def output(command: list[str]) -> str | None:
    """What a command prints, stripped; None where it is missing, fails or takes 20 s."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def processor() -> str:
    """The processor's model name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def installed(package: str) -> str | None:
    """The version of an installed package, None without it."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def commit() -> str | None:
    """Twelve digits of the checked-out commit, "-dirty" behind them where a source differs.

    Where the checkout has no history (a copy on another machine), what VIDEOSWIN_COMMIT says.
    """
    # The repository must be this one: a checkout can lie inside another.
    top = output(["git", "rev-parse", "--show-toplevel"])
    head = output(["git", "rev-parse", "--short=12", "HEAD"])
    if not top or not head or Path(top).resolve() != ROOT:
        return os.environ.get("VIDEOSWIN_COMMIT") or None
    files = (BUILD, *(f"*{end}" for end in SUFFIXES))
    changed = output(["git", "status", "--porcelain", "--", *files])
    return head if changed == "" else f"{head}-dirty"


def sources() -> str:
    """Twelve digits of the source files' own sum: two dirty trees have the same commit."""
    total = hashlib.sha256()
    files = [path for name in PACKAGES for path in sorted((ROOT / name).rglob("*"))]
    for path in (ROOT / BUILD, *files):
        if path.name.endswith((BUILD, *SUFFIXES)) and path.is_file():
            total.update(f"{path.relative_to(ROOT).as_posix()}\0".encode())
            total.update(path.read_bytes())
    return total.hexdigest()[:12]


def host_allocator() -> str:
    """The state of glibc's allocator: "default" or "pooled" (large blocks are kept when freed).

    Found by trying: an untuned glibc maps each block of 64 MB, but for those that freed memory of
    its heap has room for. So blocks are asked for until one is mapped or that room is used up.
    """
    if platform.libc_ver()[0] != "glibc" or os.environ.get("LD_PRELOAD"):
        return "not glibc's"
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallinfo2"):
        return "unknown"

    class Information(ctypes.Structure):
        _fields_ = tuple((f"field_{number}", ctypes.c_size_t) for number in range(10))

    mapped_blocks, free_bytes = "field_3", "field_8"  # hblks and fordblks of struct mallinfo2
    library.mallinfo2.restype = Information
    library.malloc.restype, library.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    library.free.argtypes = [ctypes.c_void_p]
    before, size, blocks = library.mallinfo2(), 64 * 2**20, []
    try:
        for _ in range(getattr(before, free_bytes) // size + 1):
            blocks.append(library.malloc(size))
            if getattr(library.mallinfo2(), mapped_blocks) > getattr(before, mapped_blocks):
                return "default"
        return "pooled"
    finally:
        for block in blocks:
            library.free(block)
