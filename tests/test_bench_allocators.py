"""The benches' option --allocator: its default, its refusals, and a process for each state."""

import argparse
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from bench import allocators
from bench.harness import Rows

ROOT = Path(__file__).resolve().parents[1]
HEADER = {"card": "a card", "commit": "a commit"}
# Blocks too small to be mapped are of the heap; all but the last freed, they leave 150 MB of room.
ROOM = """
import ctypes
library = ctypes.CDLL(None)
library.malloc.restype, library.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
library.free.argtypes = [ctypes.c_void_p]
blocks = [library.malloc(100_000) for _ in range(1500)]
for block in blocks[:-1]:
    library.free(block)
"""
SET = """
import sys
from bench.machine import host_allocator
from train.allocator import set_allocator
set_allocator(sys.argv[1])
"""


def allocator_of(monkeypatch, found, device="cpu", word=None):
    """The option as it is settled where the allocator of this process is `found`."""
    monkeypatch.setattr(allocators, "host_allocator", lambda: found)
    parser = argparse.ArgumentParser()
    allocators.add_option(parser)
    options = parser.parse_args(["--allocator", word] if word else [])
    options.device, options.json, options.minutes = device, None, 3.0
    allocators.settle(parser, options)
    return options


def test_both_states_are_the_default_of_a_cpu_with_glibc(monkeypatch, capsys):
    assert allocator_of(monkeypatch, "default").allocator == "both"
    assert allocator_of(monkeypatch, "default", word="pooled").allocator == "pooled"
    assert allocator_of(monkeypatch, "not glibc's").allocator == "default"
    assert allocator_of(monkeypatch, "default", "cuda").allocator is None
    with pytest.raises(SystemExit):
        allocator_of(monkeypatch, "default", "cuda", "default")
    assert "--allocator is for a CPU" in capsys.readouterr().err


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the states are glibc's")
@pytest.mark.parametrize("room", ["", ROOM], ids=["small", "roomy"])
@pytest.mark.parametrize("word", allocators.STATES)
def test_the_state_is_found_whatever_room_the_heap_has(room, word):
    command = [sys.executable, "-c", SET + room + "print(host_allocator())", word]
    unset = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    done = subprocess.run(command, cwd=ROOT, env=unset, capture_output=True, text=True)
    assert done.stdout.split() == [word], done.stderr


@pytest.mark.parametrize(("found", "word"), [("pooled", "default"), ("not glibc's", "pooled")])
def test_a_state_that_cannot_be_set_is_refused(monkeypatch, found, word):
    monkeypatch.setattr(allocators, "set_allocator", lambda word: None)
    options = allocator_of(monkeypatch, found, word=word)
    with pytest.raises(SystemExit, match=f"--allocator {word}: it is {found} here"):
        allocators.conduct("bench.py", [], options, lambda rows: pytest.fail("measured"))


def test_another_allocator_is_taken_as_it_is(monkeypatch):
    options = allocator_of(monkeypatch, "not glibc's")
    monkeypatch.setattr(allocators, "header", lambda device: HEADER)
    rows, status = allocators.conduct("bench.py", [], options, lambda rows: 5)
    assert (rows.header, status) == (HEADER, 5)


def test_each_state_has_a_process_half_the_minutes_and_the_rows(monkeypatch, tmp_path):
    asked = []

    def run(command, stdout):
        asked.append(list(map(str, command)))
        state = asked[-1][-1]
        Rows(asked[-1][-5], {**HEADER, "allocator": state}).append({"stage": 1})
        return subprocess.CompletedProcess(command, -9 if state == "pooled" else 0)

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(allocators, "header", lambda device: {**HEADER, "allocator": "default"})
    options = allocator_of(monkeypatch, "default")
    rows, status = allocators.conduct("bench.py", ["--minutes", "3"], options, pytest.fail)
    assert status == 1
    for command, state in zip(asked, ("default", "pooled"), strict=True):
        assert command[:4] == [sys.executable, "bench.py", "--minutes", "3"]
        assert command[4::2] == ["--json", "--minutes", "--allocator"]
        assert command[7:] == ["1.5", "--allocator", state]
    assert rows.table(["allocator", "stage"]).splitlines()[1:] == ["default    1", "pooled     1"]
    assert [*allocators.with_state({"ms": "ms"}, options)] == ["allocator", "ms"]
    options.device = "cuda"
    assert [*allocators.with_state({"ms": "ms"}, options)] == ["ms"]
