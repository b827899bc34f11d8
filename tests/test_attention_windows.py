"""window_attention: windows of the size of real models, and the log-sum-exp of a kernel set."""

from functools import partial

import operator_suite as suite
import plain
import pytest
import torch
from test_attention import attend, exactly, make, naive

from videoswin_kernels import window_attention
from videoswin_kernels.testing import ATTENTION, HEAD_WIDTHS, LARGE, PRODUCTION, Case

COMPILED = suite.every("window_attention", compiled=True)
SEVERAL = {name: ATTENTION[name] for name in ("padded, unshifted", "exact", "H and W clamped")}


def one_head(case, batch=1, width=16, dtype=torch.float32, grad=False):
    """(qkv, table, pad_qkv) with a single head: an interpreted kernel takes its time for each."""
    qkv, table, pad = make(case, batch, dtype=dtype, width=width // 2)
    return [value.detach().requires_grad_(grad) for value in (qkv, table[:, :1].clone(), pad)]


def check(run, case, width, dtype, batch=1):
    inputs = one_head(case, batch, width, dtype)
    exact = exactly([value.double() for value in inputs], case, num_heads=1)
    own = naive(run, inputs, case, num_heads=1)
    suite.assert_budget(attend(run, inputs, case, num_heads=1), exact, own, dtype)


@suite.every("window_attention", [torch.float32])
@pytest.mark.parametrize("name", LARGE)
def test_windows_of_real_models(name, run, dtype):
    check(run, LARGE[name], 32, dtype)


@suite.every("window_attention", suite.LOW)
@pytest.mark.trap(8)
def test_a_low_precision_over_eight_hundred_tokens(run, dtype):
    check(run, LARGE["16x7x7, D clamped"], 32, dtype)


@pytest.mark.slow
@suite.every("window_attention", suite.DTYPES)
@pytest.mark.parametrize("width", HEAD_WIDTHS)
@pytest.mark.parametrize("name", LARGE)
def test_windows_of_real_models_in_every_dtype_and_width(name, width, run, dtype):
    check(run, LARGE[name], width, dtype, batch=2)


def check_gradients(run, case, width, dtype, batch=1):
    inputs = one_head(case, batch, width, dtype, grad=True)
    leaves = [suite.exact_leaf(value) for value in inputs]
    weight = suite.random(batch, *case.grid, width, dtype=dtype)
    got = suite.gradients(attend(run, inputs, case, num_heads=1), inputs, weight)
    own = suite.gradients(naive(run, inputs, case, num_heads=1), inputs, weight)
    exact = suite.gradients(exactly(leaves, case, num_heads=1), leaves, weight)
    for value, *parts in zip(inputs, got, exact, own, strict=True):
        suite.assert_budget(*parts, value.dtype)


@suite.every("window_attention", [torch.float32, torch.float16])
def test_gradients_in_windows_of_a_real_model(run, dtype):
    check_gradients(run, LARGE["8x7x7, padded"], 16, dtype)


@pytest.mark.slow
@suite.every("window_attention", suite.DTYPES)
@pytest.mark.parametrize("width", [16, 32])
@pytest.mark.parametrize("name", LARGE | {"16x7x7, D clamped to 8": None})
def test_gradients_in_windows_of_real_models(name, width, run, dtype):
    case = LARGE.get(name, Case((8, 7, 7), (16, 7, 7), (8, 3, 3)))
    check_gradients(run, case, width, dtype)


@suite.every("window_attention", suite.DTYPES[1:], device="cuda")
@pytest.mark.parametrize("name", PRODUCTION)
def test_the_stages_of_swin_t(name, run, dtype):
    case, channels, heads = PRODUCTION[name]
    qkv = suite.random(1, *case.grid, 3 * channels, dtype=dtype, grad=True)
    table = suite.random(2535, heads, dtype=torch.float32, grad=True)
    inputs = qkv, table, suite.random(3 * channels, dtype=dtype, grad=True)
    weight = suite.random(1, *case.grid, channels, dtype=dtype)
    options = {"window": case.window, "shift": case.shift, "num_heads": heads}

    def differentiated(call, inputs):
        result = call(*inputs[:2], pad_qkv=inputs[2], **options)
        return result, *suite.gradients(result, inputs, weight)

    got = differentiated(partial(run, window_attention), inputs)
    own = differentiated(partial(run.plain, plain.attention), inputs)
    leaves = [suite.exact_leaf(value) for value in inputs]
    exact = differentiated(partial(run.plain, plain.attention), leaves)
    for value, *parts in zip((qkv, *inputs), got, exact, own, strict=True):
        suite.assert_budget(*parts, value.dtype)


def registered(run, inputs, case, heads=2):
    """(out, log_sum_exp) of the registered operator, on the CPU."""
    qkv, table, pad = map(run.put, inputs)
    scale = (qkv.shape[-1] / 3 / heads) ** -0.5
    results = run.operator("window_attention")(qkv, table, pad, *case[1:], heads, scale)
    return [value.cpu() for value in results]


@suite.every("window_attention", suite.DTYPES, compiled=True)
@pytest.mark.parametrize("has_pad", [True, False])
@pytest.mark.parametrize("name", SEVERAL)
def test_log_sum_exp(name, has_pad, run, dtype):
    case = SEVERAL[name]
    qkv, table, pad = make(case, dtype=dtype)
    inputs = qkv, table, pad if has_pad else None
    out, log_sum_exp = registered(run, inputs, case)
    assert torch.equal(out, attend(run, inputs, case))
    options = {"window": case.window, "shift": case.shift, "num_heads": 2}
    own = run.plain(plain.log_sum_exp, qkv, table, pad_qkv=inputs[2], **options)
    wide = [value if value is None else value.double() for value in inputs]
    exact = plain.log_sum_exp(*wide[:2], pad_qkv=wide[2], **options)
    assert log_sum_exp.shape == (2, 2, case.grid[0] * case.grid[1] * case.grid[2])
    wide = torch.promote_types(dtype, torch.float32)
    suite.assert_budget(log_sum_exp, exact, own, wide)


@COMPILED
@pytest.mark.trap(6)
def test_log_sum_exp_under_large_logits(run):
    case = ATTENTION["exact"]
    qkv, table, pad = make(case, dtype=torch.float32)
    inputs = (qkv * 20, table, pad)
    options = {"window": case.window, "shift": case.shift, "num_heads": 2}
    exact = plain.log_sum_exp(*[value.double() for value in inputs[:2]], **options)
    own = run.plain(plain.log_sum_exp, *inputs[:2], **options)
    assert exact.abs().max() > 1000
    suite.assert_budget(registered(run, inputs, case)[1], exact, own, torch.float32)
    hidden = plain.log_sum_exp(*[v.double() for v in inputs[:2]], masked=-1e4, **options)
    # What the mask lets through is far above the budget.
    assert (hidden - exact).abs().max() > 0.1


@COMPILED
def test_log_sum_exp_carries_no_gradient(run):
    inputs = [value.requires_grad_() for value in make(SEVERAL["exact"], dtype=torch.float32)]
    out, log_sum_exp = registered(run, inputs, SEVERAL["exact"])
    assert out.requires_grad
    assert not log_sum_exp.requires_grad
