"""Calls that the bench of operators measures, and whether their results are right."""

from __future__ import annotations

import contextlib
from typing import NamedTuple

import torch
from torch import Tensor

import videoswin_kernels
from bench.attention_providers import NAMED, poisoned
from bench.harness import error, gate
from videoswin_kernels import window_partition
from videoswin_kernels.selection import MOVEMENT
from videoswin_kernels.testing import Stage


class Problem(NamedTuple):
    """A call of an operator: its tensors by name, which have gradients, and the rest."""

    operator: str
    inputs: dict[str, Tensor]
    options: dict

    def leaves(self, dtype: torch.dtype | None = None) -> Problem:
        """The same values as leaves, in another dtype if one is named."""
        inputs = {
            name: x.detach().to(dtype or x.dtype, copy=True).requires_grad_()
            for name, x in self.inputs.items()
        }
        return self._replace(inputs=inputs)

    def outputs(self, kernels: str) -> tuple[Tensor, ...]:
        """What the operator returns."""
        function = getattr(videoswin_kernels, self.operator)
        out = function(*self.inputs.values(), **self.options, kernels=kernels)
        return out if isinstance(out, tuple) else (out,)

    def call(self, kernels: str, with_gradients: bool) -> tuple[Tensor, ...]:
        """The outputs and, if wanted, the gradients of all inputs."""
        with torch.set_grad_enabled(with_gradients):
            outputs = self.outputs(kernels)
        if not with_gradients:
            return outputs
        # An output stands for its gradient: it is as random, and it is there.
        ups = [out.detach() for out in outputs]
        return *outputs, *torch.autograd.grad(outputs, list(self.inputs.values()), ups)


def random_problem(
    operator: str, stage: Stage, batch: int, dtype: torch.dtype, device: torch.device
) -> Problem:
    """Normal values; the weights of a norm are float32 with any dtype, as under autocast."""
    generator = torch.Generator(device).manual_seed(0)
    case, channels = stage.case, stage.channels

    def normal(*shape: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(kind)

    x = normal(batch, *case.grid, channels)
    windows = {"window": case.window, "shift": case.shift}
    if operator == "cyclic_shift":
        return Problem(operator, {"x": x}, {"shift": tuple(-step for step in case.shift)})
    if operator == "window_partition":
        return Problem(operator, {"x": x}, windows)
    if operator == "window_reverse":
        cut = window_partition(x, **windows, kernels="reference")
        return Problem(operator, {"windows": cut}, {"grid": case.grid, **windows})
    inputs = {"x": x} if operator == "patch_merging" else {"x": x, "branch": normal(*x.shape)}
    width = channels * (4 if operator == "patch_merging" else 1)
    affine = {name: normal(width, kind=torch.float32) for name in ("weight", "bias")}
    return Problem(operator, {**inputs, **affine}, {})


def wrong(problem: Problem, provider: str, with_gradients: bool) -> dict:
    """The items of a row: the largest error, and what is wrong if something is."""
    count = len(problem.outputs("reference"))
    names = [f"output {number}" for number in range(1, count + 1)]
    names += [f"the gradient of {name}" for name in problem.inputs] * with_gradients

    def results(kernels: str, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        found = problem.leaves(dtype).call(kernels, with_gradients)
        return {name: x.detach() for name, x in zip(names, found, strict=True)}

    with poisoned() if provider in NAMED else contextlib.nullcontext():
        got = results(provider)
    naive = results("reference")
    if problem.operator in MOVEMENT:
        moved = [name for name in names if not torch.equal(got[name], naive[name])]
        return {"error": 0.0} if not moved else {"wrong": f"{moved[0]} is not moved bit for bit"}
    exact = results("reference", torch.float64)
    items = {"error": max(error(got[name], exact[name]) for name in names)}
    said = gate(got, exact, naive, problem.inputs["x"].dtype)
    return items if said is None else {**items, "wrong": said}
