"""What the stages of on_gpu.sh run: parts, each a command with the rows that its end makes."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import NamedTuple

from bench import intrinsics
from bench.jobs import Done, Job
from bench.machine import ROOT
from bench.report import tabulate
from bench.smoke import COLUMNS, DTYPES, KERNELS
from videoswin_kernels.selection import OPERATORS, WORDS

# A script stops between its rows: it may take this many seconds longer than it was told.
GRACE = 40


class Context(NamedTuple):
    """How on_gpu.sh was called.

    Attributes:
        output: folder of the results.
        device: "cuda", or "cpu" for the interpreter and the emulation.
        deadline: when a stage stops itself, by `time.monotonic`.
        minutes: from now until then.
        arguments: the rest of the command line.
        without: kernel sets that cannot be asked, as their libraries could not be built.
    """

    output: Path
    device: str
    deadline: float
    minutes: float
    arguments: Sequence[str]
    without: Sequence[str] = ()

    @property
    def rows(self) -> Path:
        return self.output / "rows.jsonl"

    @property
    def logs(self) -> Path:
        return self.output / "logs"


class Part(NamedTuple):
    """A job and its rows.

    Attributes:
        job: what runs.
        key: items by which its rows are found when the stage is continued; None for a script,
            which writes its own rows and finds them again.
        rows: its rows, without the key. One that failed has the item "failed", a sentence, and
            may have "failures", a list of [name, what it said]; one that cannot run has "reason".
    """

    job: Job
    key: dict | None = None
    rows: Callable[[Done], list[dict]] = lambda done: []


class Stage(NamedTuple):
    """Parts, how many of them run at a time, and how their rows are told; None for a script's."""

    parts: Sequence[Part]
    processes: int = 1
    table: Callable[[list[dict]], str] | None = None


def python(script: str, *words: object) -> list[str]:
    """The command of a script of this folder."""
    return [sys.executable, str(ROOT / "bench" / script), *map(str, words)]


def half_the_processors() -> int:
    """For parts that keep more than one busy, as tests and compilers do."""
    return max(1, (os.cpu_count() or 1) // 2)


def scripts(*commands: Sequence[str]) -> Callable[[Context], Stage]:
    """A stage of scripts, which take --device, --json and --minutes and end with their table.

    Where minutes end one, it says "3 settings are left after 8 minutes", and exits as it would.
    """

    def stage(context: Context) -> Stage:
        told = ["--device", context.device, "--json", context.rows]
        parts = []
        for name, *words in commands:
            command = python(f"{name}.py", *words, *told, "--minutes", f"{context.minutes:.2f}")
            parts.append(Part(Job(name, [*command, *context.arguments])))
        return Stage(parts)

    return stage


def tune(context: Context) -> Stage:
    """Variants of the Triton attention; its file is named from where on_gpu.sh is called."""
    file, *words = context.arguments
    return scripts(["tune"])(context._replace(arguments=[str(Path(file).resolve()), *words]))


def asked(context: Context) -> tuple[argparse.Namespace, list[str]]:
    """The operators, dtypes and kernel sets that smoke.py is to ask, and its other arguments."""
    parser = argparse.ArgumentParser("smoke", add_help=False)
    parser.add_argument("--operators", nargs="+", choices=OPERATORS, default=OPERATORS)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=tuple(DTYPES))
    parser.add_argument("--kernels", nargs="+", choices=WORDS, default=KERNELS)
    chosen, others = parser.parse_known_args(context.arguments)
    chosen.kernels = [name for name in chosen.kernels if name not in context.without]
    return chosen, others


def smoke(context: Context) -> Stage:
    """Each kernel set, operator and dtype in a process of its own: they compile side by side."""
    # Of Triton, a CPU has interpreted kernels alone.
    environment = {} if context.device == "cuda" else {"TRITON_INTERPRET": "1"}
    chosen, others = asked(context)
    parts = []
    for kernels, operator, dtype in product(chosen.kernels, chosen.operators, chosen.dtypes):
        key = {"bench": "smoke", "kernels": kernels, "operator": operator, "dtype": dtype}
        file = context.logs / f"{'_'.join(key.values())}.jsonl"
        words = ["--device", context.device, "--kernels", kernels]
        words += ["--operators", operator, "--dtypes", dtype, *others]
        command = python("smoke.py", *words, "--json", file)
        job = Job(file.stem, command, environment, limit=120)
        rows = partial(rows_of, file=file, place={"direction": "both"})
        parts.append(Part(job, key, rows))
    if context.device == "cuda" and "cuda" in chosen.kernels:
        file = context.logs / "intrinsics.jsonl"
        job = Job(file.stem, python("intrinsics.py", "--json", file), limit=120)
        rows = partial(rows_of, file=file, place={"intrinsic": "all"})
        parts.append(Part(job, {"bench": "intrinsics"}, rows))
    return Stage(parts, half_the_processors(), smoke_table)


def rows_of(done: Done, file: Path, place: dict) -> list[dict]:
    """The rows that a script wrote, and one that says how it failed, if none of them does."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    rows = [json.loads(line) for line in lines]
    if not any("failed" in row for row in rows) and (done.failure or not rows):
        rows.append({**place, "failed": done.failure or "it wrote no rows"})
    return rows


def smoke_table(rows: list[dict]) -> str:
    """The operators, and behind them the intrinsics, if they were asked."""
    tables = [tabulate(rows, COLUMNS)]
    if any("intrinsic" in row for row in rows):
        tables.append(tabulate(rows, intrinsics.COLUMNS))
    return "\n\n".join(tables)
