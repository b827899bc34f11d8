"""All that depends on Triton's version, on how it runs, or on the card it runs on."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import triton
from torch import Tensor

from videoswin_kernels.selection import NOT_INTERPRETED, WRONG_IF_INTERPRETED, UnavailableError

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


def check_tensors(kernel: str, tensors: list[Tensor]) -> None:
    """Raises UnavailableError where a kernel cannot run on these, or would run wrongly.

    Exported programs, and calls of `torch.ops`, come here without asking `selection.py`.
    """
    if not IS_INTERPRETED and not tensors[0].is_cuda:
        raise UnavailableError(f"{kernel}: {NOT_INTERPRETED}; move the tensors to a GPU")
    if IS_INTERPRETED and any(each.dtype == torch.bfloat16 for each in tensors):
        raise UnavailableError(f"{kernel}: {WRONG_IF_INTERPRETED}; use float32 or float16")


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Runs a kernel on the GPU of its tensors; the multiply-adds of its float32 may be fused."""
    tensors = [each for each in arguments if isinstance(each, Tensor)]
    check_tensors(kernel.__name__, tensors)
    device = tensors[0].device
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
    # Its older getters raise once the newer switch was used; this one knows of both.
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def blocks(count: int, size: int) -> int:
    """How many blocks of a size cover a count; Triton's own function is slow on the host."""
    return -(-count // size)


def power_of_2(count: int) -> int:
    """The least power of 2 that is not below a count."""
    return 1 << (count - 1).bit_length()
