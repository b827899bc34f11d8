"""The dtypes that a model can be made to compute in, by name."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

PRECISIONS = ("float32", "bfloat16", "float16")


def casting(device: torch.device, precision: str) -> AbstractContextManager:
    """Autocast to one of `PRECISIONS`; for float32 nothing."""
    if precision == "float32":
        return nullcontext()
    return torch.autocast(device.type, getattr(torch, precision))
