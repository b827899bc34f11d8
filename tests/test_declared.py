"""What is declared around the operators: FLOPs, names, which gradients run, autocast, limits."""

import json
import math
import subprocess
import sys
from pathlib import Path

import operator_suite as suite
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from videoswin_kernels import (
    cyclic_shift,
    patch_merging,
    residual_norm,
    window_attention,
    window_partition,
    window_reverse,
)
from videoswin_kernels.testing import ATTENTION, LARGE

ROOT = Path(__file__).parents[1]
EVERY = suite.every("residual_norm", compiled=True)
ATTENDS = suite.every("window_attention", compiled=True)
WINDOW = {"window": (2, 3, 3), "shift": (1, 1, 1)}


class Calls(TorchDispatchMode):
    """The calls of registered operators, in order: (name, arguments by name)."""

    def __init__(self, kernels):
        super().__init__()
        self.namespace, self.calls = f"videoswin_{kernels}", []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == self.namespace:
            names = [argument.name for argument in function._schema.arguments]
            self.calls.append((function._opname, dict(zip(names, args, strict=False))))
        return function(*args, **(kwargs or {}))

    @property
    def names(self):
        return [name for name, _ in self.calls]

    def only(self, name):
        """The arguments of the one call of an operator."""
        found = [arguments for other, arguments in self.calls if other == name]
        assert len(found) == 1, self.names
        return found[0]


def tensors(run, operator, dtype=torch.float32, low=None, grad=()):
    """The tensors of a small call, by name; those in `grad` are leaves that require one."""
    shapes = {"x": (2, 2, 3, 4, 6)}
    if operator == "window_attention":
        shapes = {"qkv": (2, 3, 4, 5, 96), "bias_table": (75, 2), "pad_qkv": (96,)}
    elif operator == "patch_merging":
        shapes |= {"weight": (24,), "bias": (24,)}
    elif operator == "residual_norm":
        shapes |= {"branch": shapes["x"], "weight": (6,), "bias": (6,)}
    return {
        name: run.leaf(suite.random(*shape, dtype=dtype, grad=name in grad))
        for name, shape in shapes.items()
    }


def call(run, operator, named):
    """The operator's results on the device."""
    if operator == "window_attention":
        options = {**WINDOW, "num_heads": 2, "kernels": run.kernels}
        return window_attention(**named, **options)
    function = {"patch_merging": patch_merging, "residual_norm": residual_norm}[operator]
    return function(**named, kernels=run.kernels)


def as_tuple(results):
    return results if isinstance(results, tuple) else (results,)


COUNT = """
import json, sys, torch
from torch.utils.flop_counter import FlopCounterMode
from videoswin_kernels import window_attention
kernels, device, cases = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
counts = []
for grid, window, shift, rows in cases:
    row = []
    for word in (kernels, "reference"):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            window_attention(
                torch.randn(2, *grid, 96, device=device), torch.randn(rows, 2, device=device),
                window=window, shift=shift, num_heads=2, kernels=word)
        row.append(counter.get_total_flops())
    counts.append(row)
print(json.dumps(counts))
"""


@ATTENDS
def test_flops_of_attention_in_a_cold_process_are_those_of_the_two_products(run):
    cases = [ATTENTION[name] for name in ("padded", "exact", "H and W clamped", "all clamped")]
    rows = [math.prod(2 * size - 1 for size in case.window) for case in cases]
    text = json.dumps([[*case, row] for case, row in zip(cases, rows, strict=True)])
    command = [sys.executable, "-c", COUNT, run.kernels, run.device, text]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    # Two products of N x N x E for each head of each window, padding included.
    formula = [4 * 2 * case.windows * 2 * case.tokens**2 * 16 for case in cases]
    assert json.loads(done.stdout) == [[count, count] for count in formula]


@ATTENDS
@pytest.mark.parametrize("name", ["padded", "8x7x7, padded", "all clamped"])
def test_flops_of_attention_and_its_backward_without_running_them(name, run):
    case = {**ATTENTION, **LARGE}[name]
    rows = math.prod(2 * size - 1 for size in case.window)
    kind = {"device": "meta", "dtype": torch.float16}
    qkv, out = torch.empty(3, *case.grid, 192, **kind), torch.empty(3, *case.grid, 64, **kind)
    table, pad = torch.empty(rows, 4, device="meta"), torch.empty(192, **kind)
    with FlopCounterMode(display=False) as counter:
        out, log_sum_exp = run.operator("window_attention")(qkv, table, pad, *case[1:], 4, 0.25)
    products = 3 * case.windows * 4 * case.tokens**2 * 16
    assert counter.get_total_flops() == 4 * products
    with FlopCounterMode(display=False) as counter:
        run.operator("window_attention_backward")(
            out, qkv, table, pad, out, log_sum_exp, *case[1:], 4, 0.25, True, True, True
        )
    # Scores again, and the gradients of probabilities, queries, keys and values.
    assert counter.get_total_flops() == 10 * products


@EVERY
def test_the_profiler_shows_the_operators_by_name(run):
    norm = tensors(run, "residual_norm", grad=("x",))
    merging = tensors(run, "patch_merging", grad=("x",))
    attention = tensors(run, "window_attention", grad=("qkv",))
    has_attention = run in suite.runs("window_attention")
    with torch.profiler.profile() as profile:
        x = cyclic_shift(norm["x"], (1, 1, 1), kernels=run.kernels)
        windows = window_partition(x, **WINDOW, kernels=run.kernels)
        window_reverse(windows, grid=(2, 3, 4), **WINDOW, kernels=run.kernels)
        if has_attention:
            call(run, "window_attention", attention).sum().backward()
        call(run, "residual_norm", norm)[1].sum().backward()
        call(run, "patch_merging", merging).sum().backward()
    shown = {event.key for event in profile.key_averages()}
    arithmetic = ("residual_norm", "patch_merging", *["window_attention"] * has_attention)
    names = {*suite.MOVEMENT, *arithmetic, *(f"{name}_backward" for name in arithmetic)}
    missing = {f"videoswin_{run.kernels}::{name}" for name in names} - shown
    assert not missing, sorted(key for key in shown if "videoswin" in key)


NEEDS = [
    ("patch_merging", ("x",), {"needs_x"}),
    ("patch_merging", ("weight",), {"needs_affine"}),
    ("patch_merging", ("bias",), {"needs_affine"}),
    ("patch_merging", ("x", "weight", "bias"), {"needs_x", "needs_affine"}),
    ("residual_norm", ("x",), {"needs_x"}),
    ("residual_norm", ("branch",), {"needs_branch"}),
    ("residual_norm", ("bias",), {"needs_affine"}),
    ("residual_norm", ("x", "weight"), {"needs_x", "needs_affine"}),
    ("window_attention", ("qkv",), {"needs_qkv"}),
    ("window_attention", ("bias_table",), {"needs_table"}),
    ("window_attention", ("pad_qkv",), {"needs_pad"}),
    ("window_attention", ("qkv", "bias_table"), {"needs_qkv", "needs_table"}),
]


@EVERY
@pytest.mark.parametrize(("operator", "grad", "needs"), NEEDS)
def test_gradients_that_nobody_asks_for_are_not_computed(operator, grad, needs, run):
    suite.skip_absent(operator, run)
    named = tensors(run, operator, grad=grad)
    if operator == "residual_norm":
        # Without a scale the gradients of x and branch may be one.
        named["branch_scale"] = run.put(torch.tensor([2.0, 0.0]))
    results = as_tuple(call(run, operator, named))
    with Calls(run.kernels) as calls:
        torch.autograd.backward(results, [torch.ones_like(value) for value in results])
    arguments = calls.only(f"{operator}_backward")
    flags = {name: value for name, value in arguments.items() if name.startswith("needs_")}
    assert {name for name, value in flags.items() if value} == needs, flags
    for name, value in named.items():
        assert (value.grad is not None) == (name in grad), name
        if name in grad:
            assert value.grad.shape == value.shape


@EVERY
@pytest.mark.parametrize("operator", ["window_attention", "patch_merging", "residual_norm"])
def test_no_backward_runs_when_nothing_needs_a_gradient(operator, run):
    suite.skip_absent(operator, run)
    named = tensors(run, operator)
    with Calls(run.kernels) as calls:
        results = as_tuple(call(run, operator, named))
    assert calls.names == [operator]
    assert not any(value.requires_grad for value in results)
    named = tensors(run, operator, grad=tuple(named))
    with Calls(run.kernels) as calls, torch.no_grad():
        results = as_tuple(call(run, operator, named))
    assert calls.names == [operator]
    assert not any(value.requires_grad for value in results)


@EVERY
@pytest.mark.parametrize("which", [0, 1])
def test_a_result_that_is_not_used_brings_no_gradient_of_zeros(which, run):
    results = call(run, "residual_norm", tensors(run, "residual_norm", grad=("x",)))
    with Calls(run.kernels) as calls:
        results[which].sum().backward()
    arguments = calls.only("residual_norm_backward")
    ups = [arguments["grad_total"], arguments["grad_norm"]]
    assert [up is not None for up in ups] == [which == 0, which == 1]


@EVERY
@pytest.mark.parametrize("operator", ["patch_merging", "residual_norm", "window_attention"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_gives_the_same_gradients(reentrant, operator, run):
    suite.skip_absent(operator, run)
    named = tensors(run, operator)
    names = list(named)
    grads = []
    for is_kept in (True, False):
        leaves = [value.clone().requires_grad_() for value in named.values()]

        def function(*values):
            return as_tuple(call(run, operator, dict(zip(names, values, strict=True))))

        if is_kept:
            results = function(*leaves)
        else:
            results = checkpoint(function, *leaves, use_reentrant=reentrant)
        torch.autograd.backward(sum((value * value.cos()).sum() for value in results))
        grads.append([leaf.grad for leaf in leaves])
    assert all(map(torch.equal, *grads))


@suite.every("window_attention", suite.LOW, compiled=True)
def test_autocast_brings_attention_low_queries_and_a_float32_table(run, dtype):
    named = tensors(run, "window_attention")
    with Calls(run.kernels) as calls, torch.autocast(run.device, dtype):
        assert call(run, "window_attention", named).dtype == dtype
    arguments = calls.only("window_attention")
    assert arguments["qkv"].dtype == arguments["pad_qkv"].dtype == dtype
    assert arguments["bias_table"].dtype == torch.float32


@suite.every("patch_merging", suite.LOW, compiled=True)
@pytest.mark.parametrize("is_low", [False, True])
def test_autocast_brings_the_norms_their_stream_as_it_is(is_low, run, dtype):
    stream = dtype if is_low else torch.float32
    for operator in ("patch_merging", "residual_norm"):
        named = tensors(run, operator, dtype=stream)
        with Calls(run.kernels) as calls, torch.autocast(run.device, dtype):
            results = as_tuple(call(run, operator, named))
        arguments = calls.only(operator)
        assert (arguments["x"].dtype, arguments["dtype"]) == (stream, dtype)
        assert results[-1].dtype == dtype
        if operator == "residual_norm":
            assert results[0].dtype == stream


@suite.every("cyclic_shift", suite.LOW, compiled=True)
def test_autocast_leaves_what_is_moved_alone(run, dtype):
    x = run.put(torch.randn(1, 2, 3, 4, 6))
    with Calls(run.kernels) as calls, torch.autocast(run.device, dtype):
        shifted = cyclic_shift(x, (1, 1, 1), kernels=run.kernels)
        windows = window_partition(x, **WINDOW, kernels=run.kernels)
        back = window_reverse(windows, grid=(2, 3, 4), **WINDOW, kernels=run.kernels)
    assert calls.names == ["cyclic_shift", "window_partition", "window_reverse"]
    assert {value.dtype for value in (shifted, windows, back)} == {torch.float32}


@EVERY
@pytest.mark.parametrize("operator", ["patch_merging", "residual_norm", "window_attention"])
def test_a_double_backward_is_refused_in_one_sentence(operator, run):
    suite.skip_absent(operator, run)
    named = tensors(run, operator)
    named = {name: value.requires_grad_() for name, value in named.items()}
    total = sum(value.square().sum() for value in as_tuple(call(run, operator, named)))
    sentence = rf"^{operator}(_backward)?: [^\n]*\bno double backward\b[^\n]*$"

    def twice():
        grads = torch.autograd.grad(total, named.values(), create_graph=True)
        sum(grad.square().sum() for grad in grads).backward()

    with pytest.raises(RuntimeError, match=sentence):
        twice()


@EVERY
@pytest.mark.parametrize("operator", ["patch_merging", "residual_norm", "window_attention"])
def test_gradients_are_the_same_bits_on_every_run(operator, run):
    suite.skip_absent(operator, run)
    torch.use_deterministic_algorithms(False)
    named = tensors(run, operator)
    if operator != "window_attention":
        # Enough rows that their sum into weight and bias is cut into parts.
        named["x"] = run.put(suite.random(4, 4, 15, 17, 6).float())
        named |= {"branch": named["x"].cos()} if operator == "residual_norm" else {}
    named = {name: value.requires_grad_() for name, value in named.items()}

    def grads():
        results = as_tuple(call(run, operator, named))
        return torch.autograd.grad(sum(value.sin().sum() for value in results), named.values())

    first = grads()
    for _ in range(2 if run.is_interpreted else 10):
        assert all(map(torch.equal, first, grads()))


@suite.every("residual_norm", compiled=True)
def test_statistics_carry_no_gradient(run):
    x, weight = torch.ones(1, 1, 2, 2, 4, requires_grad=True), torch.ones(16, requires_grad=True)
    merged = run.plain(run.operator("patch_merging"), x, weight, weight, 1e-5, x.dtype)
    normed = run.plain(
        run.operator("residual_norm"), x, x, weight[:4], weight[:4], None, 1e-5, x.dtype
    )
    assert [each.requires_grad for each in merged] == [True, False, False]
    assert [each.requires_grad for each in normed] == [True, True, False, False]
