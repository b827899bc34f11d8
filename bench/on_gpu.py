"""One stage of the work on a GPU: what on_gpu.sh runs, which says how to call it."""

from __future__ import annotations

import argparse
import re
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from bench import libraries, report, sanitize, suite
from bench.harness import Rows, header
from bench.jobs import CUT_OFF, Done, run
from bench.report import Report
from bench.stages import GRACE, Context, Part, Stage, scripts, smoke, tune

# What a script says where --minutes ended it.
LEFT = re.compile(r"^\d+ \w+ are left after", re.MULTILINE)
STAGES = {
    "smoke": smoke,
    "suite": suite.stage,
    "sanitize": sanitize.stage,
    "ceilings": scripts(["ceilings"]),
    "attention": scripts(["attention", "--direction", "both", "--shifted", "both"]),
    "operators": scripts(["operators"]),
    "model": scripts(["whole_model"]),
    "step": scripts(["train_step"]),
    "tune": tune,
}
# Those that ask kernels in C++, whose libraries must be there before their parts are listed.
OF_LIBRARIES = ("smoke", "suite", "sanitize")


class Stopped(Exception):
    """A signal asks the stage to end."""


def conduct(name: str, stage: Stage, rows: Rows, context: Context) -> Report:
    """Runs the parts of a stage that have no rows yet, and tells how all of them went."""
    by_name = {part.job.name: part for part in stage.parts}
    todo = [part for part in stage.parts if not is_done(part, rows)]
    ran = [f"{len(stage.parts) - len(todo)} of {len(stage.parts)} parts ran before"]
    ended: list[Done] = []
    is_script = stage.table is None
    deadline = context.deadline + (GRACE if is_script else 0)
    jobs = [part.job for part in todo]
    running = run(jobs, context.logs, deadline=deadline, processes=stage.processes)
    try:
        for done in running:
            how = done.failure or done.end
            ran.append(f"{done.job.name}: {how}, {done.seconds:.1f} s")
            print(ran[-1], file=sys.stderr, flush=True)
            if done.end != CUT_OFF:
                add(rows, by_name[done.job.name], done)
            ended.append(done)
    except Stopped as signalled:
        ran.append(str(signalled))
    finally:
        running.close()
    return tell_scripts(name, ran, todo, ended) if is_script else tell(name, ran, stage, rows)


def is_done(part: Part, rows: Rows) -> bool:
    """Whether a part has rows, none of which failed: what failed is tried again."""
    of_part = report.latest(rows, part.key) if part.key else []
    return bool(of_part) and not any("failed" in row for row in of_part)


def add(rows: Rows, part: Part, done: Done) -> None:
    """Adds the rows of a part that has ended, all of them with the header of this run."""
    for row in part.rows(done):
        own = {name: item for name, item in row.items() if name not in rows.header}
        rows.append({**part.key, **own} if part.key else own)


def tell(name: str, ran: Sequence[str], stage: Stage, rows: Rows) -> Report:
    """The report of a stage, from its rows of this run and of those it continues."""
    found, failures, waiting = [], [], 0
    for part in stage.parts:
        of_part = report.latest(rows, part.key)
        waiting += not of_part
        found += of_part
        for row in of_part:
            if "failed" in row:
                whole = [[" ".join(map(str, part.key.values())), row["failed"]]]
                failures += map(tuple, row.get("failures") or whole)
    skipped = [why for row in found for why in row.get("reasons", [row.get("reason")]) if why]
    left = f"{waiting} of {len(stage.parts)} parts are left" if waiting else ""
    return Report(name, ran, failures, skipped, left, stage.table(found))


def tell_scripts(
    name: str, ran: Sequence[str], todo: Sequence[Part], ended: Sequence[Done]
) -> Report:
    """The report of a stage of scripts: what they printed."""
    failures, table, is_left = [], [], len(ended) < len(todo)
    for done in ended:
        is_left |= done.end == CUT_OFF or bool(LEFT.search(done.output))
        if done.failure:
            failures.append((done.job.name, done.output))
        table.append(done.output)
    return Report(name, ran, failures, [], "it stopped before its end" * is_left, "\n".join(table))


def joined(first: Report, then: Report) -> Report:
    """The report on a stage, with that on what ran before it."""
    both = {
        name: [*getattr(first, name), *getattr(then, name)]
        for name in ("ran", "failures", "skipped")
    }
    return then._replace(left="; ".join(filter(None, (first.left, then.left))), **both)


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    """The options, those of the stage behind all others."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("output", type=Path)
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="those of the stage")
    options = parser.parse_args(words)
    if options.device == "cpu" and options.stage != "smoke":
        parser.error("--device cpu is for the stage smoke alone")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no CUDA GPU here (smoke takes --device cpu)")
    return options


def stop(number: int, _frame: object) -> None:
    """A signal ends the parts that run; what there is is told and packed."""
    raise Stopped(f"ended by signal {number}")


def main(words: Sequence[str] | None = None) -> int:
    began = time.monotonic()
    options = parse(words)
    output, minutes = options.output.resolve(), options.minutes
    deadline = began + 60 * minutes
    context = Context(output, options.device, deadline, minutes, options.arguments)
    context.logs.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, stop)
    rows = Rows(context.rows, header(options.device))
    try:
        built = None
        if options.device == "cuda" and options.stage in OF_LIBRARIES:
            built = libraries.build(context, rows)
            if built.failures or built.skipped or built.left:
                context = context._replace(without=("cuda",))
        told = conduct(options.stage, STAGES[options.stage](context), rows, context)
        told = joined(built, told) if built else told
        (output / "report.txt").write_text(told.text(rows.header), encoding="utf-8")
    finally:
        report.pack(output, context.logs)
    print(told.table)
    print(told.verdict)
    return told.status


if __name__ == "__main__":
    sys.exit(main())
