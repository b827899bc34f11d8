"""Batches on the device before they are asked for, and in spite of data workers that die."""

from __future__ import annotations

import atexit
import multiprocessing
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader
from torch.utils.data._utils import signal_handling

from train.data import Batch, VideoDataset

Item = TypeVar("Item")
# Workers that die so often without a step between are no accident.
MOST_DEATHS = 3


class WorkerError(RuntimeError):
    """Data workers die again and again: one sentence."""


def on_device(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """The batches, of which the next is copied to a GPU while the last one is computed with.

    The copies have a stream of their own, and a thread, since the step that computes waits for the
    GPU. On a CPU the batches are as they are.
    """
    if device.type != "cuda":
        yield from batches
        return
    stream = torch.cuda.Stream(device)

    def copies() -> Iterator[tuple[Batch, torch.cuda.Event]]:
        for batch in batches:
            with torch.cuda.stream(stream):
                clips = batch.clips.to(device, non_blocking=True)
                labels = batch.labels.to(device, non_blocking=True)
                boxes = batch.boxes.to(device, non_blocking=True)
                copied = batch._replace(clips=clips, labels=labels, boxes=boxes)
                yield copied, stream.record_event()

    for batch, is_copied in ahead(copies()):
        current = torch.cuda.current_stream(device)
        current.wait_event(is_copied)
        for tensor in (batch.clips, batch.labels, batch.boxes):
            # Freed here, the memory is reused there: not before this stream is done with it.
            tensor.record_stream(current)
        yield batch


def ahead(items: Iterable[Item]) -> Iterator[Item]:
    """The items in their order, each made in a thread while the caller has the one before it.

    What the thread raises is raised where its item would be. The thread ends with the generator.
    """
    found: queue.Queue[tuple[bool, Any]] = queue.Queue(maxsize=1)
    is_over = threading.Event()

    def hand_over(is_item: bool, thing: Any) -> bool:
        while not is_over.is_set():
            try:
                found.put((is_item, thing), timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            for item in items:
                if not hand_over(True, item):
                    return
            hand_over(False, None)
        except BaseException as error:
            hand_over(False, error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while True:
            is_item, thing = found.get()
            if is_item:
                yield thing
            elif thing is None:
                return
            else:
                raise thing
    finally:
        is_over.set()
        thread.join()


def steady(build: Callable[[], DataLoader], device: torch.device) -> Iterator[Batch]:
    """The batches of a loader; where a worker dies, those of another one that goes on there.

    Args:
        build: a loader of what is left to read now.
        device: where the batches shall be.

    Raises:
        WorkerError: they die, and die again before the first batch.
    """
    deaths = 0
    while True:
        loader = build()
        batches, workers = _begun(loader)
        try:
            for batch in on_device(_patient(batches, loader.dataset), device):
                yield batch
                deaths = 0
            return
        except (RuntimeError, ConnectionError, EOFError, FileNotFoundError) as error:
            # A socket of a worker can be closed before the worker is seen to be dead.
            said = str(error).partition("\n")[0] or type(error).__name__
            is_death = said.startswith(("DataLoader worker", "Pin memory thread"))
            # "Caught ..." is what a worker that lives has to tell of the data set.
            is_of_data = not loader.num_workers or said.startswith("Caught ")
            if is_of_data or (isinstance(error, RuntimeError) and not is_death):
                raise
            for worker in workers:
                worker.kill()
            deaths += 1
            if deaths == MOST_DEATHS:
                raise WorkerError(
                    f"data workers died {deaths} times in a row ({said}): with --data.workers=0 "
                    "what is wrong is seen, fewer workers need less memory"
                ) from error
            print(f"{said}; reading begins again where it was", file=sys.stderr)


def _begun(loader: DataLoader) -> tuple[Iterator[Batch], list[BaseProcess]]:
    """A loader's iterator, which finds a dead worker when its batch is asked for; the workers.

    torch's handler of dead children raises wherever the program is, which may be half a step.
    """
    before, others = signal.getsignal(signal.SIGCHLD), multiprocessing.active_children()
    batches = iter(loader)
    workers = [each for each in multiprocessing.active_children() if each not in others]
    if threading.current_thread() is threading.main_thread():
        is_torch = getattr(before, "__module__", None) == signal_handling.__name__
        signal.signal(signal.SIGCHLD, signal.SIG_DFL if is_torch or not before else before)
    # Before torch's own, which are called in the opposite order.
    atexit.unregister(_end_workers)
    atexit.register(_end_workers)
    return batches, workers


def _patient(batches: Iterator[Batch], dataset: VideoDataset) -> Iterator[Batch]:
    """The batches; RuntimeError, as of a dead worker, where one takes longer than is waited for.

    What has held it up is given up by the data set.
    """
    patience, began = dataset.settings.patience, time.monotonic()
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            return
        except RuntimeError as error:
            # torch has looked after its workers, and found them alive.
            if not str(error).startswith("DataLoader timed out"):
                raise
            if patience and time.monotonic() - began > patience:
                # What was begun after the wait has been read for less.
                dataset.give_up(patience / 2)
                raise RuntimeError(f"DataLoader worker is silent for {patience} seconds") from None
            continue
        yield batch
        began = time.monotonic()


def _end_workers() -> None:
    """Kills the workers that are left where an error ends the program.

    They ignore SIGTERM (`train.data.build_loader`); torch would wait five seconds for each, and
    Python, where the error still holds the loader, for ever.
    """
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()
