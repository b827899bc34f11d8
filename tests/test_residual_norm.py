"""residual_norm: the sum in the dtype of the stream, and the LayerNorm of the rounded sum."""

import loops
import operator_suite as suite
import pytest
import torch

from videoswin_kernels import residual_norm

KERNELS = pytest.mark.parametrize("kernels", suite.kernel_sets("residual_norm"))
SHAPES = [(2, 3, 5, 4, 7), (3, 1, 1, 1, 8), (1, 2, 3, 1, 96), (4, 1, 5, 1, 6)]
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


@KERNELS
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("dtype", suite.DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_forward(shape, dtype, scaled, kernels):
    inputs = make(shape, dtype)
    scale = scales(shape, dtype) if scaled else None
    total, norm = residual_norm(*inputs, branch_scale=scale, kernels=kernels)
    exact_total, exact_norm = judged(inputs, scale)
    naive_total, naive_norm = suite.naive_residual_norm(*inputs, branch_scale=scale)
    # One rounding of a float32 sum: with powers of two there is nothing else to round.
    assert total.dtype == dtype
    assert torch.equal(total, naive_total)
    suite.assert_budget(total, exact_total, naive_total, dtype)
    if dtype == torch.float64:
        suite.assert_near_loops(norm, exact_norm.numpy())
    suite.assert_budget(norm, normed(total, *inputs[2:]), naive_norm, dtype)
    assert total.is_contiguous()
    assert norm.is_contiguous()


@KERNELS
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("dtype", suite.DTYPES)
@pytest.mark.parametrize("shape", SHAPES[:2])
def test_gradients(shape, dtype, scaled, kernels):
    inputs = make(shape, dtype, grad=True)
    leaves = [suite.exact_leaf(value) for value in inputs]
    scale = scales(shape, dtype) if scaled else None
    up_total, up_norm = (suite.random(*shape, dtype=dtype) for _ in range(2))

    def grads(outputs, leaves, ups=(up_total, up_norm)):
        ups = [up.to(output.dtype) for up, output in zip(ups, outputs, strict=True)]
        return torch.autograd.grad(outputs, leaves, ups)

    got = grads(residual_norm(*inputs, branch_scale=scale, kernels=kernels), inputs)
    naive = grads(suite.naive_residual_norm(*inputs, branch_scale=scale), inputs)
    wide = None if scale is None else scale.double()
    exact = grads(suite.naive_residual_norm(*leaves, branch_scale=wide), leaves)
    for parts in zip(got, exact, naive, strict=True):
        if dtype == torch.float64:
            torch.testing.assert_close(*parts[:2], rtol=1e-10, atol=1e-10)
        suite.assert_budget(*parts, dtype)


@KERNELS
@pytest.mark.parametrize("which", [0, 1])
def test_gradients_when_one_result_is_not_used(which, kernels):
    inputs = make(SHAPE, torch.float32, grad=True)
    up = suite.random(*SHAPE, dtype=torch.float32)
    for index in (0, 1):
        result = residual_norm(*inputs, kernels=kernels)[which]
        expected = suite.naive_residual_norm(*inputs)[which]
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


@KERNELS
@pytest.mark.parametrize("dtype", suite.LOW)
def test_the_norm_is_of_the_rounded_sum(dtype, kernels):
    # 2048 + a fraction rounds to 2048 everywhere: the norm of that is the bias alone.
    x = torch.full(SHAPE, 2048.0, dtype=dtype)
    branch = (torch.rand(SHAPE) * 0.9).to(dtype)
    weight, bias = torch.ones(7, dtype=dtype), torch.arange(7.0).to(dtype)
    total, norm = residual_norm(x, branch, weight, bias, kernels=kernels)
    assert torch.equal(total, x)
    assert torch.equal(norm, bias.expand(SHAPE))


@KERNELS
@pytest.mark.parametrize("dtype", suite.LOW)
def test_the_scaled_branch_is_not_rounded_before_the_sum(dtype, kernels):
    # s * branch is not exact in the low precision, and the sum cancels all but its last bits.
    branch = suite.random(*SHAPE, dtype=dtype) + 1
    scale = torch.tensor([1 / 0.9, 1 / 0.7], dtype=torch.float32).to(dtype)
    wide = branch.float() * scale.float().view(2, 1, 1, 1, 1)
    x = -wide.to(dtype)
    total, _ = residual_norm(
        x,
        branch,
        torch.ones(7).to(dtype),
        torch.zeros(7).to(dtype),
        branch_scale=scale,
        kernels=kernels,
    )
    exact = x.double() + branch.double() * scale.double().view(2, 1, 1, 1, 1)
    assert exact.abs().max() > 0
    torch.testing.assert_close(total.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-6)


@KERNELS
@pytest.mark.trap(27)
def test_eps_is_inside_the_root_and_1e_minus_5_by_default(kernels):
    x, branch, weight, bias = make(SHAPE, torch.float32)
    inputs = (x * 1e-3, branch * 1e-3, weight, bias)
    total, norm = residual_norm(*inputs, kernels=kernels)
    own = suite.naive_residual_norm(*inputs)[1]
    suite.assert_budget(norm, normed(total, weight, bias), own)
    exact = judged(inputs)[1]
    assert (judged(inputs, eps=1e-6)[1] - exact).abs().max() > 0.1
    _, norm = residual_norm(*inputs, eps=1e-3, kernels=kernels)
    torch.testing.assert_close(norm.double(), judged(inputs, eps=1e-3)[1], rtol=1e-4, atol=1e-6)


@KERNELS
@pytest.mark.parametrize("dtype", suite.LOW)
def test_statistics_are_float32(dtype, kernels):
    x, branch, weight, bias = make((2, 1, 5, 1, 96), dtype)
    x = x + 30
    total, norm = residual_norm(x, branch, weight, bias, kernels=kernels)
    exact = normed(total, weight, bias)
    suite.assert_budget(norm, exact, exact.float().to(dtype))


@KERNELS
@pytest.mark.trap(32)
def test_every_layout(kernels):
    inputs = make(SHAPE, torch.float32)
    expected = suite.naive_residual_norm(*inputs)
    exact = normed(expected[0], *inputs[2:])
    scale = torch.full((4,), 1.0)[::2]
    for x, branch in [*zip(*map(lambda v: suite.layouts(v).values(), inputs[:2]), strict=True)]:
        for pair in ((x, inputs[1]), (inputs[0], branch), (x, branch)):
            total, norm = residual_norm(*pair, *inputs[2:], branch_scale=scale, kernels=kernels)
            assert torch.equal(total, expected[0])
            suite.assert_budget(norm, exact, expected[1])


@KERNELS
def test_broadcast_of_one_token_is_an_input_like_any_other(kernels):
    x, branch, weight, bias = make((2, 1, 4, 3, 6), torch.float32)
    flat = branch[:1, :, :1, :1].expand(2, 1, 4, 3, 6)
    total, norm = residual_norm(x, flat, weight, bias, kernels=kernels)
    expected = residual_norm(x, flat.contiguous(), weight, bias, kernels=kernels)
    assert torch.equal(total, expected[0])
    assert torch.equal(norm, expected[1])


@KERNELS
@pytest.mark.parametrize("scaled", [False, True])
def test_empty_batch(scaled, kernels):
    inputs = make((0, 2, 3, 4, 5), torch.float32, grad=True)
    scale = torch.ones(0) if scaled else None
    total, norm = residual_norm(*inputs, branch_scale=scale, kernels=kernels)
    assert total.shape == norm.shape == (0, 2, 3, 4, 5)
    grads = torch.autograd.grad((total + norm).sum(), inputs)
    for value, grad in zip(inputs, grads, strict=True):
        assert torch.equal(grad, torch.zeros_like(value))


@KERNELS
def test_more_than_65535_rows(kernels):
    inputs = make((1, 1, 257, 256, 2), torch.float32)
    total, norm = residual_norm(*inputs, kernels=kernels)
    expected = suite.naive_residual_norm(*inputs)
    assert torch.equal(total, expected[0])
    suite.assert_budget(norm, normed(total, *inputs[2:]), expected[1])


@KERNELS
@pytest.mark.parametrize("low", suite.LOW)
@pytest.mark.parametrize("branch", ["float32", "low"])
@pytest.mark.parametrize("stream", ["float32", "low"])
def test_autocast_keeps_the_stream_and_lowers_the_norm(stream, branch, low, kernels):
    kinds = {"float32": torch.float32, "low": low}
    inputs = make(SHAPE, kinds[stream], kinds[branch], torch.float32, grad=True)
    with torch.autocast("cpu", low):
        total, norm = residual_norm(*inputs, kernels=kernels)
    assert total.dtype == kinds[stream]
    summed = inputs[0].float() + inputs[1].float()
    assert torch.equal(total, summed.to(kinds[stream]))
    # Eager: a float32 norm, that the next linear layer casts.
    eager = torch.nn.functional.layer_norm(total.float(), (7,), inputs[2], inputs[3]).to(low)
    suite.assert_budget(norm, normed(total, *inputs[2:]), eager, low)
    grads = torch.autograd.grad((total.float() + norm.float().sin()).sum(), inputs)
    for value, grad in zip(inputs, grads, strict=True):
        assert grad.dtype == value.dtype
        assert torch.isfinite(grad).all()


@KERNELS
def test_a_low_branch_on_a_float32_stream_without_autocast(kernels):
    inputs = make(SHAPE, torch.float32, torch.bfloat16, grad=True)
    total, norm = residual_norm(*inputs, kernels=kernels)
    assert total.dtype == norm.dtype == torch.float32
    assert torch.equal(total, inputs[0] + inputs[1].float())
    grad_x, grad_branch = torch.autograd.grad((total * total).sum() + norm.sum(), inputs[:2])
    assert grad_branch.dtype == torch.bfloat16
    assert torch.equal(grad_branch, grad_x.to(torch.bfloat16))


@KERNELS
def test_a_scale_of_zero_drops_the_branch_even_in_the_gradient(kernels):
    inputs = make(SHAPE, torch.float32, grad=True)
    scale = torch.tensor([0.0, 2.0])
    total, norm = residual_norm(*inputs, branch_scale=scale, kernels=kernels)
    assert torch.equal(total[0], inputs[0][0])
    (grad,) = torch.autograd.grad((total.sin() + norm.sin()).sum(), inputs[1])
    assert not grad[0].any()
    assert grad[1].any()


@KERNELS
@pytest.mark.parametrize("scaled", [False, True])
def test_compiles_to_one_graph_for_all_batch_sizes(scaled, kernels):
    _, _, weight, bias = make(SHAPE, torch.float32, grad=True)

    def function(x, branch, weight, bias):
        scale = x.detach()[:, 0, 0, 0, 0].sign() if scaled else None
        return residual_norm(x, branch, weight, bias, branch_scale=scale, kernels=kernels)

    def make_inputs(batch):
        x, branch, _, _ = make((batch, *SHAPE[1:]), torch.float32, grad=True)
        return [x, branch, weight, bias]

    suite.assert_compiles(function, make_inputs, exact=False)


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
