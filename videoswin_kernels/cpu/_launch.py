"""What the launchers share: the library, or why it is not there."""

from __future__ import annotations

from typing import Any

from videoswin_kernels import extension
from videoswin_kernels.selection import CURE, UnavailableError


def library(operator: str) -> Any:
    """The launchers of the kernels for CPU tensors.

    Raises UnavailableError where there are none: exported programs, and calls of `torch.ops`, come
    here without asking `selection.py`.
    """
    reason = extension.why_not("_ops_cpu")
    if reason is not None:
        raise UnavailableError(f"{operator}: kernels='cpu' cannot run: {reason}; {CURE}")
    return extension.operators("_ops_cpu")
