"""The instructions of a kernel's loops, by the unit of a multiprocessor that runs them.

Read from what cuobjdump prints of machine code for compute capability 9.0. Which unit runs an
instruction is known by its name, and one of no known unit is an error, never free.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from bench import machine_code

# What mma.sync is assumed to reach of the dense rate, 4096 operations a clock.
MMA_SYNC = 0.63
PRODUCT_FLOPS = 2 * 16 * 8 * 16

# Clocks of a multiprocessor for an instruction of a warp; of shared memory, for 128 bytes.
CLOCKS = {
    "issue": 1 / 4,
    "tensor": PRODUCT_FLOPS / (4096 * MMA_SYNC),
    "special": 32 / 16,
    "float32": 32 / 128,
    "other": 32 / 64,
    "shared": 1.0,
}
# What takes a slot of issue and nothing that is counted: control, constants, device memory.
ISSUE_ALONE = (
    "BAR|BRA|BSSY|BSYNC|BREAK|CALL|CS2R|DEPBAR|ERRBAR|EXIT|LDC|LDG|LDGDEPBAR|LDL|MEMBAR|NANOSLEEP|"
    "NOP|R2UR|RED|RET|S2R|S2UR|STG|STL|U[A-Z0-9]+|WARPSYNC|YIELD"
)
UNITS = {
    "tensor": "HMMA",
    "special": "MUFU|I2F|F2I|F2F|FRND",
    "float32": "FFMA|FADD|FMUL|IMAD|HADD2|HMUL2|HFMA2",
    "other": (
        "FMNMX|FSETP|FSET|FSEL|FCHK|IADD3|IABS|IMNMX|ISETP|LEA|LOP3|MOV|PLOP3|PRMT|SEL|SGXT|SHF|"
        "VIADD|VIADDMNMX|VIMNMX|VOTE|F2FP|I2FP|P2R|R2P|BMSK|POPC|FLO"
    ),
    "shared": "LDS|STS|LDSM|STSM|LDGSTS|SHFL",
    "issue": ISSUE_ALONE,
}


class Instruction(NamedTuple):
    """An instruction as cuobjdump prints it.

    Attributes:
        address: of its first byte.
        guard: "@P0", "@!PT", or "".
        name: "FFMA", "LDSM.16.M88.4".
        target: where a branch goes, else None.
    """

    address: int
    guard: str
    name: str
    target: int | None

    @property
    def is_product(self) -> bool:
        return self.name.startswith("HMMA")


class Body(NamedTuple):
    """Instructions of a loop by what becomes of them: of each sort, how much of each unit."""

    scores: Counter
    copies: Counter
    rare: Counter
    loops: Counter

    def total(self, turns: float) -> Counter:
        """What is counted, each loop of copies running `turns` times."""
        copies = {unit: turns * count for unit, count in self.copies.items()}
        return Counter({unit: self.scores[unit] + copies.get(unit, 0) for unit in CLOCKS})


def parse(text: str) -> dict[str, list[Instruction]]:
    """Short name -> instructions, of what `cuobjdump -sass` prints for one architecture."""
    found: dict[str, list[Instruction]] = {}
    code: list[Instruction] = []
    for line in text.splitlines():
        if match := re.match(r"\s*Function : (\S+)", line):
            code = found.setdefault(machine_code.short(match[1]), [])
        elif match := re.match(
            r"\s*/\*([0-9a-f]{4,})\*/\s+(@!?U?P[T\d]+ )?\s*([A-Z][\w.]*)(.*?);", line
        ):
            address, guard, name, operands = match.groups()
            target = re.search(r"0x([0-9a-f]+)", operands) if name.startswith("BRA") else None
            place = int(target[1], 16) if target else None
            code.append(Instruction(int(address, 16), (guard or "").strip(), name, place))
    return found


def units(instruction: Instruction) -> Counter:
    """What an instruction of a warp takes of each unit. ValueError: its name is not known."""
    name, parts = instruction.name.partition(".")[0], instruction.name.split(".")[1:]
    unit = next((unit for unit, names in UNITS.items() if re.fullmatch(names, name)), None)
    if unit is None:
        raise ValueError(f"sass: an instruction of no known unit: {instruction.name}")
    taken = Counter({"issue": 1})
    # What is guarded by "never" is issued, and done by nobody.
    if unit == "issue" or instruction.guard == "@!PT":
        return taken
    width = 1
    if name in ("LDS", "STS", "LDGSTS"):
        width = 4 if "128" in parts else 2 if "64" in parts else 1
    elif name in ("LDSM", "STSM"):
        width = 4 if parts[-1] == "4" else 2 if parts[-1] == "2" else 1
    taken[unit] += width
    return taken


def loops(code: Sequence[Instruction]) -> list[tuple[int, int]]:
    """First and last index of each loop, one for each first instruction, as they end."""
    places = {instruction.address: index for index, instruction in enumerate(code)}
    ends = {}
    for index, instruction in enumerate(code):
        first = places.get(instruction.target, len(code))
        # A branch to itself is what a kernel is filled up with.
        if first < index:
            ends[first] = index
    return sorted(ends.items(), key=lambda loop: loop[1])


def inner_loop(code: Sequence[Instruction]) -> tuple[int, int]:
    """The one loop that multiplies and has none within that does. ValueError: there is none."""
    multiplying = [
        (first, last) for first, last in loops(code)
        if any(instruction.is_product for instruction in code[first : last + 1])
    ]  # fmt: skip
    inner = [
        (first, last) for first, last in multiplying
        if not any(first <= a and b <= last and (a, b) != (first, last) for a, b in multiplying)
    ]  # fmt: skip
    if len(inner) != 1:
        raise ValueError(f"sass: {len(inner)} innermost loops with products, not 1")
    return inner[0]


def body(code: Sequence[Instruction], first: int, last: int, without: range = range(0)) -> Body:
    """What the instructions from `first` to `last` take, but for those `without`."""
    part = [index for index in range(first, last + 1) if index not in without]
    places = {code[index].address: index for index in part}
    sorts = {}
    for start, end in loops(code):
        if first <= start and end <= last and (start, end) != (first, last):
            inside = range(start, end + 1)
            if any(code[index].is_product for index in inside) or start in without:
                continue
            is_copy = any(code[index].name.startswith("LDGSTS") for index in inside)
            sorts.update(dict.fromkeys(inside, "copies" if is_copy else "loops"))
    for index in part:
        skip, to = code[index], places.get(code[index].target, -1)
        # What a rare path ends with, jumping over the usual one, skips nothing.
        if not skip.guard or skip.guard == "@PT" or index in sorts or to <= index:
            continue
        skipped = range(index + 1, to)
        if len(skipped) >= 8 and not any(code[each].is_product for each in skipped):
            for each in skipped:
                sorts.setdefault(each, "rare")
    counts = {sort: Counter() for sort in Body._fields}
    for index in part:
        counts[sorts.get(index, "scores")] += units(code[index])
        counts[sorts.get(index, "scores")]["pieces"] += code[index].name.startswith("LDGSTS")
    return Body(**counts)
