"""Registers the operators of the compiled kernel sets with torch, each from one declaration.

A set has a namespace of its own (`torch.ops.videoswin_triton`), so that an exported program says
what it runs, and two sets can be compared in one process. Schema, outputs, vectors, gradient and
FLOP formula are those of the declaration, the same for every set; what a set adds is a launcher.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from importlib import import_module
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

# On torch 2.15 this imports triton, for every user. A formula registered later would be missed:
# FlopCounterMode copies the registry when it is made.
from torch.utils.flop_counter import register_flop_formula

from videoswin_kernels.ops._vectors import warm

# The kernel sets that are there, with the dispatch keys they serve.
KERNEL_SETS = {"triton": ("CUDA", "CPU"), "cuda": ("CUDA", "CPU"), "cpu": ("CPU",)}
NAMESPACES = {kernels: getattr(torch.ops, f"videoswin_{kernels}") for kernels in KERNEL_SETS}
# Held for the life of the process: an operator goes with its library.
_LIBRARIES = {
    kernels: torch.library.Library(f"videoswin_{kernels}", "DEF") for kernels in KERNEL_SETS
}


class Operator(NamedTuple):
    """One registered operator, for all kernel sets. Each function takes its arguments as they are.

    Attributes:
        schema: name and signature. Window, shift and grid are `SymInt[]`, so that a size taken from
            a shape makes no new graph; there is no `str`, which the stable ABI leaks.
        file: module of a kernel set that has `launch_<name>(*outputs, *inputs[, vectors])`; the
            inputs are the arguments without the integer lists, tensors contiguous and aligned to
            16 bytes, none empty.
        outputs: memory for the results, fake or real; a tensor, or a tuple of them.
        vectors: `(lookup, *axes)`, what to look up in `_vectors`; None where no vector is needed.
        save: `setup_context` of the gradient.
        gradient: `gradient(operators, ctx, *grads)`, where `operators` is the set's namespace.
            None: the operator is itself a gradient and refuses to be differentiated.
        flops: floating-point operations of the matrix products, of shapes in place of tensors.
        kernel_sets: those that have the operator.
    """

    schema: str
    file: str
    outputs: Callable[..., Any]
    vectors: Callable[..., tuple] | None = None
    save: Callable[..., None] | None = None
    gradient: Callable[..., tuple] | None = None
    flops: Callable[..., int] | None = None
    kernel_sets: tuple[str, ...] = tuple(KERNEL_SETS)

    @property
    def name(self) -> str:
        return self.schema.partition("(")[0]


def declare(operator: Operator) -> None:
    """Registers an operator in the namespace of each of its kernel sets; called once, at import."""
    for kernels in operator.kernel_sets:
        library, namespace = _LIBRARIES[kernels], NAMESPACES[kernels]
        qualified = f"{library.ns}::{operator.name}"
        library.define(operator.schema, tags=(torch.Tag.pt2_compliant_tag,))
        for key in KERNEL_SETS[kernels]:
            library.impl(operator.name, partial(_run, kernels, operator), key)
        torch.library.register_fake(qualified, partial(_fake, operator), lib=library)
        if operator.gradient is None:
            gradient = partial(_refuse_second, operator.name)
        else:
            gradient = partial(operator.gradient, namespace)
        save = operator.save
        torch.library.register_autograd(qualified, gradient, setup_context=save, lib=library)
        if operator.flops is not None:
            packet = getattr(namespace, operator.name)
            register_flop_formula(packet)(partial(_count, operator.flops))


@cache
def kernel_module(kernels: str, file: str) -> ModuleType:
    """The module of a kernel set, imported the first time it runs."""
    return import_module(f"videoswin_kernels.{kernels}.{file}")


def _run(kernels: str, operator: Operator, *arguments: Any) -> Any:
    """What the dispatcher calls: looks vectors up, makes the outputs, launches."""
    launch = getattr(kernel_module(kernels, operator.file), f"launch_{operator.name}")
    tensors = [each for each in arguments if isinstance(each, Tensor)]
    found = ()
    if operator.vectors is not None:
        lookup, *axes = operator.vectors(*arguments)
        found = (lookup(operator.name, *axes, tensors[0].device),)
    outputs = operator.outputs(*arguments)
    results = outputs if isinstance(outputs, tuple) else (outputs,)
    if any(each.numel() == 0 for each in tensors):
        # An empty batch: nothing to compute, and gradients of weights that are sums of nothing.
        for result in results:
            result.zero_()
    else:
        inputs = (
            _aligned(each) if isinstance(each, Tensor) else each
            for each in arguments
            if not isinstance(each, (list, tuple))
        )
        launch(*results, *inputs, *found)
    return outputs


def _fake(operator: Operator, *arguments: Any) -> Any:
    if operator.vectors is not None:
        lookup, *axes = operator.vectors(*arguments)
        device = next(each.device for each in arguments if isinstance(each, Tensor))
        warm(lookup, operator.name, *axes, device=device)
    return operator.outputs(*arguments)


def _aligned(x: Tensor) -> Tensor:
    """`x` itself if it is contiguous and begins at 16 bytes, else a copy that is."""
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


def _refuse_second(name: str, ctx: Any, *grads: Any) -> None:
    operator = name.removesuffix("_backward")
    raise RuntimeError(f"{operator}: there is no double backward; use kernels='reference'")


def _count(flops: Callable[..., int], *shapes: Any, out_shape: Any = None, **named: Any) -> int:
    return flops(*shapes, **named)
