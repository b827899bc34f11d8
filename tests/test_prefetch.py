"""Batches ahead of the step that computes, and in spite of workers that die."""

import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from train_suite import prompt as prompt

pytest.importorskip("decord")

from train import prefetch
from train.data import Batch, Sample, build_loader
from train.prefetch import WorkerError, ahead, steady

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("prompt")


def test_items_come_in_their_order_and_each_is_made_before_it_is_asked_for():
    made = []

    def items():
        for number in range(5):
            made.append(number)
            yield number

    found = ahead(items())
    assert next(found) == 0
    deadline = time.monotonic() + 10
    while len(made) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert made[:2] == [0, 1]
    assert list(found) == [1, 2, 3, 4]


def test_what_is_raised_comes_where_the_item_would_be():
    def items():
        yield 1
        raise KeyError("gone")

    found = ahead(items())
    assert next(found) == 1
    with pytest.raises(KeyError, match="gone"):
        next(found)


def test_the_thread_ends_with_the_generator():
    before = threading.active_count()
    found = ahead(iter(int, 1))
    next(found)
    assert threading.active_count() == before + 1
    found.close()
    assert threading.active_count() == before


class Videos(torch.utils.data.Dataset):
    """One number a clip; the worker that shall make a fatal one kills itself instead, so often."""

    class settings:
        workers = 2
        patience = 0

    def __init__(self, fatal, deaths, folder):
        self.fatal, self.deaths, self.folder = fatal, deaths, folder

    def __getitem__(self, key):
        died = len(list(self.folder.iterdir()))
        if key == self.fatal and died < self.deaths:
            (self.folder / f"{died}").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return Sample(torch.full((1,), key), key, f"{key}.mp4")


def read(videos, handed):
    def build():
        left = [[key] for key in range(len(handed), 6)]
        return build_loader(videos, left, CPU)

    for batch in steady(build, CPU):
        assert isinstance(batch, Batch)
        handed.append(batch.labels.item())


@pytest.mark.parametrize("deaths", [1, prefetch.MOST_DEATHS - 1])
def test_after_the_death_of_a_worker_reading_goes_on_where_it_was(tmp_path, capsys, deaths):
    handed = []
    read(Videos(3, deaths, tmp_path), handed)
    assert handed == list(range(6))
    said = capsys.readouterr().err
    assert said.count("; reading begins again where it was\n") == deaths
    assert said.startswith("DataLoader worker (pid")


def test_workers_that_die_again_and_again_end_the_run(tmp_path):
    handed = []
    with pytest.raises(WorkerError, match=r"data workers died 3 times in a row .*data\.workers=0"):
        read(Videos(3, 99, tmp_path), handed)
    # What the dead worker had made, and not yet handed over, died with it.
    assert handed == list(range(len(handed)))
    assert len(handed) <= 3


def test_a_dead_worker_is_met_where_its_batch_is_asked_for_and_nowhere_else(tmp_path):
    """torch's handler of dead children would raise in the middle of whatever runs here."""
    videos = Videos(99, 0, tmp_path)
    found = steady(lambda: build_loader(videos, [[key] for key in range(6)], CPU), CPU)
    assert next(found).labels.item() == 0
    for worker in multiprocessing.active_children():
        os.kill(worker.pid, signal.SIGKILL)
        # Dead, and not yet waited for: torch's handler would ask how it died.
        stat = Path("/proc", str(worker.pid), "stat")
        while stat.read_text().rpartition(")")[2].split()[0] != "Z":
            time.sleep(0.01)
    assert sum(range(10**6))
    found.close()


class Missing(Videos):
    def __getitem__(self, key):
        raise FileNotFoundError(f"no shard {key}")


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_of_the_data_set_is_not_taken_for_a_death(tmp_path, monkeypatch, capsys, workers):
    monkeypatch.setattr(Videos.settings, "workers", workers)
    with pytest.raises(FileNotFoundError, match="no shard 0"):
        read(Missing(0, 0, tmp_path), [])
    assert not capsys.readouterr().err


def test_another_error_is_not_taken_for_a_death():
    def build():
        raise RuntimeError("no such thing")

    with pytest.raises(RuntimeError, match="no such thing"):
        next(steady(build, CPU))
