"""The page docs/support.md: what each kernel set takes, and what has been proven of it, and how.

A function of the sources alone. `selection` is asked about meta tensors, for which no library is
loaded and no GPU looked for; `python -m videoswin_kernels` says what runs on a machine.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from textwrap import fill
from typing import NamedTuple

import torch

from videoswin_kernels.ops._checks import check_floating
from videoswin_kernels.selection import (
    CAPABILITY,
    HEAD_WIDTHS,
    MOVEMENT,
    OPERATORS,
    TRITON_VERSION,
    WIDEST,
    WIDEST_ODD,
    Call,
    reason_against,
)

KERNEL_SETS = ("reference", "cpu", "triton", "cuda")
# int64 stands for all that is no floating-point number.
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64)
# What CMakeLists.txt builds, unless told otherwise, and what tests/test_triton_compiles.py does.
CUDA_ARCHITECTURES = ("80-real", "86-real", "89-real", "90a-real", "80-virtual")
TRITON_ARCHITECTURES = (80, 90, 100, 120)
# How a processor tells what kernels compute; no kernel set has been told by a GPU.
PROOFS = {"reference": "run", "cpu": "run", "triton": "interpreted", "cuda": "emulated"}
# The head width at which Triton's kernels are compiled for bfloat16: tests/triton_compile.py.
COMPILED_WIDTH = 32
TITLES = {
    "reference": "plain PyTorch, on any device",
    "cpu": "C++, on CPU tensors",
    "triton": "Triton, on CUDA tensors",
    "cuda": "CUDA C++, on CUDA tensors",
}

HEAD = """\
# What is supported

Written by `python -m videoswin_kernels --support` from what the code answers; no machine was asked.
`python -m videoswin_kernels` says what runs on yours, and `explain(model)` what a model would run.
A dtype is that of all floating-point tensors of a call, and of autocast: one weight in float64 is
enough for `"triton"` and `"cuda"` to refuse.

**No GPU has run any of this yet.** A cell says what has shown, without one, that the numbers are
right, forward and backward:

| cell | what it says |
|---|---|
| run | tests run it on a processor |
| emulated | tests run the CUDA sources themselves in our emulator of CUDA |
| interpreted | tests run it in Triton's interpreter |
| compiled | tests compile it, from the same code as float16; nothing has run it, since Triton's \
interpreter computes bfloat16 wrongly |
| unproven | it is taken, and is float16's code again; nothing has run it, or compiled it |
| no | it is refused, with the sentence of that number below |
"""


class Case(NamedTuple):
    """A row of a table: an operator, which calls of it, and what a `Call` says of them."""

    operator: str
    which: str = ""
    head_width: int | None = HEAD_WIDTHS[0]
    is_too_wide: bool = False

    def call(self, dtype: torch.dtype) -> Call:
        """The call on meta tensors of a dtype."""
        return Call(
            self.operator,
            "meta",
            dtypes=(dtype,),
            head_width=self.head_width,
            is_too_wide=self.is_too_wide,
        )


class Cell(NamedTuple):
    """Whether a kernel set takes a case in a dtype: what has proven it, or why it is refused."""

    kernels: str
    case: Case
    dtype: torch.dtype
    proof: str | None
    reason: str | None


def cases() -> Iterator[Case]:
    """The rows of each table."""
    for operator in OPERATORS:
        if operator in MOVEMENT:
            yield Case(operator)
        elif operator == "window_attention":
            for width in HEAD_WIDTHS:
                yield Case(operator, f"head width {width}", head_width=width)
            yield Case(operator, "another head width", head_width=None)
        else:
            # A merged row is of four tokens.
            row = "4C" if operator == "patch_merging" else "C"
            yield Case(operator, f"{row} to {WIDEST:,} ({WIDEST_ODD:,} where 8 does not divide C)")
            yield Case(operator, f"wider {row}", is_too_wide=True)


def cells(kernels: str) -> Iterator[Cell]:
    """What a kernel set answers, row by row."""
    for case in cases():
        for dtype in DTYPES:
            reason = _against_dtype(case.operator, dtype)
            reason = reason or reason_against(kernels, case.call(dtype))
            proof = None if reason else _proof(kernels, case, dtype)
            yield Cell(kernels, case, dtype, proof, reason)


def _against_dtype(operator: str, dtype: torch.dtype) -> str | None:
    """What the contract says of a dtype, whatever would run."""
    if operator in MOVEMENT:
        return None
    name = "qkv" if operator == "window_attention" else "x"
    try:
        check_floating(operator, name, torch.empty(0, dtype=dtype, device="meta"))
    except TypeError as error:
        return str(error).partition(": ")[2]
    return None


def _proof(kernels: str, case: Case, dtype: torch.dtype) -> str:
    if kernels == "triton" and dtype == torch.bfloat16 and case.operator not in MOVEMENT:
        is_attention = case.operator == "window_attention"
        is_compiled = case.head_width == COMPILED_WIDTH if is_attention else not case.is_too_wide
        return "compiled" if is_compiled else "unproven"
    return PROOFS[kernels]


def page() -> str:
    """The page in Markdown."""
    reasons: dict[str, int] = {}
    lines = [HEAD]
    for kernels in KERNEL_SETS:
        lines.append(f"## `kernels={kernels!r}`: {TITLES[kernels]}\n".replace("'", '"'))
        lines += [*_table(kernels, reasons), ""]
    lines += [
        "## Refused\n",
        "The operator stands before each sentence, the cure behind that of a kernel set.\n",
    ]
    lines += [f"{number}. {reason}" for reason, number in reasons.items()]
    lines += ["", "Every compiled kernel set refuses, in any dtype and on any device:\n"]
    lines += [f"- {reason}" for reason in refused_by_all()]
    lines += ["", *_architectures()]
    return "\n".join(lines) + "\n"


def _table(kernels: str, reasons: dict[str, int]) -> list[str]:
    """A kernel set's table; reasons that it is the first to have get the next numbers."""
    names = [str(dtype).removeprefix("torch.") for dtype in DTYPES[:-1]]
    lines = [f"| operator | of | {' | '.join(names)} | others |", "|---" * (len(DTYPES) + 2) + "|"]
    for case, row in groupby(cells(kernels), key=lambda cell: cell.case):
        marks = [
            cell.proof or f"no, {reasons.setdefault(cell.reason, len(reasons) + 1)}" for cell in row
        ]
        lines.append(f"| `{case.operator}` | {case.which} | {' | '.join(marks)} |")
    return lines


def refused_by_all() -> list[str]:
    """Why compiled kernels refuse calls that `Call` tells apart by anything but what they take."""
    flags = [name for name in Call._fields if name.startswith(("has_", "is_"))]
    found = []
    for flag in flags:
        call = Call("window_attention", "meta", **{flag: True})
        reasons = {reason_against(kernels, call) for kernels in KERNEL_SETS[1:]}
        if None not in reasons:
            found += sorted(reasons)
    return found


def _architectures() -> list[str]:
    """Which machines code is made for, and by whom."""
    needed, triton = (".".join(map(str, version)) for version in (CAPABILITY, TRITON_VERSION))
    (virtual,) = (name.partition("-")[0] for name in CUDA_ARCHITECTURES if "virtual" in name)
    real = {name.removesuffix("-real").rstrip("a") for name in CUDA_ARCHITECTURES if "real" in name}
    later = f"the driver's, from PTX of sm_{virtual}"
    gpus = (
        f"Kernels for GPUs need one of NVIDIA's of compute capability {needed} or newer; Triton's "
        f"need Triton {triton} or newer, too. Machine code of CUDA C++ is what the build makes "
        "unless told otherwise by `VIDEOSWIN_ARCHITECTURES`; a kernel that spills fails it. Triton "
        "compiles for whatever card is there; tests have it compile for some that are not."
    )
    processors = (
        'Kernels of `"cpu"` are compiled for three levels of x86-64: baseline, v3 (AVX2) and v4 '
        "(AVX-512), of which the processor gets its best; tests ask each that it has. Elsewhere "
        "they are the baseline's, which nobody has run."
    )
    lines = [
        f"## Machines\n\n{fill(gpus, 100)}\n",
        "| GPU | machine code of `cuda` | of `triton` |",
        "|---|---|---|",
    ]
    for number in sorted({*map(int, real), *TRITON_ARCHITECTURES}):
        ours = f"built: `{_built(number)}`" if str(number) in real else later
        tests = "compiled by tests" if number in TRITON_ARCHITECTURES else "never tried"
        lines.append(f"| sm_{number} | {ours} | {tests} |")
    lines += [f"| others from {needed} on | {later} | never tried |", "", fill(processors, 100)]
    return lines


def _built(number: int) -> str:
    return next(name for name in CUDA_ARCHITECTURES if name.startswith(str(number)))
