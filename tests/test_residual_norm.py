"""residual_norm: the sum in the dtype of the stream, and the LayerNorm of the rounded sum."""

import loops
import operator_suite as suite
import plain
import pytest
import torch

from videoswin_kernels import residual_norm
from videoswin_kernels.testing import NORM as SHAPES

EVERY = suite.every("residual_norm")
SHAPE = SHAPES[0]
# Masks over the probability of keeping, as stochastic depth brings them: powers of two.
SCALES = {1: [2.0], 2: [2.0, 0.0], 3: [0.0, 1.0, 4.0], 4: [1.0, 0.0, 2.0, 0.5], 5: [2.0] * 5}


def make(shape, dtype=torch.float64, branch=None, weights=None, grad=False):
    """(x, branch, weight, bias)."""
    x = suite.random(*shape, dtype=dtype, grad=grad)
    other = suite.random(*shape, dtype=branch or dtype, grad=grad)
    weight, bias = (suite.random(shape[-1], dtype=weights or dtype, grad=grad) for _ in range(2))
    return x, other, weight, bias


def scales(shape, dtype):
    """branch_scale of the shape."""
    return torch.tensor(SCALES[shape[0]], dtype=dtype)


def judged(inputs, scale=None, **options):
    """The float64 result of the loops."""
    arrays = [value.detach().double().numpy() for value in inputs]
    scale = None if scale is None else scale.tolist()
    results = loops.residual_norm(*arrays, branch_scale=scale, **options)
    return [torch.from_numpy(result) for result in results]


def normed(total, weight, bias):
    """Float64 LayerNorm of a rounded sum."""
    leaves = [value.detach().double() for value in (weight, bias)]
    return torch.nn.functional.layer_norm(total.detach().double(), weight.shape, *leaves)


@suite.every("residual_norm", suite.DTYPES)
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_forward(shape, scaled, run, dtype):
    inputs = make(shape, dtype)
    scale = scales(shape, dtype) if scaled else None
    total, norm = run(residual_norm, *inputs, branch_scale=scale)
    exact_total, exact_norm = judged(inputs, scale)
    naive_total, naive_norm = run.plain(plain.residual_norm, *inputs, branch_scale=scale)
    # One rounding of a float32 sum: with powers of two there is nothing else to round.
    assert total.dtype == dtype
    assert torch.equal(total, naive_total)
    suite.assert_budget(total, exact_total, naive_total, dtype)
    if dtype == torch.float64:
        suite.assert_near_loops(norm, exact_norm.numpy())
    suite.assert_budget(norm, normed(total, *inputs[2:]), naive_norm, dtype)
    assert total.is_contiguous()
    assert norm.is_contiguous()


@suite.every("residual_norm", suite.DTYPES)
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("shape", SHAPES[:2])
def test_gradients(shape, scaled, run, dtype):
    inputs = make(shape, dtype, grad=True)
    leaves = [suite.exact_leaf(value) for value in inputs]
    scale = scales(shape, dtype) if scaled else None
    up_total, up_norm = (suite.random(*shape, dtype=dtype) for _ in range(2))

    def grads(outputs, leaves, ups=(up_total, up_norm)):
        ups = [up.to(output.dtype) for up, output in zip(ups, outputs, strict=True)]
        return torch.autograd.grad(outputs, leaves, ups)

    got = grads(run(residual_norm, *inputs, branch_scale=scale), inputs)
    naive = grads(run.plain(plain.residual_norm, *inputs, branch_scale=scale), inputs)
    wide = None if scale is None else scale.double()
    exact = grads(plain.residual_norm(*leaves, branch_scale=wide), leaves)
    for parts in zip(got, exact, naive, strict=True):
        if dtype == torch.float64:
            torch.testing.assert_close(*parts[:2], rtol=1e-10, atol=1e-10)
        suite.assert_budget(*parts, dtype)


@EVERY
@pytest.mark.parametrize("which", [0, 1])
def test_gradients_when_one_result_is_not_used(which, run):
    inputs = make(SHAPE, torch.float32, grad=True)
    up = suite.random(*SHAPE, dtype=torch.float32)
    for index in (0, 1):
        result = run(residual_norm, *inputs)[which]
        expected = plain.residual_norm(*inputs)[which]
        (got,) = torch.autograd.grad(result, inputs[index], up)
        (wanted,) = torch.autograd.grad(expected, inputs[index], up)
        torch.testing.assert_close(got, wanted)


def test_gradcheck():
    inputs = make((2, 1, 2, 1, 3), grad=True)
    scale = torch.tensor([0.5, 2.0], dtype=torch.float64)
    assert torch.autograd.gradcheck(residual_norm, inputs)
    assert torch.autograd.gradcheck(
        lambda *leaves: residual_norm(*leaves, branch_scale=scale), inputs
    )


@EVERY
def test_weight_and_bias_get_no_gradient_where_only_the_sum_is_used(run):
    x, branch, weight, bias = make(SHAPE, torch.float32, grad=True)
    total, _ = run(residual_norm, x, branch, weight, bias)
    grads = torch.autograd.grad(total.sum(), [x, weight, bias], allow_unused=True)
    assert [grad is None for grad in grads] == [False, True, True]


@EVERY
def test_gradients_of_x_and_branch_are_equal_and_not_one_memory(run):
    x, branch, weight, bias = make(SHAPE, torch.float32, grad=True)
    total, norm = run(residual_norm, x, branch, weight, bias)
    (total.sin().sum() + norm.cos().sum()).backward()
    assert torch.equal(x.grad, branch.grad)
    before = branch.grad.clone()
    x.grad.zero_()
    assert torch.equal(branch.grad, before)


@suite.every("residual_norm", suite.LOW)
def test_the_norm_is_of_the_rounded_sum(run, dtype):
    # 2048 + a fraction rounds to 2048 everywhere: the norm of that is the bias alone.
    x = torch.full(SHAPE, 2048.0, dtype=dtype)
    branch = (torch.rand(SHAPE) * 0.9).to(dtype)
    weight, bias = torch.ones(7, dtype=dtype), torch.arange(7.0).to(dtype)
    total, norm = run(residual_norm, x, branch, weight, bias)
    assert torch.equal(total, x)
    assert torch.equal(norm, bias.expand(SHAPE))


@suite.every("residual_norm", suite.LOW)
def test_the_scaled_branch_is_not_rounded_before_the_sum(run, dtype):
    # s * branch is not exact in the low precision, and the sum cancels all but its last bits.
    branch = suite.random(*SHAPE, dtype=dtype) + 1
    scale = torch.tensor([1 / 0.9, 1 / 0.7], dtype=torch.float32).to(dtype)
    wide = branch.float() * scale.float().view(2, 1, 1, 1, 1)
    x = -wide.to(dtype)
    total, _ = run(
        residual_norm,
        x,
        branch,
        torch.ones(7).to(dtype),
        torch.zeros(7).to(dtype),
        branch_scale=scale,
    )
    exact = x.double() + branch.double() * scale.double().view(2, 1, 1, 1, 1)
    assert exact.abs().max() > 0
    torch.testing.assert_close(total.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-6)


@EVERY
@pytest.mark.trap(27)
def test_eps_is_inside_the_root_and_1e_minus_5_by_default(run):
    x, branch, weight, bias = make(SHAPE, torch.float32)
    inputs = (x * 1e-3, branch * 1e-3, weight, bias)
    total, norm = run(residual_norm, *inputs)
    own = run.plain(plain.residual_norm, *inputs)[1]
    suite.assert_budget(norm, normed(total, weight, bias), own)
    exact = judged(inputs)[1]
    assert (judged(inputs, eps=1e-6)[1] - exact).abs().max() > 0.1
    _, norm = run(residual_norm, *inputs, eps=1e-3)
    torch.testing.assert_close(norm.double(), judged(inputs, eps=1e-3)[1], rtol=1e-4, atol=1e-6)


@suite.every("residual_norm", suite.LOW)
def test_statistics_are_float32(run, dtype):
    x, branch, weight, bias = make((2, 1, 5, 1, 96), dtype)
    x = x + 30
    total, norm = run(residual_norm, x, branch, weight, bias)
    exact = normed(total, weight, bias)
    suite.assert_budget(norm, exact, exact.float().to(dtype))


@EVERY
@pytest.mark.trap(32)
def test_every_layout(run):
    inputs = make(SHAPE, torch.float32)
    expected = run.plain(plain.residual_norm, *inputs)
    exact = normed(expected[0], *inputs[2:])
    scale = run.put(torch.full((4,), 1.0))[::2]
    near = [run.put(value) for value in inputs[:2]]
    views = [suite.layouts(value).values() for value in near]
    for x, branch in zip(*views, strict=True):
        for pair in ((x, near[1]), (near[0], branch), (x, branch)):
            total, norm = run(residual_norm, *pair, *inputs[2:], branch_scale=scale)
            assert torch.equal(total, expected[0])
            suite.assert_budget(norm, exact, expected[1])


@EVERY
@pytest.mark.trap(32)
def test_gradients_of_every_layout(run):
    inputs = make(SHAPE, torch.float32, grad=True)
    ups = [suite.random(*SHAPE, dtype=torch.float32) for _ in range(2)]
    expected = torch.autograd.grad(plain.residual_norm(*inputs), inputs, ups)
    leaves = [run.leaf(value) for value in inputs]
    results = residual_norm(*leaves, kernels=run.kernels)
    views = [suite.layouts(run.put(up)).values() for up in ups]
    for pair in zip(*views, strict=True):
        got = torch.autograd.grad(results, leaves, pair, retain_graph=True)
        for value, other in zip(got, expected, strict=True):
            torch.testing.assert_close(value.cpu(), other, rtol=1e-4, atol=1e-5)
    # What `sum` sends back: one number, with strides of 0.
    got = torch.autograd.grad(sum(r.sum() for r in results), leaves, retain_graph=True)
    expected = torch.autograd.grad(results, leaves, [torch.ones_like(r) for r in results])
    assert all(map(torch.equal, got, expected))


@suite.every("residual_norm", [torch.float32, torch.float16])
@pytest.mark.trap(8)
@pytest.mark.parametrize("channels", [3, 33, 384, 1030])
def test_rows_that_are_no_whole_number_of_tiles(channels, run, dtype):
    inputs = make((1, 1, 3, 1, channels), dtype, grad=True)
    leaves = [suite.exact_leaf(value) for value in inputs]
    results = run(residual_norm, *inputs)
    naive = run.plain(plain.residual_norm, *inputs)
    assert torch.equal(results[0], naive[0])
    suite.assert_budget(results[1], normed(results[0], *inputs[2:]), naive[1], dtype)
    ups = [suite.random(1, 1, 3, 1, channels, dtype=dtype) for _ in range(2)]
    got, own = (torch.autograd.grad(values, inputs, ups) for values in (results, naive))
    exact = torch.autograd.grad(plain.residual_norm(*leaves), leaves, [up.double() for up in ups])
    for parts in zip(got, exact, own, strict=True):
        suite.assert_budget(*parts, dtype)


@EVERY
@pytest.mark.parametrize("axis", [0, 2])
def test_offsets_beyond_2_31(axis, run, far):
    inputs = make((2, 1, 2, 3, 8), torch.float16)
    near = run(residual_norm, *inputs)
    for index in (0, 1):
        spread = [*inputs]
        spread[index] = far(run.put(inputs[index]), axis)
        assert all(map(torch.equal, run(residual_norm, *spread), near)), index


@EVERY
def test_gradients_with_offsets_beyond_2_31(run, far):
    leaves = [run.leaf(value) for value in make((2, 1, 2, 3, 8), torch.float16, grad=True)]
    results = residual_norm(*leaves, kernels=run.kernels)
    ups = [run.put(suite.random(2, 1, 2, 3, 8, dtype=torch.float16)) for _ in range(2)]
    near = torch.autograd.grad(results, leaves, ups, retain_graph=True)
    for pair in ([far(ups[0]), ups[1]], [ups[0], far(ups[1])]):
        got = torch.autograd.grad(results, leaves, pair, retain_graph=True)
        assert all(map(torch.equal, got, near))


@EVERY
def test_broadcast_of_one_token_is_an_input_like_any_other(run):
    x, branch, weight, bias = make((2, 1, 4, 3, 6), torch.float32)
    flat = run.put(branch)[:1, :, :1, :1].expand(2, 1, 4, 3, 6)
    total, norm = run(residual_norm, x, flat, weight, bias)
    expected = run(residual_norm, x, flat.contiguous(), weight, bias)
    assert torch.equal(total, expected[0])
    assert torch.equal(norm, expected[1])


@EVERY
@pytest.mark.parametrize("scaled", [False, True])
def test_empty_batch(scaled, run):
    inputs = make((0, 2, 3, 4, 5), torch.float32, grad=True)
    scale = torch.ones(0) if scaled else None
    total, norm = run(residual_norm, *inputs, branch_scale=scale)
    assert total.shape == norm.shape == (0, 2, 3, 4, 5)
    grads = torch.autograd.grad((total + norm).sum(), inputs)
    for value, grad in zip(inputs, grads, strict=True):
        assert torch.equal(grad, torch.zeros_like(value))


@EVERY
def test_more_than_65535_rows(run):
    inputs = make((1, 1, 257, 256, 2), torch.float32)
    total, norm = run(residual_norm, *inputs)
    expected = run.plain(plain.residual_norm, *inputs)
    assert torch.equal(total, expected[0])
    suite.assert_budget(norm, normed(total, *inputs[2:]), expected[1])


@suite.every("residual_norm", suite.LOW)
@pytest.mark.parametrize("branch", ["float32", "low"])
@pytest.mark.parametrize("stream", ["float32", "low"])
def test_autocast_keeps_the_stream_and_lowers_the_norm(stream, branch, run, dtype):
    kinds = {"float32": torch.float32, "low": dtype}
    inputs = make(SHAPE, kinds[stream], kinds[branch], torch.float32, grad=True)
    with torch.autocast(run.device, dtype):
        total, norm = run(residual_norm, *inputs)
    assert total.dtype == kinds[stream]
    summed = inputs[0].float() + inputs[1].float()
    assert torch.equal(total, summed.to(kinds[stream]))
    # Eager: a float32 norm, that the next linear layer casts.
    eager = torch.nn.functional.layer_norm(total.float(), (7,), inputs[2], inputs[3])
    suite.assert_budget(norm, normed(total, *inputs[2:]), eager.to(dtype), dtype)
    grads = torch.autograd.grad((total.float() + norm.float().sin()).sum(), inputs)
    for value, grad in zip(inputs, grads, strict=True):
        assert grad.dtype == value.dtype
        assert torch.isfinite(grad).all()


@suite.every("residual_norm", suite.LOW)
def test_a_low_branch_on_a_float32_stream_without_autocast(run, dtype):
    inputs = make(SHAPE, torch.float32, dtype, grad=True)
    total, norm = run(residual_norm, *inputs)
    assert total.dtype == norm.dtype == torch.float32
    assert torch.equal(total, inputs[0] + inputs[1].float())
    grad_x, grad_branch = torch.autograd.grad((total * total).sum() + norm.sum(), inputs[:2])
    assert grad_branch.dtype == dtype
    assert torch.equal(grad_branch, grad_x.to(dtype))


@EVERY
def test_a_scale_of_zero_drops_the_branch_even_in_the_gradient(run):
    inputs = make(SHAPE, torch.float32, grad=True)
    scale = torch.tensor([0.0, 2.0])
    total, norm = run(residual_norm, *inputs, branch_scale=scale)
    assert torch.equal(total[0], inputs[0][0])
    (grad,) = torch.autograd.grad((total.sin() + norm.sin()).sum(), inputs[1])
    assert not grad[0].any()
    assert grad[1].any()


@EVERY
@pytest.mark.parametrize("scaled", [False, True])
def test_compiles_to_one_graph_for_all_batch_sizes(scaled, run):
    _, _, weight, bias = make(SHAPE, torch.float32, grad=True)

    def function(x, branch, weight, bias):
        scale = x.detach()[:, 0, 0, 0, 0].sign() if scaled else None
        return residual_norm(x, branch, weight, bias, branch_scale=scale, kernels=run.kernels)

    def make_inputs(batch):
        x, branch, _, _ = make((batch, *SHAPE[1:]), torch.float32, grad=True)
        return [x, branch, weight, bias]

    suite.assert_compiles(run, function, make_inputs, exact=False)


@pytest.mark.parametrize(
    ("argument", "value", "said"),
    [
        ("x", torch.zeros(2, 3, 1, 1, 4, dtype=torch.int64), torch.int64),
        ("x", [1.0], "list"),
        ("branch", torch.zeros(2, 3, 1, 1, 5), (2, 3, 1, 1, 5)),
        ("branch", torch.zeros(2, 1, 1, 1, 4), (2, 1, 1, 1, 4)),
        ("branch", torch.zeros(2, 3, 1, 1, 4, device="meta"), "meta"),
        ("branch", None, "NoneType"),
        ("weight", torch.ones(3), (3,)),
        ("weight", torch.ones(1, 4), (1, 4)),
        ("weight", None, "NoneType"),
        ("bias", torch.ones(5), (5,)),
        ("bias", torch.ones(4, device="meta"), "meta"),
        ("branch_scale", torch.ones(3), (3,)),
        ("branch_scale", torch.ones(2, 1), (2, 1)),
        ("branch_scale", 0.5, "float"),
        ("eps", -1e-5, -1e-5),
        ("eps", None, None),
        ("kernels", "apex", "apex"),
    ],
)
def test_refusals(argument, value, said):
    arguments = {"x": torch.zeros(2, 3, 1, 1, 4), "branch": torch.zeros(2, 3, 1, 1, 4)}
    arguments |= {"weight": torch.ones(4), "bias": torch.zeros(4)}
    with suite.refuses("residual_norm", argument, said):
        residual_norm(**{**arguments, argument: value})
