"""Signals that end a run: the step under way is ended first, and a checkpoint written."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def stop_on_signals() -> Iterator[list[int]]:
    """A list that SIGINT or SIGTERM make true: the step under way ends before the run does.

    A second signal ends the process at once, and its workers, of which one may be stuck in a video.
    """
    received: list[int] = []
    kinds = (signal.SIGINT, signal.SIGTERM)

    def stop(number: int, _frame: object) -> None:
        if received:
            for worker in multiprocessing.active_children():
                worker.kill()
            os._exit(128 + number)
        received.append(number)
        os.write(2, b"\nstopping after this step; once more to stop at once\n")

    before = [signal.signal(kind, stop) for kind in kinds]
    try:
        yield received
    finally:
        for kind, handler in zip(kinds, before, strict=True):
            signal.signal(kind, handler)
