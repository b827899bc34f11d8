"""What every contract checks alike: grids, vectors, autocast, transforms, TorchScript."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import inf
from numbers import Real
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.autograd import forward_ad

from videoswin_kernels.geometry import Triple
from videoswin_kernels.selection import refuse_script

Function = TypeVar("Function", bound=Callable[..., Any])

# Asked once: torch 2.10 cannot trace the question. A meta tensor, for one, is on none of these.
AUTOCAST_DEVICES = frozenset(
    device for device in ("cpu", "cuda", "xpu", "mps") if torch.amp.is_autocast_available(device)
)


def no_script(operator: Function) -> Function:
    """`operator` itself, which `torch.jit.script` then refuses in one sentence of ours."""
    operator.__prepare_scriptable__ = partial(refuse_script, operator)
    return operator


def check_tensor(where: str, name: str, value: object) -> None:
    """Raises TypeError unless `value` is a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{where}: {name} must be a torch.Tensor, got {type(value).__name__}")


def check_grid(where: str, name: str, x: object, channels: str = "C") -> Triple:
    """The token grid (D, H, W) of `x` `[B, D, H, W, channels]`; no extent but B may be 0."""
    check_tensor(where, name, x)
    if x.dim() != 5 or 0 in x.shape[1:]:
        raise ValueError(
            f"{where}: {name} must be [B, D, H, W, {channels}] with only B allowed to be 0, "
            f"got {list(x.shape)}"
        )
    return tuple(x.shape[1:4])


def check_floating(where: str, name: str, x: Tensor) -> None:
    """Raises TypeError unless `x` is float64, float32, float16 or bfloat16."""
    if x.dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        raise TypeError(
            f"{where}: {name} must be float64, float32, float16 or bfloat16, got {x.dtype}"
        )


def check_vector(where: str, name: str, value: object, length: int, like: Tensor) -> None:
    """Raises unless `value` is a floating-point vector of that length on the device of `like`."""
    check_tensor(where, name, value)
    if value.shape != (length,):
        raise ValueError(f"{where}: {name} must be [{length}], got {list(value.shape)}")
    check_floating(where, name, value)
    check_device(where, name, value, like)


def check_device(where: str, name: str, value: Tensor, like: Tensor) -> None:
    """Raises ValueError unless both tensors are on one device."""
    if value.device != like.device:
        raise ValueError(f"{where}: {name} must be on {like.device}, got {value.device}")


def check_number(where: str, name: str, value: object, low: float, high: float = inf) -> None:
    """Raises unless `value` is a number from `low` to `high`."""
    bounds = f">= {low}" if high == inf else f"from {low} to {high}"
    if low == -inf:
        bounds = "of any sign"
    expected = f"{where}: {name} must be a number {bounds}, got {value!r}"
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(expected)
    if not low <= value <= high:
        raise ValueError(expected)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype autocast would give `x` before a matrix product, None where it leaves it alone.

    Autocast never touches float64; everywhere else this is the dtype of the active region.
    """
    device = x.device.type
    if x.dtype == torch.float64 or device not in AUTOCAST_DEVICES:
        return None
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def is_transformed(*tensors: Tensor | None) -> bool:
    """Whether one of the tensors has a tangent or stands in a transform of `torch.func`.

    Registered operators drop tangents without a word (`torch.library.register_autograd`), and are
    run clip by clip under `torch.vmap`. Where it is traced it is the constant False, also within a
    transform that is traced itself.
    """
    if torch.compiler.is_compiling():
        return False
    # A level is open inside of `forward_ad.dual_level` alone.
    has_level = forward_ad._current_level >= 0
    for each in tensors:
        if each is None:
            continue
        if is_functorch_wrapped_tensor(each):
            return True
        if has_level and forward_ad.unpack_dual(each).tangent is not None:
            return True
    return False


def without_autocast(x: Tensor) -> torch.autocast:
    """A context in which the arithmetic on the device of `x` is what the code says."""
    device = x.device.type if x.device.type in AUTOCAST_DEVICES else "cpu"
    return torch.autocast(device, enabled=False)
