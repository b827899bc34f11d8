"""Who can run window attention, and whether what they compute is right."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from bench.attention_compiled import compiled, flex
from bench.attention_peers import Problem, eager, sdpa
from bench.attention_torchvision import Torchvision
from bench.harness import error, gate
from videoswin_kernels import window_attention
from videoswin_kernels.selection import UnavailableError

# Kernel sets by name: each may refuse to run here.
NAMED = ("triton", "cuda", "cpu")
# Those that take minutes to compile.
COMPILED = ("compiled", "flex")
# Those that run on a CPU for tests alone, and what is said of an operator's.
NOT_TIMED = {
    "triton": (
        "{}: kernels='triton' is interpreted here, as TRITON_INTERPRET is set, "
        "and interpreted kernels are not timed"
    ),
    "cuda": "{}: kernels='cuda' is emulated here, and emulated kernels are not timed",
}
JUDGED = ("qkv", "bias_table", "pad_qkv")

Function = Callable[[], Tensor]


def ours(kernels: str) -> Callable[[Problem, bool], Function]:
    """The maker of `window_attention` under one word of `kernels=`."""

    def make(problem: Problem, trains_table: bool) -> Function:
        return lambda: window_attention(
            problem.qkv,
            problem.bias_table,
            window=problem.case.window,
            shift=problem.case.shift,
            num_heads=problem.heads,
            pad_qkv=problem.pad_qkv,
            kernels=kernels,
        )

    return make


# Each makes the function that is timed of a problem, and of whether its table is trained.
MAKERS: dict[str, Callable[[Problem, bool], Function]] = {
    "eager": lambda problem, trains_table: eager(problem),
    "compiled": lambda problem, trains_table: compiled(problem),
    "sdpa": lambda problem, trains_table: sdpa(problem, trains_table=trains_table),
    "flex": lambda problem, trains_table: flex(problem, trains_table=trains_table),
    "torchvision": lambda problem, trains_table: Torchvision(problem),
    "reference": ours("reference"),
    **{kernels: ours(kernels) for kernels in NAMED},
}


def refusal(provider: str, problem: Problem, needs_grad: bool) -> str | None:
    """Why a provider cannot be timed here, in its own words; None if it can."""
    if provider not in NAMED:
        return None
    width = problem.qkv.shape[-1] // problem.heads
    qkv = problem.qkv.new_ones((1, 1, 1, 1, width), requires_grad=needs_grad)
    try:
        out = window_attention(
            qkv, qkv.new_ones((1, 1)), window=(1, 1, 1), num_heads=1, kernels=provider
        )
        if needs_grad:
            out.sum().backward()
    except UnavailableError as refused:
        return str(refused)
    return not_timed("window_attention", provider, qkv.device)


def not_timed(operator: str, kernels: str, device: torch.device) -> str | None:
    """Why the times of kernels that can run here would mean nothing; None if they do."""
    if device.type != "cpu" or kernels not in NOT_TIMED:
        return None
    return NOT_TIMED[kernels].format(operator)


def differentiate(
    out: Tensor, leaves: Sequence[Tensor], upstream: Tensor, *, keep: bool = False
) -> tuple[Tensor, ...]:
    """Gradients of the leaves; zeros where one is not used, as the pads' without padding."""
    return torch.autograd.grad(
        out,
        leaves,
        upstream,
        retain_graph=keep,
        allow_unused=True,
        materialize_grads=True,
    )


class Judge:
    """The right results of a problem, and those of plain PyTorch in its dtype."""

    def __init__(self, problem: Problem) -> None:
        self.problem, self.dtype = problem, problem.qkv.dtype
        generator = torch.Generator(problem.qkv.device).manual_seed(1)
        shape = (*problem.qkv.shape[:-1], problem.qkv.shape[-1] // 3)
        upstream = torch.randn(shape, generator=generator, device=problem.qkv.device)
        self.upstream = upstream.to(self.dtype)
        self.exact = self._results("reference", torch.float64, with_gradients=True)
        self.naive = self._results("reference", self.dtype, with_gradients=True)
        self._checked: dict[tuple[str, bool], tuple[str | None, float]] = {}

    def _results(self, provider: str, dtype: torch.dtype, with_gradients: bool) -> dict:
        """The output and, if wanted, the gradients, under their names."""
        kind = None if dtype == self.dtype else dtype
        problem = self.problem.leaves(kind, trains=with_gradients)
        with torch.set_grad_enabled(with_gradients):
            out = MAKERS[provider](problem, with_gradients)()
        results = {"the output": out.detach()}
        if with_gradients:
            grads = differentiate(out, problem.tensors, self.upstream.to(dtype))
            names = (f"the gradient of {name}" for name in JUDGED)
            results.update(zip(names, grads, strict=True))
        return results

    def agrees(self, results: dict[str, Tensor]) -> str | None:
        """What is wrong with some results for the same clips, as `gate` says it."""
        exact = {name: self.exact[name] for name in results}
        return gate(results, exact, self.naive, self.dtype)

    def check(self, provider: str, with_gradients: bool) -> tuple[str | None, float]:
        """(what is wrong or None, the largest error of the results) of a provider."""
        key = provider, with_gradients
        if key not in self._checked:
            self._checked[key] = self._check(*key)
        return self._checked[key]

    def _check(self, provider: str, with_gradients: bool) -> tuple[str | None, float]:
        with poisoned() if provider in NAMED else contextlib.nullcontext():
            got = self._results(provider, self.dtype, with_gradients)
        exact = {name: self.exact[name] for name in got}
        off = max(error(got[name], exact[name]) for name in exact)
        return gate(got, exact, self.naive, self.dtype), off


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Fresh memory is NaN in it, so that what a kernel does not write shows."""
    was = torch.are_deterministic_algorithms_enabled()
    only_warns = torch.is_deterministic_algorithms_warn_only_enabled()
    with warnings.catch_warnings():
        # Of operations that have no deterministic form, which are not what is asked for here.
        warnings.simplefilter("ignore")
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(was, warn_only=only_warns)
