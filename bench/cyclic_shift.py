"""The roll of a token grid, forward and backward: kernel sets and plain PyTorch.

`python bench/cyclic_shift.py [--device cpu|cuda] [--json FILE] ...`, as bench/operators.py says.
"""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from bench import operators

OPERATORS = ("cyclic_shift",)

if __name__ == "__main__":
    sys.exit(operators.main(script=__file__, operators=OPERATORS))
