"""Cutting a shifted grid into windows, and the way back, forward and backward.

`python bench/window_partition.py [--device cpu|cuda] ...`, as bench/operators.py says.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from bench import operators

OPERATORS = ("window_partition", "window_reverse")

if __name__ == "__main__":
    sys.exit(operators.main(script=__file__, operators=OPERATORS))
