"""CUDA C++ kernels: every width of a row, every mixture of types, every order of threads."""

import contextlib
import itertools

import operator_suite as suite
import plain
import pytest
import torch

from videoswin_kernels import (
    cyclic_shift,
    extension,
    patch_merging,
    residual_norm,
    selection,
    window_partition,
    window_reverse,
)
from videoswin_kernels.cuda import _launch
from videoswin_kernels.cuda import patch_merging as launchers
from videoswin_kernels.testing import MOVEMENT

RUNS = [run for run in suite.runs("residual_norm") if run.kernels == "cuda"]
EVERY = pytest.mark.parametrize(
    "run",
    RUNS or [pytest.param(None, marks=pytest.mark.skip("no CUDA C++ kernels run here"))],
    ids=lambda run: "-".join(run or ("nobody",)),
)
# Both ends of what each layout of csrc/cuda/rows.cuh holds, forward and backward.
ENDS = (128, 256, 512, 1024, 4096, 8192)
WIDTHS = [8, *(w for end in ENDS[:-1] for w in (end, end + 8)), ENDS[-1]]
ODD_WIDTHS = [1, 20, 31, 127, 130, 5119]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def results(run, function, inputs, ups):
    """Outputs of an operator, then the gradients of its inputs."""
    outputs = run(function, *inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return (*outputs, *torch.autograd.grad(outputs, inputs, ups))


def assert_budgets(run, function, naive, inputs, ups, dtype):
    """Each output and gradient within the budget."""
    leaves = [suite.exact_leaf(value) for value in inputs]
    got = results(run, function, inputs, ups)
    own = results(suite.Run("plain", run.device), lambda *x, kernels: naive(*x), inputs, ups)
    exact = naive(*leaves)
    exact = exact if isinstance(exact, tuple) else (exact,)
    wide = [up.double() for up in ups]
    judged = (*exact, *torch.autograd.grad(exact, leaves, wide))
    for parts in zip(got, judged, own, strict=True):
        suite.assert_budget(*parts, dtype)


@EVERY
@pytest.mark.trap(8)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("width", [*WIDTHS, *ODD_WIDTHS])
def test_residual_norm_at_both_ends_of_every_layout(width, dtype, run):
    # More rows than a block has at once, and no whole number of blocks.
    shape = (2, 1, 3, 7, width) if width < 600 else (1, 1, 1, 3, width)
    inputs = [suite.random(*shape, dtype=dtype, grad=True) for _ in range(2)]
    inputs += [suite.random(width, dtype=dtype, grad=True) for _ in range(2)]
    total, _ = run(residual_norm, *inputs)
    assert torch.equal(total, inputs[0] + inputs[1])
    # The norm is of the rounded sum: judged from there on.
    stream = [total.detach().requires_grad_(), torch.zeros_like(total, requires_grad=True)]
    ups = [suite.random(*shape, dtype=dtype) for _ in range(2)]
    inputs = [*stream, *inputs[2:]]
    assert_budgets(run, residual_norm, plain.residual_norm, inputs, ups, dtype)


@EVERY
@pytest.mark.trap(8)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "channels", [8, 32, 40, 64, 72, 128, 136, 256, 264, 1024, 2048, 7, 12, 33, 1279]
)
def test_patch_merging_at_both_ends_of_every_layout(channels, dtype, run):
    grid = (2, 5, 7) if channels < 200 else (1, 3, 3)
    x = suite.random(2, *grid, channels, dtype=dtype, grad=True)
    affine = [suite.random(4 * channels, dtype=dtype, grad=True) for _ in range(2)]
    up = suite.random(2, grid[0], (grid[1] + 1) // 2, (grid[2] + 1) // 2, 4 * channels, dtype=dtype)
    assert_budgets(run, patch_merging, plain.merging, [x, *affine], [up], dtype)


@EVERY
@pytest.mark.parametrize(("channels", "merged"), [(8200, 2056), (5121, 1281)])
def test_a_row_too_wide_for_registers_is_refused_in_one_sentence(channels, merged, run):
    widest = selection.WIDEST if channels % 8 == 0 else selection.WIDEST_ODD
    ones = torch.ones(1, 1, 1, 1, channels)
    sentence = suite.REFUSAL.format("residual_norm", "cuda")
    with pytest.raises(RuntimeError, match=sentence) as caught:
        run(residual_norm, ones, ones, ones.flatten(), ones.flatten())
    assert str(widest) in str(caught.value)
    assert torch.equal(residual_norm(ones, ones, ones.flatten(), ones.flatten())[0], ones + ones)
    x, affine = torch.ones(1, 1, 2, 2, merged), torch.ones(4 * merged)
    with pytest.raises(RuntimeError, match=suite.REFUSAL.format("patch_merging", "cuda")):
        run(patch_merging, x, affine, affine)


@EVERY
def test_the_library_refuses_what_the_launchers_would_not_bring(run):
    operators = extension.operators("_emulated" if run.device == "cpu" else "_ops")
    wide = run.put(torch.ones(1, 1, 1, 1, 8200))
    rows = run.put(torch.ones(1))
    with pytest.raises(RuntimeError, match="8200 channels is wider"):
        operators.residual_norm(wide, wide, rows, rows, wide, wide, wide, wide, None, 1e-5)
    double = run.put(torch.ones(1, 1, 1, 1, 8, dtype=torch.float64))
    with pytest.raises(RuntimeError, match="float32, float16 and bfloat16"):
        operators.residual_norm(
            double, double, rows, rows, double, double, double, double, None, 1e-5
        )


@EVERY
@pytest.mark.parametrize("channels", [16, 7])
@pytest.mark.parametrize("stream", DTYPES)
@pytest.mark.parametrize("branch", DTYPES)
@pytest.mark.parametrize("norm", DTYPES)
def test_every_mixture_of_types(norm, branch, stream, channels, run):
    shape = (2, 1, 2, 3, channels)
    x = suite.random(*shape, dtype=stream, grad=True)
    other = suite.random(*shape, dtype=branch, grad=True)
    affine = [suite.random(channels, dtype=kind, grad=True) for kind in (branch, stream)]
    scale = torch.tensor([2.0, 0.5], dtype=branch)
    context = contextlib.nullcontext()
    if norm != stream:
        # Autocast to float32 does nothing: then the norm has the type of the stream.
        norm = stream if norm == torch.float32 else norm
        context = torch.autocast(run.device, norm, enabled=norm != stream)
    with context:
        total, normed = run(residual_norm, x, other, *affine, branch_scale=scale)
    assert (total.dtype, normed.dtype) == (stream, norm)
    exact = x.double() + scale.double().view(2, 1, 1, 1, 1) * other.double()
    assert torch.equal(total, exact.float().to(stream))
    own, judged = (
        torch.nn.functional.layer_norm(
            total.detach().to(kind), (channels,), *(each.detach().to(kind) for each in affine)
        )
        for kind in (torch.float32, torch.float64)
    )
    suite.assert_budget(normed, judged, own.to(norm), norm)
    grads = torch.autograd.grad((total.float() + normed.float().sin()).sum(), [x, other, *affine])
    for value, grad in zip((x, other, *affine), grads, strict=True):
        assert grad.dtype == value.dtype
        assert torch.isfinite(grad).all()


def everything(run, dtype):
    """Outputs and gradients of all operators, small and with padding, in one list."""
    torch.manual_seed(7)
    case = MOVEMENT["padded, one axis shifted"]
    x = suite.random(2, *case.grid, 40, dtype=dtype, grad=True)
    options = {"window": case.window, "shift": case.shift}
    windows = run(window_partition, x, **options)
    found = [windows, run(cyclic_shift, x, (1, -2, 3))]
    found.append(run(window_reverse, windows.detach(), grid=case.grid, **options))
    wide = suite.random(1, 1, 1, 3, 1032, dtype=dtype, grad=True)
    for stream in (x, wide):
        channels = stream.shape[-1]
        for function, width in ((patch_merging, 4 * channels), (residual_norm, channels)):
            affine = [suite.random(width, dtype=dtype, grad=True) for _ in range(2)]
            inputs = [stream, *([stream] if function is residual_norm else []), *affine]
            outputs = run(function, *inputs)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            ups = [suite.random(*output.shape, dtype=dtype) for output in outputs]
            found += [*outputs, *torch.autograd.grad(outputs, [stream, *affine], ups)]
    return found


ORDERS = [("forward", 0), ("backward", 0), ("newest", 0), ("random", 1), ("random", 2)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_result_depends_on_the_order_of_threads_and_blocks(dtype, control):
    run = suite.Run("cuda", "cpu")
    expected = None
    for (order, seed), poison in itertools.product(ORDERS, (True, False)):
        control.set_settings(order=order, seed=seed, poison=poison, late_copies=True)
        found = everything(run, dtype)
        expected = expected or found
        assert all(map(torch.equal, found, expected)), (order, seed, poison)


@EVERY
def test_a_second_run_gives_the_same_bits(run):
    assert all(map(torch.equal, everything(run, torch.float32), everything(run, torch.float32)))


@EVERY
@pytest.mark.parametrize("channels", [8, 7])
def test_gradients_of_weights_are_summed_over_as_many_parts_as_there_are(channels, run):
    """As many blocks as a first stage has at most, each with several rounds of rows."""
    x, branch = (suite.random(2, 1, 160, 160, channels, dtype=torch.float32) for _ in range(2))
    for function, naive in ((residual_norm, plain.residual_norm), (patch_merging, plain.merging)):
        width = channels * (4 if function is patch_merging else 1)
        affine = [suite.random(width, dtype=torch.float32, grad=True) for _ in range(2)]
        inputs = [x.clone().requires_grad_(), *affine]
        if function is residual_norm:
            inputs.insert(1, branch.clone().requires_grad_())
        outputs = naive(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        ups = [suite.random(*output.shape, dtype=torch.float32) for output in outputs]
        assert_budgets(run, function, naive, inputs, ups, torch.float32)


@EVERY
def test_rows_far_apart_are_gathered_and_scattered_in_every_clip(run, untouched):
    """Offsets past 2^31 in x and its gradient, through launchers that get a short index."""
    # The third clip begins beyond 2^31 numbers.
    clips, width = 3, 8
    number = 2**31 // width // 2 + 5
    rows = [number - 1, 3, -1, number // 2, 7, number - 2, number - 3, -1]
    kept = [row for row in rows if row >= 0]
    far = [
        untouched(clips, number, width, dtype=torch.float16, device=run.device) for _ in range(2)
    ]
    near = run.put(torch.randn(clips, len(kept), width).half())
    far[0][:, kept] = near
    affine = [run.put(torch.randn(4 * width)) for _ in range(2)]
    grad = run.put(torch.randn(clips * 2, 4 * width).half())

    def merge(index, x, grad_x):
        index = run.put(torch.tensor(index, dtype=torch.int32))
        x, out = x.view(clips, -1, 1, 1, width), torch.empty_like(grad)
        mean, rstd = torch.empty(2, clips * 2, device=run.device)
        launchers.launch_patch_merging(out, mean, rstd, x, *affine, 1e-5, x.dtype, index)
        sums = torch.empty(2, 4 * width, device=run.device)
        launchers.launch_patch_merging_backward(
            grad_x, *sums, grad, x, affine[0], mean, rstd, True, True, index
        )
        return out, sums

    found = merge(rows, *far)
    near_grad = torch.empty_like(near)
    places = [kept.index(row) if row >= 0 else -1 for row in rows]
    assert all(map(torch.equal, found, merge(places, near, near_grad)))
    assert torch.equal(far[1][:, kept], near_grad)


@EVERY
def test_a_gather_reads_rows_far_apart_in_every_clip(run, untouched):
    number, clips = 2**31 - 9, 3
    x = untouched(clips * number, 1, dtype=torch.int8, device=run.device)
    rows = [number - 1, 0, number // 2, -1]
    out = run.put(torch.full((clips * len(rows), 1), 7, dtype=torch.int8))
    expected = torch.zeros_like(out)
    for clip, (place, row) in itertools.product(range(clips), enumerate(rows)):
        if row >= 0:
            value = 1 + clip * len(rows) + place
            x[clip * number + row] = expected[clip * len(rows) + place] = value
    index = run.put(torch.tensor(rows, dtype=torch.int32))
    _launch.library("cyclic_shift", x).gather_rows(out, x, index, number)
    assert torch.equal(out, expected)
