"""What the tests of benches share: a known machine, and the rows that were written."""

import json

from bench import allocators, floors

HEADER = {"card": "a card", "commit": "a commit", "allocator": "default", "clocks": {"sm": 1980}}
# Pooling would outlive the test in this process.
MACHINE = ("--device", "cpu", "--allocator", "default")


def know_the_machine(monkeypatch):
    """Takes ceilings and machine as known: to measure takes a second, and sources may change."""
    monkeypatch.setattr(floors, "measure_ceilings", lambda *_, **__: floors.H200)
    monkeypatch.setattr(allocators, "header", lambda device: HEADER)


def rows_of(path, bench=None):
    """The rows of a file, or those of one bench among them."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [row for row in rows if bench in (None, row.get("bench"))]
