"""Jobs done by several processes, of which one may die of a damaged video without the others."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple, TypeVar

Job = TypeVar("Job")


class Died(NamedTuple):
    """What is known of a job whose process ended: its exit status, negative for a signal."""

    status: int | None

    @property
    def reason(self) -> str:
        status = self.status or 0
        how = f"signal {-status}" if status < 0 else f"status {status}"
        return f"the process that read it ended with {how}"


def each(
    function: Callable[[Job], Any], jobs: Iterable[Job], workers: int
) -> Iterator[tuple[Job, Any]]:
    """Each job with `function(job)`, or with `Died`, as they are done: in any order.

    Workers are started afresh, not forked: the caller may hold threads that a fork would break.
    They end with this process, whatever ends it, and at once when the iterator is closed.

    Args:
        function: of a module, called in the workers; what it raises is raised here as RuntimeError.
        jobs: can be pickled; taken only as workers become free.
        workers: how many processes; 0 is this one, in order, and nothing survives its death.
    """
    if workers == 0:
        for job in jobs:
            yield job, function(job)
        return
    jobs, idle, busy = iter(jobs), [], {}
    try:
        while True:
            for job in islice(jobs, workers - len(busy)):
                worker = idle.pop() if idle else _Worker(function)
                if not worker.take(job):
                    worker = _Worker(function)
                    worker.take(job)
                busy[worker.pipe] = worker
            if not busy:
                return
            for pipe in wait(list(busy)):
                worker = busy.pop(pipe)
                try:
                    result, failure = pipe.recv()
                except (EOFError, OSError):
                    worker.process.join()
                    result, failure = Died(worker.process.exitcode), None
                else:
                    idle.append(worker)
                if failure:
                    raise RuntimeError(failure)
                yield worker.job, result
    finally:
        for worker in (*idle, *busy.values()):
            worker.process.kill()
            worker.process.join()


class _Worker:
    """A process, our end of the pipe to it, and the job it has."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        context = multiprocessing.get_context("spawn")
        self.job, (self.pipe, theirs) = None, context.Pipe()
        self.process = context.Process(target=_serve, args=(function, theirs), daemon=True)
        self.process.start()
        # With ours alone open, the end of the process is the end of what can be read.
        theirs.close()

    def take(self, job: Any) -> bool:
        """Whether the process is there to be given a job; it may have been killed meanwhile."""
        self.job = job
        try:
            self.pipe.send(job)
        except OSError:
            self.process.join()
            return False
        return True


def _serve(function: Callable[[Any], Any], pipe: Connection) -> None:
    """Do one job after another, until this process is killed or its parent is gone."""
    # Ctrl-C reaches the whole group of processes; the parent then ends its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    while True:
        job = pipe.recv()
        try:
            answer = function(job), None
        except RuntimeError as error:
            answer = None, str(error)
        except Exception:
            answer = None, traceback.format_exc()
        pipe.send(answer)


def _end_with_the_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)
