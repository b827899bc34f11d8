"""The gradients of window_attention: several tiles, what is asked for, pads, rows, and memory."""

import gc
import itertools
import math

import loops
import operator_suite as suite
import plain
import pytest
import torch
from test_attention import HEADS, WIDTH, attend, exactly, make, naive
from torch.profiler import ProfilerActivity, profile

from videoswin_kernels.testing import ATTENTION, HEAD_WIDTHS, Case

COMPILED = suite.every("window_attention", compiled=True)
HALVES = [torch.float32, torch.float16]
# 80 tokens, two tiles of up to 64; four windows; height clamped, depth and width padded and masked.
TILES = Case((5, 4, 7), (4, 5, 5), (2, 1, 2))
# Pads that share a region with tokens, in a window that has another: both are seen and masked.
SEEN = Case((3, 5, 7), (2, 3, 3), (1, 1, 1))
NEEDS = list(itertools.product([True, False], repeat=3))


def operands(run, inputs, case, *, scale=WIDTH**-0.5, up=None):
    """What the registered backward takes but for the last three arguments, on the device."""
    qkv, table, pad = [value if value is None else run.put(value.detach()) for value in inputs]
    heads = table.shape[1]
    options = *case[1:], heads, scale
    out, log_sum_exp = run.operator("window_attention")(qkv, table, pad, *options)
    up = torch.randn(out.shape) if up is None else up
    return run.put(up.to(qkv.dtype)), qkv, table, pad, out, log_sum_exp, *options


def backward(run, given, needs=(True, True, True)):
    """The three gradients of the registered backward, on the CPU."""
    return [value.cpu() for value in run.operator("window_attention_backward")(*given, *needs)]


def check(run, inputs, case, **options):
    """All gradients, within the budget of the naive composition."""
    leaves = [suite.exact_leaf(value) for value in inputs]
    heads = options.get("num_heads", HEADS)
    channels = inputs[0].shape[-1] // 3
    assert channels % heads == 0
    weight = suite.random(len(inputs[0]), *case.grid, channels, dtype=inputs[0].dtype)
    got = suite.gradients(attend(run, inputs, case, **options), inputs, weight)
    own = suite.gradients(naive(run, inputs, case, **options), inputs, weight)
    exact = suite.gradients(exactly(leaves, case, **options), leaves, weight)
    for value, *parts in zip(inputs, got, exact, own, strict=True):
        suite.assert_budget(*parts, value.dtype)


@suite.every("window_attention", suite.DTYPES)
@pytest.mark.trap(8)
def test_gradients_over_several_tiles_windows_clips_and_heads(run, dtype):
    check(run, make(TILES, dtype=dtype, grad=True), TILES)


@pytest.mark.slow
@suite.every("window_attention", suite.DTYPES)
@pytest.mark.parametrize("width", HEAD_WIDTHS)
def test_gradients_over_several_tiles_of_every_head_width(width, run, dtype):
    check(run, make(TILES, 3, dtype=dtype, width=width, grad=True), TILES)


@suite.every("window_attention", suite.DTYPES)
@pytest.mark.parametrize("size", [3.0, 10.0])
def test_gradients_where_channels_have_means(size, run, dtype):
    """As a bias leaves them; what a row's rounding adds up to then meets the mean of k and v."""
    qkv, table, pad = make(TILES, 1, dtype=dtype)
    mean = suite.random(3, qkv.shape[-1] // 3, std=size)
    mean[0] = 0
    qkv = (qkv.double() + mean.flatten()).to(dtype)
    check(run, [value.requires_grad_() for value in (qkv, table, pad)], TILES)


@suite.every("window_attention", suite.DTYPES)
def test_weights_sum_to_one_where_scores_are_large(run, dtype):
    """The log-sum-exp of scores of thousands is off by more than a weight is rounded by."""
    case = Case((1, 5, 7), (1, 5, 7), (0, 0, 0))
    q, v = torch.full((1, *case.grid, 16), 60.0), torch.randn(1, *case.grid, 16)
    qkv = torch.cat([q, q, v], -1).to(dtype).requires_grad_()
    table = torch.zeros(9 * 13, 1)
    out = attend(run, (qkv, table, None), case, num_heads=1)
    up = suite.random(*out.shape, dtype=dtype)
    (grad,) = torch.autograd.grad(out, qkv, up)
    # Equal keys have equal weights, and what all queries give to their values is shared out.
    exact = up.double().sum((1, 2, 3), keepdim=True).expand_as(up) / case.tokens
    rounding = torch.finfo(dtype).eps
    torch.testing.assert_close(grad[..., 32:].double(), exact, rtol=2 * rounding, atol=rounding)


@suite.every("window_attention", suite.LOW)
@pytest.mark.parametrize("case", [SEEN, ATTENTION["H and W clamped"]], ids=["padded", "clamped"])
def test_gradients_of_a_bias_table_in_the_dtype_of_qkv(case, run, dtype):
    check(run, make(case, dtype=dtype, table_dtype=dtype, grad=True), case)


@suite.every("window_attention", [torch.float32])
@pytest.mark.parametrize("scale", [0.7, -0.3])
def test_gradients_under_another_scale(scale, run, dtype):
    case = ATTENTION["padded, one axis shifted"]
    check(run, make(case, dtype=dtype, grad=True), case, scale=scale)


@suite.every("window_attention", [torch.float64, *HALVES])
@pytest.mark.trap(1)
@pytest.mark.trap(21)
@pytest.mark.trap(22)
@pytest.mark.parametrize(
    "case",
    [
        SEEN,
        # Height and width clamped, so that the rows are scrambled; depth padded and masked.
        ATTENTION["H and W clamped"],
        Case((7, 5, 4), (4, 6, 7), (2, 1, 2)),
    ],
)
def test_gradients_are_what_each_pair_of_places_adds(case, run, dtype):
    inputs = make(case, batch=1, dtype=dtype, grad=True)
    up = suite.random(1, *case.grid, HEADS * WIDTH, dtype=dtype)
    arrays = [value.detach().double().numpy() for value in (up, *inputs)]
    judged = loops.window_attention_gradients(*arrays[:3], *case[1:], HEADS, arrays[3])
    got = suite.gradients(attend(run, inputs, case), inputs, up)
    own = suite.gradients(naive(run, inputs, case), inputs, up)
    for value, grad, other, exact in zip(inputs, got, own, judged, strict=True):
        if dtype == torch.float64:
            suite.assert_near_loops(grad, exact)
        suite.assert_budget(grad, torch.from_numpy(exact), other, value.dtype)
    # The table alone, as when the rest is frozen; rows without a pair get exact zeros.
    with_table = inputs[0].detach(), inputs[1], inputs[2].detach()
    (alone,) = suite.gradients(attend(run, with_table, case), [inputs[1]], up)
    assert torch.equal(alone, got[1])
    used = torch.zeros(len(alone), dtype=torch.bool)
    used[torch.from_numpy(loops.relative_rows(case.grid, case.window)).unique()] = True
    assert not alone[~used].any()
    assert alone[used].any(-1).all()


@COMPILED
@pytest.mark.trap(21)
def test_the_same_bits_whatever_memory_held_before(run):
    given = operands(run, make(TILES, dtype=torch.float16), TILES)
    first = backward(run, given)
    # From here on, no NaN is written to fresh memory.
    torch.use_deterministic_algorithms(False)
    assert all(torch.isfinite(value).all() for value in first)
    sizes = [1 << power for power in range(5, 18)]
    for value in (math.nan, 3e38):
        rubbish = [torch.full((n,), value, device=run.device) for n in sizes for _ in range(9)]
        # What the next call gets has these numbers in it, and lies elsewhere.
        rubbish.clear()
        given = [each.clone() if isinstance(each, torch.Tensor) else each for each in given]
        assert all(map(torch.equal, first, backward(run, given)))


@COMPILED
@pytest.mark.parametrize("has_pad", [True, False])
def test_every_combination_of_gradients_gives_the_same_bits(has_pad, run):
    qkv, table, pad = make(TILES, 1, dtype=torch.float16, table_dtype=torch.float16)
    given = operands(run, (qkv, table, pad if has_pad else None), TILES)
    every = backward(run, given, (True, True, has_pad))
    assert [value.dtype for value in every] == [torch.float16, torch.float32, torch.float32]
    assert [value.shape for value in every] == [qkv.shape, table.shape, (96 * has_pad,)]
    for needs in NEEDS:
        if needs[2] and not has_pad:
            continue
        for value, whole, is_needed in zip(backward(run, given, needs), every, needs, strict=True):
            assert value.dtype == whole.dtype
            assert torch.equal(value, whole if is_needed else whole.new_empty(0)), needs


@COMPILED
def test_the_same_bits_when_the_graph_is_kept_and_whatever_else_needs_a_gradient(run):
    case = ATTENTION["padded, one axis shifted"]
    inputs = make(case, batch=1, dtype=torch.float32, grad=True)
    result = attend(run, inputs, case)
    up = torch.randn(result.shape)
    first, second = (torch.autograd.grad(result, inputs, up, retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, first, second))
    for wanted in [(False, True, False), (True, False, True)]:
        leaves = [v.detach().requires_grad_(w) for v, w in zip(inputs, wanted, strict=True)]
        attend(run, leaves, case).backward(up)
        for leaf, is_wanted, grad in zip(leaves, wanted, first, strict=True):
            assert leaf.grad is None if not is_wanted else torch.equal(leaf.grad, grad)


@suite.every("window_attention", [torch.float32])
@pytest.mark.trap(7)
@pytest.mark.trap(22)
@pytest.mark.parametrize(
    "case",
    [SEEN, ATTENTION["padded, unshifted"], TILES],
    ids=["masked", "unshifted", "tiles"],
)
def test_gradients_of_pads_in_closed_form(case, run, dtype):
    """Keys of 0 give equal weights among n places that see each other; p pads alone have a value.

    A query then adds p / n of its grad_out to the value of pads, and to their key
    p / n * (1 - p / n) * scale * (grad_out . value) times itself.
    """
    channels = HEADS * WIDTH
    qkv, table, pad = make(case, dtype=dtype)
    qkv[..., channels:], pad[channels : 2 * channels], table = 0, 0, torch.zeros_like(table)
    up = suite.random(2, *case.grid, channels, dtype=dtype)
    query, value = qkv[..., :channels].double(), pad[2 * channels :].double()
    keys, values = torch.zeros(2, HEADS, WIDTH, dtype=torch.float64)
    for places, numbers in zip(loops.windows(*case), loops.regions(*case).tolist(), strict=True):
        for region in set(numbers):
            group = [p for p, number in zip(places, numbers, strict=True) if number == region]
            share = group.count(None) / len(group)
            for token, clip in itertools.product(group, range(2)):
                if token is None:
                    continue
                one = up[(clip, *token)].double()
                values += share * one.view(HEADS, WIDTH)
                along = (one * value).view(HEADS, WIDTH).sum(-1, keepdim=True)
                step = share * (1 - share) * WIDTH**-0.5 * along
                keys += step * query[(clip, *token)].view(HEADS, WIDTH)
    pad.requires_grad_()
    (grad,) = suite.gradients(attend(run, (qkv, table, pad), case), [pad], up)
    assert torch.equal(grad[:channels], torch.zeros_like(grad[:channels]))
    for got, exact in zip(grad[channels:].split(channels), (keys, values), strict=True):
        exact = exact.flatten()
        assert exact.abs().min() > 1e-3
        limit = 1e-5 * exact.abs().max().item()
        torch.testing.assert_close(got.double(), exact, rtol=0, atol=limit)


@COMPILED
@pytest.mark.trap(22)
@pytest.mark.parametrize(
    "case",
    [ATTENTION["exact"], ATTENTION["D clamped"], Case((3, 5, 6), (3, 5, 5), (1, 2, 0))],
)
def test_the_gradient_of_pads_is_for_keys_and_values_and_zero_without_pads(case, run):
    inputs = make(case, batch=1, dtype=torch.float32)
    *_, grad = backward(run, operands(run, inputs, case), (False, False, True))
    assert grad.shape == (96,)
    assert torch.equal(grad[:32], torch.zeros(32))
    # Whom the mask keeps from all tokens gets what is below float32's normal numbers, or nothing.
    is_seen = any(
        {number for token, number in zip(places, numbers, strict=True) if token is None}
        & {number for token, number in zip(places, numbers, strict=True) if token is not None}
        for places, numbers in zip(loops.windows(*case), loops.regions(*case).tolist(), strict=True)
    )
    is_normal = grad[32:].abs() >= torch.finfo(torch.float32).tiny
    assert torch.equal(is_normal, torch.full((64,), is_seen))


def most_held(device, function):
    """Bytes that `function` holds at most, beyond what was held before."""
    gc.collect()
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        function()
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()))
    return max(held, default=0)


@COMPILED
@pytest.mark.parametrize("needs", [(True, True, True), (True, False, False), (False, False, True)])
def test_memory_beyond_the_gradients_is_two_arrays_and_partial_sums(needs, run):
    """Nothing of the size of all scores is ever held, not even in a half precision."""
    if run.kernels == "cpu":
        pytest.skip("it has scratch of each thread in place of these: test_cpu_kernels.py")
    # 16 windows of 126 tokens, padded and masked, and one head of 16 channels.
    case, channels, whole = Case((3, 26, 17), (2, 7, 9), (1, 3, 4)), 16, 128
    qkv = suite.random(1, *case.grid, 3 * channels, dtype=torch.float32)
    table = suite.random(loops.table_rows(case.window), 1, dtype=torch.float32)
    pad = suite.random(3 * channels, dtype=torch.float32)
    given = operands(run, (qkv, table, pad), case)
    if run.device == "cuda":
        backward(run, given, needs)
    operator, grads = run.operator("window_attention_backward"), []
    held = most_held(run.device, lambda: grads.extend(operator(*given, *needs)))
    outputs = sum(value.nbytes for value in grads)
    # The expanded bias and its gradient, then the row sums, then what pads get from each program.
    workspace = (1 + needs[1]) * 4 * case.tokens * whole
    workspace += 2 * 4 * math.prod(case.grid)
    workspace += needs[2] * 1024 * 2 * channels * 4
    scores = case.windows * case.tokens**2 * 4
    assert outputs <= held
    # Allocators round each request up.
    assert held - outputs <= workspace + (8 << 10)
    assert scores > 3 * workspace

    def composition():
        leaves = [run.leaf(value.requires_grad_()) for value in (qkv, table, pad)]
        options = {"window": case.window, "shift": case.shift, "num_heads": 1}
        plain.attention(*leaves[:2], pad_qkv=leaves[2], **options).sum().backward()

    # What does hold them is seen to.
    assert most_held(run.device, composition) > scores
