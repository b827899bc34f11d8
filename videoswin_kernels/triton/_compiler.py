"""All that depends on Triton's version, on how it runs, or on the card it runs on."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import triton
from torch import Tensor

VERSION = tuple(int(part) for part in triton.__version__.split(".")[:2])
# Whether kernels are interpreted is settled when they are defined, once for a process.
IS_INTERPRETED = bool(triton.knobs.runtime.interpret)


def why_not_started() -> str | None:
    """What keeps Triton from this machine's GPU, in words that end a sentence, or None."""
    try:
        # The first use builds Triton's own driver, with the C compiler of the machine.
        triton.runtime.driver.active.get_current_target()
    except Exception as error:  # Whatever it is, that is the reason.
        return f"Triton cannot start: {str(error).splitlines()[0] if str(error) else error!r}"
    return None


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Runs a kernel on the GPU of its tensors; the multiply-adds of its float32 may be fused."""
    device = next(each.device for each in arguments if isinstance(each, Tensor))
    guard = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with guard:
        # Said here: Triton is about to change its default, and warns where nothing is said.
        kernel[grid](*arguments, **options, enable_fp_fusion=True)


def architecture(x: Tensor) -> int:
    """Compute capability of the GPU of `x`, 90 for 9.0, which is what interpreted kernels get."""
    if not x.is_cuda:
        return 90
    major, minor = torch.cuda.get_device_capability(x.device)
    return 10 * major + minor


def dot_precision() -> str:
    """How float32 products are taken: exactly, unless torch's own switch allows TF32."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
