"""Which kernel set runs an operator: one word, resolved by a pure function, never silently.

    "auto"       the first entry of `TABLE` that can run on the device; `reference` is its last
    "fused"      the same without `reference`; refuses, with all reasons, where nothing else can
    "reference"  plain PyTorch: any device, any floating-point dtype, differentiable by autograd
    "triton", "cuda", "cpu"  exactly this kernel set, or a refusal

Nothing here logs, warns, imports kernels or reads the environment; `explain` says what would run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

OPERATORS = (
    "cyclic_shift",
    "window_partition",
    "window_reverse",
    "window_attention",
    "patch_merging",
    "residual_norm",
)
WORDS = ("auto", "fused", "reference", "triton", "cuda", "cpu")


class UnavailableError(RuntimeError):
    """The kernels asked for cannot run here: one sentence with the reason and the cure."""


class Entry(NamedTuple):
    """A place in the order of preference, and the bench row that earned it (None: unmeasured)."""

    kernels: str
    row: str | None = None


class Choice(NamedTuple):
    """What would run `operator`: the kernel set, why it, and the bench row behind the choice."""

    operator: str
    kernels: str
    reason: str
    row: str | None


# Order of preference, the same for every operator and device so far.
TABLE = (Entry("reference"),)

# Why a kernel set runs nowhere, in words that end a sentence.
ABSENT = {
    "triton": "this version has no Triton kernels",
    "cuda": "this version has no CUDA C++ kernels",
    "cpu": "this version has no C++ kernels for the CPU",
}
CURE = "use kernels='reference' or kernels='auto'"


def check_word(where: str, kernels: object) -> str:
    """`kernels` if it is one of `WORDS`; raises ValueError naming them otherwise."""
    if kernels not in WORDS:
        raise ValueError(f"{where}: kernels must be one of {', '.join(WORDS)}, got {kernels!r}")
    return kernels


def choose(operator: str, kernels: str, device_type: str) -> Choice:
    """The kernel set that runs `operator` on tensors of a device type.

    Raises:
        ValueError: an unknown word.
        UnavailableError: no kernel set that the word allows can run, with the reason of each.
    """
    check_word(operator, kernels)
    if kernels == "reference":
        return Choice(operator, kernels, "asked for by name", None)
    if kernels in ABSENT:
        reason = ABSENT[kernels]
        raise UnavailableError(f"{operator}: kernels={kernels!r} cannot run: {reason}; {CURE}")
    if kernels == "fused":
        reasons = "; ".join(f"{name}: {reason}" for name, reason in ABSENT.items())
        raise UnavailableError(f"{operator}: kernels='fused' cannot run: {reasons}; {CURE}")
    entry = TABLE[0]
    return Choice(operator, entry.kernels, f"first that runs on {device_type}", entry.row)


def resolve(operator: str, kernels: str, x: Tensor) -> str:
    """The name of the kernel set that runs `operator` on `x`; raises as `choose` does."""
    return choose(operator, kernels, x.device.type).kernels


def explain(
    module_or_operator: nn.Module | Callable | str, example: Tensor | None = None
) -> Choice | list[Choice]:
    """What would run, and why.

    Args:
        module_or_operator: an operator of this package (or its name), taken with kernels="auto"; or
            a module, whose submodules carry `operator` and `kernels` attributes.
        example: a tensor on the device in question; default: the module's first parameter, or CPU.

    Returns:
        A `Choice` for an operator; for a module a list of them, one for each (operator, word).

    Raises:
        ValueError: an unknown operator, or a module without one.
        UnavailableError: what the module asks for cannot run, with the reason.
    """
    if isinstance(module_or_operator, nn.Module):
        if example is None:
            example = next(module_or_operator.parameters(), None)
        device_type = "cpu" if example is None else example.device.type
        users = [m for m in module_or_operator.modules() if hasattr(m, "operator")]
        if not users:
            name = type(module_or_operator).__name__
            raise ValueError(f"explain: {name} holds no module that uses an operator")
        pairs = dict.fromkeys((m.operator, m.kernels) for m in users)
        return [choose(operator, kernels, device_type) for operator, kernels in pairs]
    operator = getattr(module_or_operator, "__name__", module_or_operator)
    if operator not in OPERATORS:
        names = ", ".join(OPERATORS)
        raise ValueError(f"explain: operator must be one of {names}, got {module_or_operator!r}")
    return choose(operator, "auto", "cpu" if example is None else example.device.type)


def device_types() -> list[str]:
    """Device types of this machine, CPU first."""
    return ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
