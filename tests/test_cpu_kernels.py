"""kernels="cpu": any number of threads, levels of x86-64, rows and heads of any width, memory.

What every kernel set is asked stands in the tests of each operator.
"""

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import loops
import numpy as np
import operator_suite as suite
import plain
import pytest
import torch
from test_attention_backward import most_held
from test_cpu_exponentials import LEVELS, at_level

import videoswin_kernels
from videoswin_kernels import extension, patch_merging, residual_norm, window_attention
from videoswin_kernels.testing import LARGE, Case

pytestmark = pytest.mark.skipif(
    extension.why_not("_ops_cpu") is not None, reason=str(extension.why_not("_ops_cpu"))
)
DTYPE = pytest.mark.parametrize("dtype", suite.DTYPES, ids=str)
BITS = pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
PADDED = Case((3, 5, 7), (2, 3, 3), (1, 1, 1))
CLAMPED = Case((7, 2, 5), (3, 4, 3), (1, 2, 1))
# Few sets of sums of so large a table are kept, however many windows there are.
LARGE_TABLE = Case((1, 1, 40), (64, 64, 8), (0, 0, 3))
OPERATIONS = torch.ops.videoswin_cpu


@pytest.fixture
def threads():
    """Sets how many threads torch uses; as it was, afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(params=LEVELS)
def level(request):
    """Each level that this processor has."""
    with at_level(request.param) as name:
        yield name


def leaves(*shapes, dtype):
    return [suite.random(*shape, dtype=dtype, grad=True) for shape in shapes]


def attention_inputs(case, clips, heads, width, dtype):
    """Leaves (qkv, bias_table, pad_qkv)."""
    packed, table = 3 * heads * width, (loops.table_rows(case.window), heads)
    qkv, pad = leaves((clips, *case.grid, packed), (packed,), dtype=dtype)
    return [qkv, *leaves(table, dtype=torch.promote_types(dtype, torch.float32)), pad]


def norm_inputs(shape, dtype):
    """Leaves (x, branch, weight, bias)."""
    return leaves(shape, shape, shape[-1:], shape[-1:], dtype=dtype)


def merging_inputs(shape, dtype):
    """Leaves (x, weight, bias)."""
    return leaves(shape, (4 * shape[-1],), (4 * shape[-1],), dtype=dtype)


def attend(case, qkv, table, pad, function=window_attention, **options):
    options |= {"window": case.window, "shift": case.shift, "num_heads": table.shape[1]}
    return function(qkv, table, pad_qkv=pad, **options)


def differentiated(function, inputs):
    """[results and gradients] under gradients of results that every type has, and every call."""
    results = function(*inputs)
    results = results if isinstance(results, tuple) else (results,)
    generator = torch.Generator().manual_seed(1)
    ups = [torch.randn(value.shape, generator=generator).bfloat16() for value in results]
    ups = [up.to(value.dtype) for up, value in zip(ups, results, strict=True)]
    return [*(value.detach() for value in results), *torch.autograd.grad(results, inputs, ups)]


def check(inputs, ours, exact, naive):
    """Results and gradients are in their types, and within the budget; `exact` takes float64."""
    got, own = differentiated(ours, inputs), differentiated(naive, inputs)
    assert [grad.dtype for grad in got[-len(inputs) :]] == [value.dtype for value in inputs]
    wide = differentiated(exact, [suite.exact_leaf(value) for value in inputs])
    for parts in zip(got, wide, own, strict=True):
        suite.assert_budget(*parts, parts[0].dtype)


def check_attention(case, heads, width, dtype):
    naive = partial(attend, case, function=plain.attention)
    inputs = attention_inputs(case, 2, heads, width, dtype)
    check(inputs, partial(attend, case, kernels="cpu"), naive, naive)


class ExactNorm(torch.autograd.Function):
    """LayerNorm and its gradients in NumPy's long doubles: a judge of those in float64."""

    @staticmethod
    def forward(ctx, *given):
        x, weight, bias = (value.numpy().astype(np.longdouble) for value in given)
        away = x - x.mean(-1, keepdims=True)
        rstd = 1 / np.sqrt((away * away).mean(-1, keepdims=True) + np.longdouble(1e-5))
        ctx.saved = weight, away * rstd, rstd
        return torch.from_numpy((away * rstd * weight + bias).astype(np.float64))

    @staticmethod
    def backward(ctx, grad):
        weight, normed, rstd = ctx.saved
        grad = grad.numpy().astype(np.longdouble)
        one, axes = grad * weight, tuple(range(grad.ndim - 1))
        away = one - one.mean(-1, keepdims=True)
        away = away - normed * (one * normed).mean(-1, keepdims=True)
        grads = away * rstd, (grad * normed).sum(axes), grad.sum(axes)
        return tuple(torch.from_numpy(value.astype(np.float64)) for value in grads)


def exact_residual_norm(dtype, x, branch, weight, bias):
    total = x + branch
    # The norm is of the rounded sum, through which gradients go as they are.
    total = total + (total.to(dtype).double() - total).detach()
    return total, ExactNorm.apply(total, weight, bias)


def exact_merging(x, weight, bias):
    x = torch.nn.functional.pad(x, (0, 0, 0, x.shape[3] % 2, 0, x.shape[2] % 2))
    rows = torch.cat([x[:, :, h::2, w::2] for w in (0, 1) for h in (0, 1)], -1)
    return ExactNorm.apply(rows, weight, bias)


def check_residual_norm(inputs):
    exact = partial(exact_residual_norm, inputs[0].dtype)
    check(inputs, partial(residual_norm, kernels="cpu"), exact, plain.residual_norm)


def check_merging(inputs):
    check(inputs, partial(patch_merging, kernels="cpu"), exact_merging, plain.merging)


def flat(x):
    """Rows whose mean is far larger than their deviations, which are alike in all rows."""
    steps = torch.linspace(-1, 1, x.shape[-1])[torch.rand(x.shape).argsort(-1)]
    steps = steps * (1 + torch.rand(*x.shape[:-1], 1))
    return (30 + steps).to(x.dtype).requires_grad_()


def attended(case, clips, heads, width, dtype):
    """A function that computes output, log-sum-exp and all gradients."""
    inputs = attention_inputs(case, clips, heads, width, dtype)
    up = suite.random(clips, *case.grid, heads * width, dtype=dtype)

    def call():
        options = case.window, case.shift, heads, width**-0.5
        out, log_sum_exp = OPERATIONS.window_attention(*inputs, *options)
        return [out, log_sum_exp, *torch.autograd.grad(out, inputs, up)]

    return call


def moved(case, clips, channels, dtype):
    """A function that moves values there and back."""
    x = suite.anything(clips, *case.grid, channels, dtype=dtype)
    options = {"window": case.window, "shift": case.shift, "kernels": "cpu"}

    def call():
        windows = videoswin_kernels.window_partition(x, **options)
        back = videoswin_kernels.window_reverse(windows, grid=case.grid, **options)
        return [windows, back, videoswin_kernels.cyclic_shift(x, (1, -2, 3), kernels="cpu")]

    return call


def normed(function, inputs):
    return partial(differentiated, partial(function, kernels="cpu"), inputs)


ONE = Case((2, 5, 5), (2, 5, 5), (0, 0, 0))
# Of more chunks than there are threads, and of fewer.
WORK = {
    "padded windows": lambda dtype: attended(PADDED, 2, 3, 7, dtype),
    "clamped windows": lambda dtype: attended(CLAMPED, 9, 4, 16, dtype),
    "one window": lambda dtype: attended(ONE, 1, 1, 24, dtype),
    "a large table": lambda dtype: attended(LARGE_TABLE, 8, 3, 2, dtype),
    "norm": lambda dtype: normed(residual_norm, norm_inputs((3, 2, 17, 19, 33), dtype)),
    "norm of 2 rows": lambda dtype: normed(residual_norm, norm_inputs((2, 1, 1, 1, 9), dtype)),
    "merging": lambda dtype: normed(patch_merging, merging_inputs((2, 3, 31, 17, 5), dtype)),
    "merging to 2": lambda dtype: normed(patch_merging, merging_inputs((1, 1, 2, 3, 5), dtype)),
    "movement": lambda dtype: moved(PADDED, 2, 33, dtype),
    "movement of 2 tokens": lambda dtype: moved(Case((1, 1, 2), (1,) * 3, (0,) * 3), 1, 1, dtype),
}


def bits(tensors):
    """Bytes, which tell -0.0 from 0.0."""
    return [value.detach().contiguous().view(torch.uint8) for value in tensors]


@BITS
@pytest.mark.parametrize("name", WORK)
def test_the_same_bits_for_any_number_of_threads_and_in_every_run(name, dtype, threads):
    call = WORK[name](dtype)
    threads(1)
    expected = bits(call())
    for count in (2, 5, 5, 1):
        threads(count)
        assert all(map(torch.equal, bits(call()), expected)), count


def test_the_same_bits_at_every_level_whoever_calls(level, threads):
    """Several threads of Python at once, each with several of its own."""
    calls = [WORK[name](torch.float32) for name in ("padded windows", "merging", "movement")]
    threads(1)
    expected = [bits(call()) for call in calls]
    with ThreadPoolExecutor(3, initializer=torch.set_num_threads, initargs=(2,)) as pool:
        results = list(pool.map(lambda call: call(), calls * 4))
    for got, wanted in zip(results, expected * 4, strict=True):
        assert all(map(torch.equal, bits(got), wanted))


@DTYPE
@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("width", [1, 7, 24, 40, 48, 96])
def test_any_head_width(width, heads, dtype):
    check_attention(PADDED if heads == 1 else CLAMPED, heads, width, dtype)


@pytest.mark.parametrize("width", [16, 32])
@pytest.mark.parametrize("name", ["16x7x7", "beyond 784"])
def test_sums_over_all_keys_of_a_window_are_no_chains(name, width):
    """Hundreds of values of one sign: each rounding of a chain would be that of a large sum."""
    case = LARGE[name]
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(1, *case.grid, 3 * width, generator=generator) / 10
    qkv[..., 2 * width :].abs_().add_(1)
    table = torch.randn(loops.table_rows(case.window), 1, generator=generator) / 10
    inputs = qkv, table, qkv[0, 0, 0, 0].clone()
    naive = attend(case, *inputs, function=plain.attention)
    exact = attend(case, *(value.double() for value in inputs), function=plain.attention)
    suite.assert_budget(attend(case, *inputs, kernels="cpu"), exact, naive, torch.float32)


@DTYPE
@pytest.mark.parametrize("channels", [2, 3, 5, 15, 16, 17, 31, 33, 100, 129, 1000, 8200])
def test_rows_of_residual_norm_of_any_width(channels, dtype):
    x, branch, *weights = norm_inputs((2, 1, 5, 4, channels), dtype)
    check_residual_norm([x, branch, *weights])
    # Without a branch the rounded sum is the exact one.
    check_residual_norm([flat(x), torch.zeros_like(x, requires_grad=True), *weights])


@DTYPE
@pytest.mark.parametrize("channels", [1, 2, 3, 5, 15, 16, 17, 31, 33, 100, 129, 1000, 2050])
def test_rows_of_patch_merging_of_any_width(channels, dtype):
    # Odd: half of each row at the end is padding, many equal numbers.
    check_merging(merging_inputs((2, 1, 4, 5, channels), dtype))
    x, *weights = merging_inputs((2, 1, 4, 4, channels), dtype)
    check_merging([flat(x), *weights])


@DTYPE
def test_a_row_of_one_number_is_the_bias(dtype):
    inputs = norm_inputs((2, 3, 5, 7, 1), dtype)
    norm = residual_norm(*inputs, kernels="cpu")[1]
    assert torch.equal(norm, inputs[-1].expand_as(norm))
    up = suite.random(*norm.shape, dtype=dtype)
    grad_x, _, grad_weight, grad_bias = torch.autograd.grad(norm, inputs, up)
    # 1 / deviation is that of eps alone, and a factor of what roundings leave.
    eps = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    assert grad_x.abs().max() <= 1e3 * eps * (up * inputs[2]).abs().max()
    assert not grad_weight.any()
    torch.testing.assert_close(grad_bias, up.double().sum().to(dtype).view(1))


def small_functions():
    """(function, its leaves in float64): windows padded and shifted, or clamped, and rows."""
    for case in (Case((2, 3, 2), (1, 2, 2), (0, 1, 1)), Case((3, 1, 2), (2, 2, 3), (1, 0, 1))):
        for heads, width in ((1, 2), (2, 1)):
            inputs = attention_inputs(case, 1, heads, width, torch.float64)
            yield partial(attend, case, kernels="cpu"), inputs
    inputs = norm_inputs((2, 1, 2, 1, 3), torch.float64)
    for scale in (None, torch.tensor([0.5, 2.0], dtype=torch.float64)):
        yield partial(residual_norm, branch_scale=scale, kernels="cpu"), inputs
    inputs = merging_inputs((1, 2, 3, 2, 2), torch.float64)
    yield partial(patch_merging, kernels="cpu"), inputs


def test_gradcheck(level):
    for function, inputs in small_functions():
        assert torch.autograd.gradcheck(function, inputs)


@DTYPE
def test_every_level_is_within_the_budget(dtype, level):
    check_attention(PADDED, 3, 7, dtype)
    check_attention(CLAMPED, 2, 32, dtype)
    for channels in (17, 384):
        check_residual_norm(norm_inputs((2, 1, 5, 4, channels), dtype))
        check_merging(merging_inputs((2, 1, 4, 5, channels), dtype))


@BITS
@pytest.mark.parametrize("name", ["padded windows", "norm", "merging"])
def test_levels_are_close_to_each_other(name, dtype, level):
    call = WORK[name](dtype)
    with at_level(LEVELS[0]):
        expected = call()
    for got, other in zip(call(), expected, strict=True):
        # Sums in another order; where that makes the next number of bfloat16, the next one.
        share = {8: 1e-13, 4: 1e-5, 2: 1 / 128}[got.dtype.itemsize]
        limit = share * other.abs().max().item()
        torch.testing.assert_close(got, other, rtol=0, atol=limit)


@pytest.mark.parametrize("number", [3, 7, 1 << 30])
def test_a_level_that_is_not_there_changes_nothing(number, level):
    assert extension.cpu_level(number) is None
    assert extension.cpu_level() == extension.cpu_level(-1) == level


def scratch(tokens, width, table_rows):
    """Bytes of float32 that one thread takes at most, and what is small beside them."""
    width = -(-width // 32) * 32
    packed = max(1 << 20, 4 * 5 * tokens * width)
    return packed + 4 * 28 * (4 * tokens + 3 * width) + 4 * table_rows + (32 << 10)


def held_by_backward(given, results, needs):
    """Bytes that the registered backward holds beyond its gradients."""
    grads, up = [], torch.randn_like(results[0])
    call = partial(OPERATIONS.window_attention_backward, up, *given[:3], *results, *given[3:])
    held = most_held("cpu", lambda: grads.extend(call(*needs)))
    return held - sum(value.nbytes for value in grads)


@pytest.mark.parametrize(
    ("count", "clips", "needs"),
    [
        (1, 1, (True, True, True)),
        (2, 1, (True, True, True)),
        (2, 1, (False, False, True)),
        # Windows enough to pack as many as may be.
        (2, 3, (True, False, False)),
    ],
)
def test_memory_of_attention_is_packed_windows_and_partial_sums(count, clips, needs, threads):
    """An array of all scores is never held, not of a window's heads nor of a head's windows."""
    case, heads, width = Case((8, 14, 28), (8, 7, 7), (0, 3, 3)), 8, 16
    inputs = [v.detach() for v in attention_inputs(case, clips, heads, width, torch.float32)]
    given, rows = (*inputs, *case[1:], heads, width**-0.5), len(inputs[1])
    threads(count)
    results = []
    held = most_held("cpu", lambda: results.extend(OPERATIONS.window_attention(*given)))
    held -= sum(value.nbytes for value in results)
    beside = count * scratch(case.tokens, width, rows)
    assert 0 <= held <= beside
    sums = needs[1] * rows + needs[2] * 2 * width
    limit = beside + 8 * heads * clips * case.windows * sums
    assert 0 <= held_by_backward(given, results, needs) <= limit
    assert limit < 4 * min(heads, case.windows) * case.tokens**2


def test_memory_of_partial_sums_has_an_end(threads):
    """However many windows there are, of however large a table."""
    threads(1)
    inputs = [v.detach() for v in attention_inputs(LARGE_TABLE, 40, 3, 2, torch.float32)]
    given, rows = (*inputs, *LARGE_TABLE[1:], 3, 1.0), len(inputs[1])
    results = OPERATIONS.window_attention(*given)
    limit = (32 << 20) + scratch(8, 2, rows)
    assert held_by_backward(given, results, (True, True, True)) <= limit
    assert limit < 8 * inputs[1].numel() * 40
