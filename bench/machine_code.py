"""What nvcc made of the CUDA C++ kernels: registers, stack, shared memory, instructions.

    python bench/machine_code.py            # prints the tables
    python bench/machine_code.py --write    # also writes docs/machine_code.md

Read from the built library with cuobjdump, of the CUDA toolkit or of the triton package; no GPU.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from collections import Counter, defaultdict
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

from bench.machine import commit  # noqa: E402
from videoswin_kernels import extension  # noqa: E402

PAGE = ROOT / "docs" / "machine_code.md"
LIBRARY = ROOT / "videoswin_kernels" / "_ops.so"
# Columns of the tables, and the names of instructions that they count.
KINDS = {
    "16-byte loads": r"LDG\.\S*128",
    "other loads": r"LDG\.",
    "copies": r"LDGSTS",
    "16-byte stores": r"STG\.\S*128",
    "other stores": r"STG",
    "local memory": r"(LDL|STL)",
    "generic memory": r"(LD|ST)(\.|$)",
    "matrix loads": r"LDSM",
    "shared memory": r"(LDS|STS)",
    "shuffles": r"SHFL",
    "barriers": r"BAR",
    "float32": r"(FADD|FMUL|FFMA|FSEL|FSETP|FMNMX)",
    "special": r"MUFU",
    "tensor core": r"(HMMA|HGMMA)",
    "branches": r"(BRA|BRX|BSSY|BSYNC)",
}
UNITS = {"5uint4": 16, "5uint2": 8, "j": 4, "t": 2, "h": 1}
TYPES = {"f": "float32", "6__half": "float16", "13__nv_bfloat16": "bfloat16"}
HEAD = """# Machine code of the CUDA C++ kernels

Written by `python bench/machine_code.py --write` at commit {commit}: nvcc {cuda}, {compiler},
read with cuobjdump. Nothing here was timed.

Instructions are counted as they stand in the code, once, however often they run; what is not in a
column is address arithmetic, conversion and control. Copies are from device to shared memory, past
the registers. Stack holds what registers could not: the build fails where there is any. The numbers
of a layout are threads of a row, vectors of a thread, numbers of a vector; of a gather, bytes of a
unit; of attention, the type and the width of a head, in canonical windows frames.

Shared memory is asked for at the launch: by the backward kernels of rows in up to 32 threads 32
bytes a channel, at most 32 KB; for rows in more threads two sums of each warp, twice; 2 KB for
column sums and for the gradient of the table; for attention at most 96 KB, in canonical windows
about 61 KB of 8 frames and 122 KB of 16; elsewhere none. The column has what stands in the code, on
sm_90a the driver's own 1,024 bytes in every kernel that asks for some."""


class Code(NamedTuple):
    """The machine code of a kernel for an architecture.

    Attributes:
        name: the kernel with its template's arguments, `residual_norm_kernel<4, 4, 8>`.
        architecture: "sm_90a".
        registers: of a thread.
        stack, shared: bytes; a spill is stack. Shared memory is the static one, without what a
            launch asks for.
        instructions: how many, and how many of each of `KINDS`.
    """

    name: str
    architecture: str
    registers: int
    stack: int
    shared: int
    instructions: int
    mix: dict[str, int]


def cuobjdump() -> str | None:
    """Where the tool is, or None."""
    found = shutil.which("cuobjdump")
    spec = find_spec("triton")
    if found is None and spec is not None:
        beside = Path(spec.submodule_search_locations[0]) / "backends/nvidia/bin/cuobjdump"
        found = str(beside) if beside.exists() else None
    return found


def dump(library: Path, *options: str) -> str:
    """What cuobjdump prints; its helper, nvdisasm, is looked for beside it."""
    tool = cuobjdump()
    if tool is None:
        sys.exit("machine_code: cuobjdump is not there; pip install triton, or the CUDA toolkit")
    environment = {"PATH": f"{Path(tool).parent}:/usr/bin:/bin"}
    command = [tool, *options, str(library)]
    return subprocess.run(
        command, capture_output=True, text=True, check=True, env=environment
    ).stdout


def short(mangled: str) -> str:
    """A kernel's name with what its template was given."""
    name = re.search(r"\d+([a-z][a-z_]*_kernel)", mangled)[1]
    layout = re.search(r"LayoutI((?:Li\d+E)+)E", mangled)
    unit = re.search(r"_kernelI(5uint4|5uint2|[jth])E", mangled)
    typed = re.search(rf"_kernelI({'|'.join(TYPES)})Li(\d+)EE", mangled)
    if layout:
        numbers = re.findall(r"Li(\d+)E", layout[1])
        return f"{name}<{', '.join(numbers)}>"
    if typed:
        return f"{name}<{TYPES[typed[1]]}, {typed[2]}>"
    return f"{name}<{UNITS[unit[1]]}>" if unit else name


@cache
def instructions(library: Path = LIBRARY) -> dict[tuple[str, str], Counter]:
    """(architecture, mangled name) -> how many it has of each instruction, "LDG.E.128" say."""
    counts: dict[tuple[str, str], Counter] = defaultdict(Counter)
    architecture = name = ""
    for line in dump(library, "-sass").splitlines():
        if found := re.match(r"\s*code for (sm_\w+)", line):
            architecture = found[1]
        elif found := re.match(r"\s*Function : (\S+)", line):
            name = found[1]
        elif found := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", line):
            counts[architecture, name][found[1]] += 1
    for count in counts.values():
        del count["NOP"]
    return counts


def kind_of(instruction: str) -> str | None:
    """The first of `KINDS` that an instruction is of, or None."""
    return next((kind for kind, names in KINDS.items() if re.match(names, instruction)), None)


def read(library: Path = LIBRARY) -> list[Code]:
    """All kernels of a library, for each architecture that it has machine code for."""
    usage: dict[tuple[str, str], tuple[int, int, int]] = {}
    architecture = name = ""
    for line in dump(library, "--dump-resource-usage").splitlines():
        if found := re.match(r"arch = (sm_\w+)", line):
            architecture = found[1]
        elif found := re.match(r"\s*Function (\S+):", line):
            name = found[1]
        elif found := re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", line):
            registers, stack, shared, local = map(int, found.groups())
            usage[architecture, name] = registers, stack + local, shared
    rows = []
    for (architecture, name), used in usage.items():
        counts = instructions(library)[architecture, name]
        mix = dict.fromkeys(KINDS, 0)
        for instruction, count in counts.items():
            if kind := kind_of(instruction):
                mix[kind] += count
        rows.append(Code(short(name), architecture, *used, counts.total(), mix))
    return sorted(rows, key=lambda row: row[:2])


def bounds(library: Path = LIBRARY) -> dict[tuple[str, str], int]:
    """(architecture, kernel) -> the threads of a block that it was compiled for, at most."""
    found: dict[tuple[str, str], int] = {}
    architecture = name = ""
    lines = iter(dump(library, "-elf").splitlines())
    for line in lines:
        if match := re.match(r"arch = (sm_\w+)", line):
            architecture = match[1]
        elif match := re.match(r"\.nv\.info\.(\S+_kernel\S*)", line):
            name = short(match[1])
        elif "EIATTR_MAX_THREADS" in line:
            sizes = re.findall(r"0x([0-9a-f]+)", next(line for line in lines if "Value" in line))
            found[architecture, name] = int(sizes[0], 16)
    return found


def page(rows: list[Code]) -> str:
    """The tables as Markdown, an architecture each."""
    facts = extension.build_facts("_ops")
    kinds = [kind for kind in KINDS if any(row.mix[kind] for row in rows)]
    lines = [HEAD.format(commit=commit(), **facts)]
    for architecture in sorted({row.architecture for row in rows}):
        lines += ["", f"## {architecture}", ""]
        columns = ["kernel", "registers", "stack", "shared", "instructions", *kinds]
        lines.append(f"| {' | '.join(columns)} |")
        lines.append("|---|" + "---:|" * (len(columns) - 1))
        for row in rows:
            if row.architecture == architecture:
                numbers = [row.registers, row.stack, row.shared, row.instructions]
                numbers += [row.mix[kind] for kind in kinds]
                lines.append(f"| `{row.name}` | {' | '.join(map(str, numbers))} |")
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.relative_to(ROOT)}")
    arguments = parser.parse_args()
    facts = extension.build_facts("_ops")
    if facts.get("cuda") is None:
        sys.exit(f"machine_code: {extension.why_not('_ops')}")
    text = page(read())
    print(text)
    if arguments.write:
        PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
