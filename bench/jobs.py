"""Commands run side by side until a deadline, each with a log of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from math import inf
from pathlib import Path
from typing import NamedTuple

from bench.machine import ROOT

ENDED, TOO_LONG, CUT_OFF = "ended", "too long", "cut off"


class Job(NamedTuple):
    """A command, run in the checkout.

    Attributes:
        name: also the name of its log.
        command: program and arguments.
        environment: what differs from that of this process; None takes a variable away.
        limit: seconds after which it counts as hung.
    """

    name: str
    command: Sequence[str]
    environment: Mapping[str, str | None] = {}
    limit: float = inf


class Done(NamedTuple):
    """How a job went: `end` is ENDED, TOO_LONG (its own limit) or CUT_OFF (the deadline)."""

    job: Job
    end: str
    status: int
    seconds: float
    log: Path

    @property
    def output(self) -> str:
        """What the command printed, standard output and error together."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    @property
    def failure(self) -> str | None:
        """Why it failed, in words that end a sentence; None if it did not, or was cut off."""
        if self.end == TOO_LONG:
            return f"still running after {self.seconds:.0f} s"
        if self.end == ENDED and self.status < 0:
            return f"killed by signal {-self.status}"
        if self.end == ENDED and self.status:
            return f"exit status {self.status}"
        return None


class _Running(NamedTuple):
    job: Job
    process: subprocess.Popen
    log: Path
    began: float

    def done(self, end: str) -> Done:
        seconds = time.monotonic() - self.began
        return Done(self.job, end, self.process.returncode, seconds, self.log)


def run(jobs: Sequence[Job], logs: Path, *, deadline: float, processes: int = 1) -> Iterator[Done]:
    """Each job as it ends; those that the deadline finds waiting are not among them.

    Args:
        jobs: started in this order.
        logs: folder of the logs.
        deadline: when, by `time.monotonic`, nothing is started any more and what runs is killed.
        processes: how many run at a time.
    """
    waiting, running = list(reversed(jobs)), []
    try:
        while waiting or running:
            is_late = time.monotonic() >= deadline
            while waiting and len(running) < processes and not is_late:
                running.append(_start(waiting.pop(), logs))
            if is_late:
                waiting.clear()
            for each in list(running):
                end = _end(each, is_late)
                if end is not None:
                    running.remove(each)
                    yield each.done(end)
            time.sleep(0.05)
    finally:
        for each in running:
            _kill(each.process)


def _start(job: Job, logs: Path) -> _Running:
    environment = {**os.environ, **job.environment}
    log = logs / f"{job.name}.log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            [str(word) for word in job.command],
            cwd=ROOT,
            env={name: value for name, value in environment.items() if value is not None},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            # A group of its own, so that its children can be killed with it.
            start_new_session=True,
        )
    return _Running(job, process, log, time.monotonic())


def _end(running: _Running, is_late: bool) -> str | None:
    """How it ended, None while it may go on."""
    if running.process.poll() is not None:
        return ENDED
    if is_late or time.monotonic() - running.began > running.job.limit:
        _kill(running.process)
        return CUT_OFF if is_late else TOO_LONG
    return None


def _kill(process: subprocess.Popen) -> None:
    """Ends a process and its children; none of them has anything to save."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
