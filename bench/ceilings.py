"""What this machine reaches: copies, matrix products, exponentials, shared memory.

`python bench/ceilings.py [--json FILE]`. The parts in CUDA C++ (ceilings.cu) need nvcc, and all but
the copy and the product need a GPU: where it is missing, a row says so.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
import triton
import triton.language as tl

from bench.harness import Rows, clocks, header, measure

COLUMNS = {
    "what": "what",
    "value": "rate",
    "unit": "unit",
    "per_clock": "per clock and SM",
    "error": "error",
}
UNITS = {"GB/s": 1e9, "TB/s": 1e12, "TFLOP/s": 1e12, "Texp/s": 1e12}
SOURCE = Path(__file__).with_name("ceilings.cu")
# ceilings.cu's own lines, in its order.
OF_CUDA = (
    "exp2 in CUDA",
    "shared memory reads",
    "mma.sync m16n8k16 bf16",
    "wgmma m64n128k16 bf16, A in shared memory",
    "wgmma m64n128k16 bf16, A in registers",
)
# Its sums have thousands of terms, and tensor cores cut what they cannot hold.
MOST_ERROR = 1e-2
REPEATS, BLOCK = 16, 1024


@triton.jit
def exp2_kernel(out, iterations, BLOCK: tl.constexpr, REPEATS: tl.constexpr):
    """Exponentials of what stays in registers; they go to the number that is its own 2^-x."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = (place % 1024).to(tl.float32) / 1024
    for _ in range(iterations):
        for _ in tl.static_range(REPEATS):
            x = tl.exp2(-x)
    tl.store(out + place, x)


def device_copy(device: torch.device) -> tuple[Callable, float, str]:
    """A copy of far more than the caches hold: bytes read and bytes written."""
    count = 2**31 if device.type == "cuda" else 2**26
    source = torch.randint(256, (count,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source), 2.0 * count, "GB/s"


def matrix_product(device: torch.device) -> tuple[Callable, float, str]:
    """A square product of random numbers: those of zeros run faster."""
    size = 8192 if device.type == "cuda" else 512
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return lambda: left @ right, 2.0 * size**3, "TFLOP/s"


def triton_exp2(device: torch.device) -> tuple[Callable, float, str]:
    """What a Triton kernel reaches of the exponentials, 4 warps to a program."""
    programs = 16 * torch.cuda.get_device_properties(device).multi_processor_count
    iterations = 1024
    out = torch.empty(programs * BLOCK, device=device)

    def run() -> None:
        sizes = {"BLOCK": BLOCK, "REPEATS": REPEATS}
        exp2_kernel[(programs,)](out, iterations, **sizes, num_warps=4, enable_fp_fusion=True)

    run()
    off = (out - 0.641185744504986).abs().max().item()
    if not off < 1e-5:
        raise RuntimeError(f"exp2 in Triton is off by {off:.1e}")
    return run, float(REPEATS * iterations * out.numel()), "Texp/s"


OF_TORCH = {
    "device copy": device_copy,
    "matrix product in torch": matrix_product,
    "exp2 in Triton": triton_exp2,
}


def rate(make: Callable, device: torch.device) -> dict:
    """The items of a row of torch's or Triton's."""
    function, amount, unit = make(device)
    timing = measure({"it": function}, device, seconds=1.0)["it"]
    value, scale = amount / timing.median * 1e3, UNITS[unit]
    timed = {"ms": timing.median, "low_ms": timing.low, "high_ms": timing.high}
    return {"value": value / scale, "unit": unit, **timed, "count": timing.count}


def cuda_rates(device: torch.device) -> Iterator[dict]:
    """The rows of ceilings.cu, or one for each with the sentence why there are none."""
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if nvcc is None:
        yield from ({"what": what, "reason": "nvcc is not installed"} for what in OF_CUDA)
        return
    major, minor = torch.cuda.get_device_capability(device)
    # wgmma is of this architecture alone.
    has_wgmma = (major, minor) == (9, 0)
    target = f"{major}{minor}{'a' if has_wgmma else ''}"
    if not has_wgmma:
        yield from ({"what": what, "reason": "wgmma is of sm_90a alone"} for what in OF_CUDA[3:])
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "ceilings"
        run([nvcc, *flags(target, has_wgmma), "-o", program, SOURCE])
        said = run([program])
    for line in said.splitlines():
        row = json.loads(line)
        if not row["error"] <= MOST_ERROR:
            row["failed"] = f"what it computes is off by {row['error']:.1e}"
        yield row


def flags(target: str, has_wgmma: bool) -> list[str]:
    """nvcc's, for the one architecture at hand."""
    # Spelt out: the shorthand -arch=sm_90a compiles a plain sm_90 as well, which has no wgmma.
    code = f"-gencode=arch=compute_{target},code=sm_{target}"
    return ["-O3", "-std=c++17", code, *(["-DHAS_WGMMA"] if has_wgmma else [])]


def run(command: Sequence[object]) -> str:
    """What a program prints; RuntimeError with what it says where it fails."""
    words = [str(word) for word in command]
    done = subprocess.run(words, capture_output=True, text=True, timeout=180)
    if done.returncode:
        said = (done.stderr or done.stdout or "no word").strip().splitlines()[-1]
        raise RuntimeError(f"{Path(words[0]).name} ended with {done.returncode}: {said}")
    return done.stdout


def measure_all(device: torch.device, rows: Rows) -> Iterator[dict]:
    """The rows that are not there yet, without their key."""
    for what, make in OF_TORCH.items():
        if rows.has({"bench": "ceiling", "what": what}):
            continue
        try:
            if make is triton_exp2 and device.type != "cuda":
                yield {"what": what, "reason": "torch finds no CUDA GPU here"}
            else:
                yield {"what": what, **rate(make, device)}
        except Exception as fault:  # The others shall be measured.
            yield {"what": what, "failed": f"{type(fault).__name__}: {fault}"}
        if device.type == "cuda":
            torch.cuda.empty_cache()
    if all(rows.has({"bench": "ceiling", "what": what}) for what in OF_CUDA):
        return
    if device.type != "cuda":
        yield from ({"what": what, "reason": "torch finds no CUDA GPU here"} for what in OF_CUDA)
        return
    try:
        yield from cuda_rates(device)
    except (RuntimeError, OSError, ValueError, subprocess.TimeoutExpired) as fault:
        yield {"what": SOURCE.name, "failed": str(fault)}


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    found = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=found)
    parser.add_argument("--json", metavar="FILE", help="rows are added; continues")
    parser.add_argument("--minutes", type=float, help="for on_gpu.sh: all of it takes one")
    options = parser.parse_args(words)
    device, failures = torch.device(options.device), 0
    rows = Rows(options.json, header(device))
    for row in measure_all(device, rows):
        after = clocks(device)
        if after and "value" in row:
            processors = torch.cuda.get_device_properties(device).multi_processor_count
            amount = row["value"] * UNITS[row["unit"]]
            row["per_clock"] = amount / processors / (after["sm_max"] * 1e6)
        rows.append({"bench": "ceiling", **row, "clocks_after": after})
        failures += "failed" in row
    print(rows.table(COLUMNS, {"bench": "ceiling"}))
    print("per clock: at the highest clock that the card has")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
