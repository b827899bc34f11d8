"""What the attention kernels should take on an H200, from their machine code; nothing is timed.

    python bench/attention_estimate.py              # prints the tables, from the built library
    python bench/attention_estimate.py --fractions  # and those of other shares of exp2 on FMA units
    python bench/attention_estimate.py --write      # both, and writes docs/attention_estimate.md

The library is read by cuobjdump; the shares are compiled by nvcc. No GPU is asked.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from bench import floors, machine_code
from bench.ceilings import flags, run
from bench.machine import ROOT, commit
from bench.sass import CLOCKS, MMA_SYNC, Instruction, body, inner_loop, loops, parse
from model.variants import VARIANTS
from videoswin_kernels import extension
from videoswin_kernels.testing import Case, Stage

PAGE = ROOT / "docs" / "attention_estimate.md"
SOURCE = ROOT / "csrc" / "cuda" / "attention_canonical.cu"
ARCHITECTURE = "sm_90a"
MULTIPROCESSORS, CLOCK, BATCH = 132, 1.98e9, 8
FRACTIONS = range(5)
HEAD = """# What the attention kernels should take

Written by `python bench/attention_estimate.py --write` at commit {commit}: nvcc {cuda},
{compiler}, {architecture}, read with cuobjdump. **Nothing here was timed.** It is the prediction
that the first run on a GPU is held against, and where the two differ, what to look for.

The instructions of each kernel's loop over scores are counted by the unit that runs them. If each
unit were busy all the time, the busiest would bound the kernel: the prediction is that bound, for
{multiprocessors} multiprocessors at {clock:.2f} GHz, and so the least time that this machine code
can take. It ignores latency, launches, what comes before and after the loop, a grid's tail, bank
conflicts and device memory. Kernels: bfloat16, heads of 32 channels.

Rates of a multiprocessor in a clock: 4 instructions issued, 16 special functions, 128 float32
operations (an IMAD counts as one), 64 others, conversions to bfloat16 among them, 128 bytes of
shared memory (a shuffle counts as 128): NVIDIA, CUDA C++ Programming Guide, throughput of
arithmetic instructions, 9.0. Tensor cores: 4096 dense bfloat16 operations, the data sheet's 990
TFLOP/s, times {mma_sync}, **assumed** of mma.sync where wgmma has 1; bench/ceilings.py measures
both. Assumed, too: which unit runs an instruction, by its name, and that a load of 64 bits takes
two wavefronts even where lanes read the same."""
COUNTS = """## Instructions of a warp for 128 scores

Of the innermost loop that multiplies; of a canonical kernel, of all that 32 queries take: the loop,
what is left of the keys, beginning and end. `issue` is all instructions, `shared` wavefronts of 128
bytes. `copies`, of the issued ones, gather the next keys. Not counted are `rare` ones, which a
branch forward skips, 8 or more without a product (masks of mixed windows, levels raised, a last
tile cut, the first turn, rows written), and `loops` that copy nothing asynchronously (codes and
regions, a tile of biases)."""
CLOCK_COUNTS = "## Clocks of a multiprocessor for 128 scores"
TIMES = """## Microseconds of a block of the model, batch {batch}, 32 x 224 x 224

`floor` is the least that any kernel takes, by bytes, products and exponentials (bench/floors.py),
and `of floor` how near the prediction is to it. `lanes`: of the scores computed, those that are no
padding. `generic forward` is what it would take of these windows if it were asked. The backward is
the sum of its passes."""
SHARES = """## Exponentials on float32 units

Clocks of a multiprocessor for 128 scores if VIDEOSWIN_EXP2_ON_FMA of every 8 exponentials were
computed by FMA; the library has {default}. What spills registers is no choice: the build refuses
it, and here its accesses to local memory, of the whole kernel, are counted as issued alone."""


class Kernel(NamedTuple):
    """A kernel's row.

    Attributes:
        name: as `machine_code.short` has it.
        products: tensor-core instructions for 128 scores.
        rows, columns: tiles that padding fills up; columns of 0 are exact.
        copies: pieces of 16 bytes that a thread copies in a turn of the loop.
        unit: scores of what the enclosing loop does in one turn, or 0: it is not counted.
    """

    name: str
    products: int
    rows: int
    columns: int
    copies: int = 0
    unit: int = 0

    def lanes(self, tokens: int) -> float:
        """Scores of a window over those computed."""
        rows = -(-tokens // self.rows) * self.rows
        columns = -(-tokens // self.columns) * self.columns if self.columns else tokens
        return tokens**2 / (rows * columns)


class Cost(NamedTuple):
    """Of 128 scores: instructions of a warp by unit, and of those what copies; what is left out.

    Attributes:
        counts, copies, rare, loops: HEAD and COUNTS say what.
        turn: scores of a warp in a turn of the loop.
        spills: of the whole kernel, what puts registers into local memory, or takes them back.
    """

    counts: dict[str, float]
    copies: float
    rare: float
    loops: float
    turn: float
    spills: int

    @property
    def clocks(self) -> dict[str, float]:
        return {unit: self.counts[unit] * CLOCKS[unit] for unit in CLOCKS}

    @property
    def bound(self) -> tuple[float, str]:
        return max((clocks, unit) for unit, clocks in self.clocks.items())


# In 128 scores of 32 channels: two products to make them, and two to use them as weights. The query
# pass makes scores and their gradients and uses both, for the mean of keys as well; the key pass
# likewise; the pair pass only makes them. A stage copies two tensors, the pair pass four: 64 rows
# of 4 pieces for 128 threads are 2 copies of each.
CANONICAL = {
    depth: Kernel(f"attention_canonical_kernel<bfloat16, {depth}>", 4, 32, 0, 0, 32 * 49 * depth)
    for depth in (8, 16)
}
GENERIC = Kernel("attention_forward_kernel<bfloat16, 32>", 4, 64, 64, 4)
BACKWARD = {
    "query pass": Kernel("query_gradient_kernel<bfloat16, 32>", 8, 64, 32, 2),
    "key pass": Kernel("key_value_gradient_kernel<bfloat16, 32>", 8, 64, 32, 2),
    "pair pass": Kernel("bias_gradient_kernel<bfloat16, 32>", 4, 64, 32, 6),
}
KERNELS = (*CANONICAL.values(), GENERIC, *BACKWARD.values())


def cost(kernel: Kernel, code: Sequence[Instruction]) -> Cost:
    """Of 128 scores. The scores of a turn of the loop follow from its products."""
    first, last = inner_loop(code)
    inner = body(code, first, last)
    turn = 128 * inner.scores["tensor"] / kernel.products
    pieces = inner.copies["pieces"]
    if bool(pieces) != bool(kernel.copies):
        raise ValueError(f"attention_estimate: {kernel.name} does not copy as it is said to")
    repeats = kernel.copies / pieces if pieces else 0
    sums = {
        "rare": inner.rare["issue"],
        "loops": inner.loops["issue"],
        "copies": repeats * inner.copies["issue"],
        **inner.total(repeats),
    }
    scores = turn
    if kernel.unit:
        around = [loop for loop in loops(code) if loop[0] < first and last < loop[1]]
        outer = min(around, key=lambda loop: loop[1] - loop[0])
        rest = body(code, *outer, without=range(first, last + 1))
        scores, turns = kernel.unit, kernel.unit // turn
        beside = {"rare": rest.rare["issue"], "loops": rest.loops["issue"], **rest.total(0)}
        sums = {name: turns * count + beside.get(name, 0) for name, count in sums.items()}
    of_128 = {name: 128 / scores * count for name, count in sums.items()}
    left_out = (of_128[name] for name in ("copies", "rare", "loops"))
    spills = sum(instruction.name.startswith(("LDL", "STL")) for instruction in code)
    return Cost({unit: of_128[unit] for unit in CLOCKS}, *left_out, turn, spills)


def costs(text: str, kernels: Iterable[Kernel] = KERNELS) -> dict[str, Cost]:
    """Kernel's name -> its cost, from what cuobjdump prints."""
    code = parse(text)
    return {kernel.name: cost(kernel, code[kernel.name]) for kernel in kernels}


def library_costs() -> dict[str, Cost]:
    return costs(machine_code.dump(machine_code.LIBRARY, "-sass", "-arch", ARCHITECTURE))


def fraction_costs(fraction: int) -> dict[str, Cost]:
    """Those of the canonical kernels if so many of 8 exponentials are computed by FMA. nvcc."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "attention_canonical.cubin"
        options = [*flags("90a", False), f"-DVIDEOSWIN_EXP2_ON_FMA={fraction}", "-Xcompiler=-fPIC"]
        run(["nvcc", *options, "-cubin", "-o", cubin, SOURCE])
        return costs(machine_code.dump(cubin, "-sass"), CANONICAL.values())


def stages(variant: str, window: tuple[int, int, int]) -> list[Stage]:
    """The stages of a model on a clip of 32 x 224 x 224: patches of 2 x 4 x 4, then halves."""
    facts = VARIANTS[variant]
    return [
        Stage(
            Case((16, 56 >> n, 56 >> n), window, (0, 0, 0)), facts["embed_dim"] << n, heads
        )
        for n, heads in enumerate(facts["num_heads"])
    ]  # fmt: skip


def microseconds(kernel: Kernel, spent: Cost, stage: Stage, batch: int = BATCH) -> float:
    """The least that a kernel takes for all windows of a batch, by the unit that bounds it."""
    tokens = stage.case.tokens
    scores = batch * stage.case.windows * stage.heads * tokens**2 / kernel.lanes(tokens)
    return scores / 128 * spent.bound[0] / (MULTIPROCESSORS * CLOCK) * 1e6


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """Lines of Markdown; the first column is words."""
    lines = [f"| {' | '.join(columns)} |", "|---|" + "---:|" * (len(columns) - 1)]
    return lines + [f"| {' | '.join(map(str, row))} |" for row in rows]


def count_table(spent: dict[str, Cost]) -> list[str]:
    rows = []
    for name, of in spent.items():
        numbers = [of.counts[unit] for unit in CLOCKS] + [of.copies, of.rare, of.loops]
        rows.append([f"`{name}`", *(f"{number:.1f}" for number in numbers)])
    return table(["kernel", *CLOCKS, "copies", "rare", "loops"], rows)


def clock_table(spent: dict[str, Cost]) -> list[str]:
    rows = []
    for name, of in spent.items():
        clocks = (f"{of.clocks[unit]:.2f}" for unit in CLOCKS)
        rows.append([f"`{name}`", *clocks, f"{of.bound[0]:.2f}, {of.bound[1]}"])
    return table(["kernel", *CLOCKS, "bound"], rows)


def time_rows(spent: dict[str, Cost]) -> list[list[str]]:
    """A line for each stage of both models and both windows."""
    rows = []
    for variant, window in (
        (variant, window) for window in ((8, 7, 7), (16, 7, 7)) for variant in ("swin_t", "swin_b")
    ):
        for number, stage in enumerate(stages(variant, window), 1):
            forward = CANONICAL[stage.case.tokens // 49]
            took = {
                kernel.name: microseconds(kernel, spent[kernel.name], stage) for kernel in KERNELS
            }
            backward = [took[kernel.name] for kernel in BACKWARD.values()]
            least = {
                direction: 1e3
                * floors.floor([floors.attention(stage, BATCH, direction)], floors.H200)[0]
                for direction in floors.PASSES
            }
            padding = [
                kernel.lanes(stage.case.tokens) for kernel in (forward, BACKWARD["key pass"])
            ]
            reached = least[floors.FORWARD] / took[forward.name]
            back = least[floors.BACKWARD] / sum(backward)
            rows.append([
                f"{variant} {'x'.join(map(str, window))} stage {number}",
                f"{took[forward.name]:.1f}", f"{least[floors.FORWARD]:.1f}", f"{reached:.0%}",
                f"{padding[0]:.1%}", f"{took[GENERIC.name]:.1f}",
                *(f"{each:.1f}" for each in backward), f"{sum(backward):.1f}",
                f"{least[floors.BACKWARD]:.1f}", f"{back:.0%}", f"{padding[1]:.1%}",
            ])  # fmt: skip
    return rows


def time_table(spent: dict[str, Cost]) -> list[str]:
    names = ("stage", "forward", "floor", "of floor", "lanes", "generic forward")
    backward = ("backward", "floor", "of floor", "lanes")
    return table([*names, *BACKWARD, *backward], time_rows(spent))


def share_table(shares: dict[int, dict[str, Cost]]) -> list[str]:
    rows = []
    for kernel in CANONICAL.values():
        for fraction, spent in shares.items():
            of = spent[kernel.name]
            clocks = (f"{of.clocks[unit]:.2f}" for unit in CLOCKS)
            bound = f"{of.bound[0]:.2f}, {of.bound[1]}"
            rows.append([f"`{kernel.name}`", f"{fraction} of 8", *clocks, bound, of.spills])
    return table(["kernel", "by FMA", *CLOCKS, "bound", "spills"], rows)


def default_fraction() -> int:
    return int(
        re.search(r"#define VIDEOSWIN_EXP2_ON_FMA (\d)", SOURCE.read_text(encoding="utf-8"))[1]
    )


def page(spent: dict[str, Cost], shares: dict[int, dict[str, Cost]]) -> str:
    """The tables as Markdown."""
    facts = extension.build_facts("_ops")
    about = {"multiprocessors": MULTIPROCESSORS, "clock": CLOCK / 1e9, "mma_sync": MMA_SYNC}
    head = HEAD.format(commit=commit(), architecture=ARCHITECTURE, **about, **facts)
    parts = [
        [head, ""],
        [COUNTS, "", *count_table(spent), ""],
        [CLOCK_COUNTS, "", *clock_table(spent), ""],
        [TIMES.format(batch=BATCH), "", *time_table(spent), ""],
    ]
    if shares:
        parts.append([SHARES.format(default=default_fraction()), "", *share_table(shares), ""])
    return "\n".join(line for part in parts for line in part)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--fractions", action="store_true", help="shares of exp2 on FMA units")
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.relative_to(ROOT)}")
    arguments = parser.parse_args()
    if extension.build_facts("_ops").get("cuda") is None:
        sys.exit(f"attention_estimate: {extension.why_not('_ops')}")
    shares = {}
    if arguments.fractions or arguments.write:
        if shutil.which("nvcc") is None:
            sys.exit("attention_estimate: the shares are compiled, and there is no nvcc in PATH")
        shares = {fraction: fraction_costs(fraction) for fraction in FRACTIONS}
    text = page(library_costs(), shares)
    print(text)
    if arguments.write:
        PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
