"""Rows in both states of glibc's allocator, which change a CPU's times of plain PyTorch.

A state is set before tensors are made and cannot be taken back, so each has a process of its own.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from bench.machine import header, host_allocator
from bench.rows import SAME, Rows
from train.allocator import set_allocator

STATES = ("default", "pooled")
BOTH = "both"


def add_option(parser: argparse.ArgumentParser) -> None:
    """The option that names the state."""
    help = "state of glibc's allocator, for a CPU; default: both, one after the other"
    parser.add_argument("--allocator", choices=(*STATES, BOTH), help=help)


def settle(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Checks the option, and sets it where it is not given: None on a GPU."""
    if options.device == "cuda":
        if options.allocator:
            parser.error("--allocator is for a CPU: glibc's allocator holds no tensors of a GPU")
    elif options.allocator is None:
        options.allocator = BOTH if host_allocator() in STATES else STATES[0]


def conduct(
    script: str,
    words: Sequence[str] | None,
    options: argparse.Namespace,
    fill: Callable[[Rows], int],
) -> tuple[Rows, int]:
    """The rows of a bench, and its exit status.

    Args:
        script: file of the bench, which is run once in each state for both of them.
        words: its command line, None for that of this process.
        options: what it says: device, allocator, json, minutes.
        fill: measures here what the rows lack, and returns the exit status.
    """
    if options.allocator == BOTH:
        return _in_each(script, words, options)
    if options.allocator:
        set_allocator(options.allocator)
        found = host_allocator()
        # "default" takes any allocator that is not glibc's as it is.
        if found != options.allocator and "pooled" in (found, options.allocator):
            sys.exit(f"--allocator {options.allocator}: it is {found} here, and stays so")
    rows = Rows(options.json, header(options.device))
    return rows, fill(rows)


def _in_each(
    script: str, words: Sequence[str] | None, options: argparse.Namespace
) -> tuple[Rows, int]:
    """Each state in turn, in half the minutes; what it measures, it leaves in the file of rows."""
    own = {**header(options.device), "allocator": ", then ".join(STATES)}
    same = [name for name in SAME if name != "allocator"]
    with tempfile.TemporaryDirectory() as folder:
        path = options.json or Path(folder, "rows.jsonl")
        words = [*(sys.argv[1:] if words is None else words), "--json", path]
        if options.minutes is not None:
            words += ["--minutes", str(options.minutes / 2)]
        # The table is that of all rows, and printed once; what else there is to say is an error's.
        statuses = [
            subprocess.run(
                [sys.executable, script, *words, "--allocator", state], stdout=subprocess.DEVNULL
            ).returncode
            for state in STATES
        ]
        return Rows(path, own, same), int(any(statuses))


def with_state(columns: Mapping[str, str], options: argparse.Namespace) -> dict[str, str]:
    """The columns of a table, that of the allocator first on a CPU."""
    return {**({"allocator": "allocator"} if options.device == "cpu" else {}), **columns}
