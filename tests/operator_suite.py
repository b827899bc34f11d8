"""What the operators' tests share: kernel sets, inputs, naive judges, budget, refusals, compile.

The naive functions are the composition of upstream in plain PyTorch. In float64 they are the
exact result; in a lower precision their error is the measure of a kernel set's own.
"""

import contextlib
import functools
import re

import loops
import pytest
import torch
import torch._dynamo.testing
from torch.nn import functional as F

import videoswin_kernels

OPERATORS = (
    "cyclic_shift",
    "window_partition",
    "window_reverse",
    "window_attention",
    "patch_merging",
    "residual_norm",
)
WORDS = ("auto", "fused", "reference", "triton", "cuda", "cpu")
NAMED = ("triton", "cuda", "cpu")
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
LOW = (torch.float16, torch.bfloat16)


def smallest_call(operator, kernels):
    """Runs the operator on one token."""
    x = torch.ones(1, 1, 1, 1, 32)
    one = {"window": (1, 1, 1), "kernels": kernels}
    function = getattr(videoswin_kernels, operator)
    if operator == "cyclic_shift":
        return function(x, (0, 0, 0), kernels=kernels)
    if operator == "window_partition":
        return function(x, **one)
    if operator == "window_reverse":
        return function(x.view(1, 1, 32), grid=(1, 1, 1), **one)
    if operator == "window_attention":
        return function(torch.ones(1, 1, 1, 1, 96), torch.zeros(1, 1), num_heads=1, **one)
    if operator == "patch_merging":
        return function(x, torch.ones(128), torch.zeros(128), kernels=kernels)
    return function(x, x, torch.ones(32), torch.zeros(32), kernels=kernels)


@functools.cache
def reason_against(operator, word):
    """The sentence with which the operator refuses a kernel set here, or None if it runs.

    The reference is not asked: when it breaks, its tests shall fail, not skip.
    """
    if word == "reference":
        return None
    try:
        smallest_call(operator, word)
    except (RuntimeError, ValueError) as error:
        return str(error)
    return None


def kernel_sets(operator):
    """The kernel sets that run here, to ask every question of each.

    The others are skipped once per operator, with their reason, in test_selection.py: one line
    to read in place of one for every question.
    """
    return [word for word in ("reference", *NAMED) if reason_against(operator, word) is None]


def random(*shape, dtype=torch.float64, std=1.0, grad=False):
    """Normal values that are exact in the dtype."""
    return (torch.randn(*shape, dtype=torch.float64) * std).to(dtype).requires_grad_(grad)


def layouts(x):
    """(name, same values in another layout): every stride and offset a caller can bring."""
    channels_first = x.movedim(-1, 1).contiguous().movedim(1, -1)
    wide = torch.full((*x.shape[:-1], 2 * x.shape[-1]), 9.0, dtype=x.dtype)
    wide[..., ::2] = x
    padded = torch.full((*x.shape[:-1], x.shape[-1] + 3), 9.0, dtype=x.dtype)
    padded[..., 3:] = x
    batch = torch.full((x.shape[0] + 1, *x.shape[1:]), 9.0, dtype=x.dtype)
    batch[1:] = x
    shifted = torch.full((x.numel() + 1,), 9.0, dtype=x.dtype)
    shifted[1:] = x.flatten()
    result = {
        "channels first": channels_first,
        "every second channel": wide[..., ::2],
        "rows apart and offset": padded[..., 3:],
        "second of a batch": batch[1:],
        "unaligned": shifted[1:].view(x.shape),
        "axes swapped": x.transpose(1, -2).contiguous().transpose(1, -2),
    }
    for name, view in result.items():
        assert torch.equal(view, x), name
    return result


def exact_leaf(value):
    """A float64 leaf that requires grad, with the values of a tensor (None stays None)."""
    return None if value is None else value.detach().double().requires_grad_()


def gradients(output, inputs, weight):
    """Gradients of the weighted sum, so that no symmetry hides a wrong one."""
    return torch.autograd.grad((output * weight.to(output.dtype)).sum(), inputs)


def assert_budget(got, exact, naive, dtype=None):
    """Error to float64 <= 2 x that of the naive implementation in the dtype + one rounding."""
    dtype = dtype or got.dtype
    assert got.dtype == dtype
    assert got.shape == exact.shape == naive.shape
    assert torch.isfinite(got).all()
    if got.numel() == 0:
        return
    exact = exact.detach().double()
    error = (got.detach().double() - exact).abs().max().item()
    own = (naive.detach().double() - exact).abs().max().item()
    rounding = torch.finfo(dtype).eps / 2 * exact.abs().max().item()
    assert error <= 2 * own + rounding, f"error {error:.3e}, naive {own:.3e} + {rounding:.3e}"


def assert_near_loops(got, judged):
    """Equal to a float64 judge but for the order of float64 sums."""
    assert got.dtype == torch.float64
    assert got.shape == judged.shape
    torch.testing.assert_close(got.detach(), torch.from_numpy(judged), rtol=1e-12, atol=1e-12)


@contextlib.contextmanager
def refuses(operator, argument, got, kind=(ValueError, TypeError)):
    """Expects one sentence that names the operator, the argument and what was got."""
    with pytest.raises(kind) as caught:
        yield caught
    message = str(caught.value)
    assert "\n" not in message, message
    assert not re.search(r"\. [A-Z]", message), f"more than one sentence: {message}"
    assert message.startswith(f"{operator}: "), message
    assert re.search(rf"\b(?:{argument})\b", message), message
    forms = {str(got), repr(got)}
    if isinstance(got, tuple | list):
        forms |= {str(list(got)), str(tuple(got))}
    said = message.partition("got ")[2]
    assert any(form in said for form in forms), f"{message!r} does not say that it got {got!r}"


def naive_partition(x, window, shift, pad=None):
    """[B, D, H, W, C] -> [B*M, N, C] as upstream: pad, roll, view, permute."""
    window, shift, padded = loops.clamp(x.shape[1:4], window, shift)
    far = _far_ends(x.shape[1:4], padded)
    full = F.pad(x, (0, 0, *far))
    if pad is not None:
        inside = F.pad(torch.ones(x.shape[1:4], dtype=torch.bool), far)
        full = torch.where(inside[..., None], full, pad)
    full = full.roll([-step for step in shift], (1, 2, 3))
    (d, h, w), counts = window, [padded[axis] // window[axis] for axis in range(3)]
    full = full.view(x.shape[0], counts[0], d, counts[1], h, counts[2], w, -1)
    return full.permute(0, 1, 3, 5, 2, 4, 6, 7).reshape(
        x.shape[0] * counts[0] * counts[1] * counts[2], d * h * w, x.shape[-1]
    )


def naive_reverse(windows, grid, window, shift):
    """[B*M, N, C] -> [B, D, H, W, C] as upstream: view, permute, roll back, crop."""
    window, shift, padded = loops.clamp(grid, window, shift)
    counts = [padded[axis] // window[axis] for axis in range(3)]
    batch = windows.shape[0] // (counts[0] * counts[1] * counts[2])
    full = windows.view(batch, *counts, *window, windows.shape[-1])
    full = full.permute(0, 1, 4, 2, 5, 3, 6, 7).reshape(batch, *padded, windows.shape[-1])
    return full.roll(shift, (1, 2, 3))[:, : grid[0], : grid[1], : grid[2]]


def naive_attention(
    qkv,
    bias_table,
    *,
    window,
    shift=(0, 0, 0),
    num_heads,
    pad_qkv=None,
    scale=None,
    masked=-100.0,
    rows=None,
    low_bias=False,
):
    """Upstream in the dtype of qkv: low-precision products, float32 bias, mask and softmax.

    `masked` and `rows` replace the mask's value and the table rows; `low_bias` adds the bias in
    the dtype of qkv. They make the wrong results that the tests must tell from the right one.
    """
    grid, width = tuple(qkv.shape[1:4]), qkv.shape[-1] // 3 // num_heads
    tokens = naive_partition(qkv, window, shift, pad_qkv)
    q, k, v = tokens.unflatten(-1, (3, num_heads, width)).permute(2, 0, 3, 1, 4)
    q = q * (scale or width**-0.5)
    scores = q @ k.transpose(-2, -1)
    if not low_bias and scores.dtype in LOW:
        scores = scores.float()
    rows = loops.relative_rows(grid, window) if rows is None else rows
    bias = bias_table[torch.from_numpy(rows)].permute(2, 0, 1)
    scores = scores + bias.to(scores.dtype)
    region = torch.from_numpy(loops.regions(grid, window, shift))
    mask = torch.where(region[:, :, None] != region[:, None, :], masked, 0.0).to(scores.dtype)
    scores = scores.view(-1, *mask.shape[:1], *scores.shape[1:]) + mask[:, None]
    probabilities = scores.flatten(0, 1).softmax(-1).to(v.dtype)
    result = (probabilities @ v).transpose(1, 2).flatten(2)
    return naive_reverse(result, grid, window, shift)


def naive_merging(x, weight, bias, eps=1e-5):
    """Upstream: pad to even, concatenate four slices, LayerNorm in the dtype of x."""
    x = F.pad(x, (0, 0, 0, x.shape[3] % 2, 0, x.shape[2] % 2))
    slices = [x[:, :, h::2, w::2] for w in (0, 1) for h in (0, 1)]
    return F.layer_norm(torch.cat(slices, -1), weight.shape, weight, bias, eps)


def naive_residual_norm(x, branch, weight, bias, eps=1e-5, branch_scale=None):
    """Plain sum, rounded once, and LayerNorm of it, in the dtype of x."""
    wide = torch.promote_types(x.dtype, torch.float32)
    step = branch.to(wide)
    if branch_scale is not None:
        step = step * branch_scale.to(wide).view(-1, *[1] * (x.dim() - 1))
    total = (x.to(wide) + step).to(x.dtype)
    return total, F.layer_norm(total, weight.shape, weight.to(x.dtype), bias.to(x.dtype), eps)


def _far_ends(grid, padded):
    """F.pad's argument for the three grid axes, last axis first."""
    missing = [padded[axis] - grid[axis] for axis in range(3)]
    return 0, missing[2], 0, missing[1], 0, missing[0]


def assert_compiles(function, make_inputs, *, exact):
    """The traced function equals eager, outputs and gradients, for changing batch sizes.

    At most two graphs: the first is static, the second has the batch size as a symbol.
    """
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, backend=counter, fullgraph=True, dynamic=None)
    for batch in (2, 3, 5):
        inputs = make_inputs(batch)
        results = []
        for call in (function, compiled):
            outputs = call(*inputs)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            total = sum((output * output.detach().cos()).sum() for output in outputs)
            results.append((*outputs, *torch.autograd.grad(total, inputs)))
        for eager, traced in zip(*results, strict=True):
            tolerance = 0.0 if exact else 1e-5
            torch.testing.assert_close(traced, eager, rtol=tolerance, atol=tolerance)
    assert counter.frame_count <= 2
    torch._dynamo.reset()
