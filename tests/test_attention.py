"""window_attention: the seven questions, autocast and the refusals."""

import loops
import numpy as np
import operator_suite as suite
import pytest
import torch

from videoswin_kernels import window_attention

KERNELS = pytest.mark.parametrize("kernels", suite.kernel_sets("window_attention"))
CASES = {
    "exact": ((4, 6, 6), (2, 3, 3), (1, 1, 1)),
    "unshifted": ((4, 6, 6), (2, 3, 3), (0, 0, 0)),
    "padded": ((5, 4, 7), (2, 3, 3), (1, 1, 1)),
    "padded, one axis shifted": ((3, 5, 4), (2, 3, 3), (0, 2, 0)),
    "D clamped": ((2, 4, 5), (4, 3, 2), (2, 1, 1)),
    "H and W clamped": ((5, 2, 3), (2, 3, 4), (1, 1, 2)),
    "all clamped": ((2, 2, 2), (2, 3, 3), (1, 1, 1)),
    "one token": ((1, 1, 1), (2, 3, 3), (1, 1, 1)),
    "one token a window": ((3, 2, 4), (1, 1, 1), (0, 0, 0)),
}
CASE = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
PADDED = CASES["padded"]
CLAMPED = CASES["H and W clamped"]
HEADS, WIDTH = 2, 8


def make(case, batch=2, dtype=torch.float64, table_dtype=torch.float32, grad=False, std=1.0):
    """(qkv, bias_table, pad_qkv) of the case, leaves if they shall have gradients."""
    grid, window, _ = case
    if dtype == torch.float64:
        table_dtype = torch.float64
    qkv = suite.random(batch, *grid, 3 * HEADS * WIDTH, dtype=dtype, grad=grad)
    table = suite.random(loops.table_rows(window), HEADS, dtype=table_dtype, std=std, grad=grad)
    return qkv, table, suite.random(3 * HEADS * WIDTH, dtype=dtype, grad=grad)


def attend(inputs, case, function=window_attention, **options):
    """The operator, or the naive function, on (qkv, bias_table, pad_qkv)."""
    qkv, table, pad = inputs
    options = {"num_heads": HEADS, "window": case[1], "shift": case[2], "pad_qkv": pad} | options
    return function(qkv, table, **options)


def judged(inputs, case, **options):
    """The float64 result of the loops."""
    qkv, table, pad = [None if t is None else t.detach().double().numpy() for t in inputs]
    return loops.window_attention(qkv, table, case[1], case[2], HEADS, pad, **options)


@KERNELS
@pytest.mark.parametrize("dtype", suite.DTYPES)
@CASE
def test_forward(case, dtype, kernels):
    inputs = make(case, dtype=dtype)
    result = attend(inputs, case, kernels=kernels)
    assert result.is_contiguous()
    exact = judged(inputs, case)
    if dtype == torch.float64:
        suite.assert_near_loops(result, exact)
    naive = attend(inputs, case, suite.naive_attention)
    suite.assert_budget(result, torch.from_numpy(exact), naive, dtype)


@KERNELS
@CASE
def test_torchvision_computes_the_same(case, kernels):
    """A second judge beside the loops, that shares no line with them."""
    swin = pytest.importorskip("torchvision.models.video.swin_transformer")
    grid, window, shift = case
    theirs = swin.ShiftedWindowAttention3d(HEADS * WIDTH, [*window], [*shift], HEADS).eval()
    table = theirs.relative_position_bias_table.data
    torch.nn.init.normal_(table)
    torch.nn.init.normal_(theirs.qkv.bias)
    torch.nn.init.eye_(theirs.proj.weight)
    torch.nn.init.zeros_(theirs.proj.bias)
    x = suite.random(2, *grid, HEADS * WIDTH, dtype=torch.float32)
    with torch.no_grad():
        inputs = theirs.qkv(x), table, theirs.qkv.bias
        torch.testing.assert_close(attend(inputs, case, kernels=kernels), theirs(x))


@KERNELS
@pytest.mark.parametrize("dtype", suite.LOW)
@pytest.mark.parametrize("case", [PADDED, CLAMPED])
def test_a_bias_table_in_the_dtype_of_qkv(case, dtype, kernels):
    inputs = make(case, dtype=dtype, table_dtype=dtype, grad=True)
    result = attend(inputs, case, kernels=kernels)
    naive = attend(inputs, case, suite.naive_attention)
    suite.assert_budget(result, torch.from_numpy(judged(inputs, case)), naive, dtype)
    grads = suite.gradients(result, inputs, torch.ones_like(result))
    assert [g.dtype for g in grads] == [dtype] * 3


@KERNELS
@pytest.mark.parametrize("dtype", suite.DTYPES)
@CASE
def test_gradients(case, dtype, kernels):
    inputs = make(case, dtype=dtype, grad=True)
    leaves = [suite.exact_leaf(value) for value in inputs]
    weight = suite.random(2, *case[0], HEADS * WIDTH, dtype=dtype)
    got = suite.gradients(attend(inputs, case, kernels=kernels), inputs, weight)
    naive = suite.gradients(attend(inputs, case, suite.naive_attention), inputs, weight)
    exact = suite.gradients(attend(leaves, case, suite.naive_attention), leaves, weight)
    for index, value in enumerate(inputs):
        if dtype == torch.float64:
            torch.testing.assert_close(got[index], exact[index], rtol=1e-11, atol=1e-11)
        suite.assert_budget(got[index], exact[index], naive[index], value.dtype)


@pytest.mark.parametrize(
    "case", [((2, 3, 2), (1, 2, 2), (0, 1, 1)), ((2, 1, 2), (2, 2, 2), (0,) * 3)]
)
def test_gradcheck(case):
    inputs = [value.detach() for value in make(case, batch=1)]
    small = [inputs[0][..., :6].clone(), inputs[1][:, :1].clone(), inputs[2][:6].clone()]
    for value in small:
        value.requires_grad_()
    assert torch.autograd.gradcheck(lambda *leaves: attend(leaves, case, num_heads=1), small)


@KERNELS
@pytest.mark.trap(32)
def test_every_layout(kernels):
    inputs = make(PADDED, dtype=torch.float32)
    exact = torch.from_numpy(judged(inputs, PADDED))
    naive = attend(inputs, PADDED, suite.naive_attention)
    for view in suite.layouts(inputs[0]).values():
        result = attend((view, *inputs[1:]), PADDED, kernels=kernels)
        assert result.is_contiguous()
        suite.assert_budget(result, exact, naive)
    table = inputs[1].t().contiguous().t()
    pad = torch.stack([inputs[2], inputs[2]], -1)[:, 1]
    suite.assert_budget(attend((inputs[0], table, pad), PADDED, kernels=kernels), exact, naive)


@KERNELS
@pytest.mark.trap(32)
def test_gradients_of_a_channels_first_stage(kernels):
    clip = suite.random(2, 3 * HEADS * WIDTH, *PADDED[0], dtype=torch.float32, grad=True)
    _, table, pad = make(PADDED, dtype=torch.float32)
    weight = suite.random(2, HEADS * WIDTH, *PADDED[0], dtype=torch.float32)
    grads = []
    for function, options in (
        (window_attention, {"kernels": kernels}),
        (suite.naive_attention, {}),
    ):
        result = attend((clip.movedim(1, -1), table, pad), PADDED, function, **options)
        grads += suite.gradients(result.movedim(-1, 1), [clip], weight)
    torch.testing.assert_close(*grads)


@KERNELS
@pytest.mark.parametrize("case", [PADDED, CLAMPED])
def test_empty_batch(case, kernels):
    inputs = make(case, batch=0, dtype=torch.float32, grad=True)
    result = attend(inputs, case, kernels=kernels)
    assert result.shape == (0, *case[0], HEADS * WIDTH)
    for value, grad in zip(inputs, torch.autograd.grad(result.sum(), inputs), strict=True):
        assert torch.equal(grad, torch.zeros_like(value))


@KERNELS
def test_more_than_65535_windows_of_one_token(kernels):
    qkv = suite.random(1, 1, 257, 256, 48, dtype=torch.float32, grad=True)
    table = torch.ones(1, 1, requires_grad=True)
    result = window_attention(qkv, table, window=(1, 1, 1), num_heads=1, kernels=kernels)
    assert torch.equal(result, qkv[..., 32:])
    weight = suite.random(*result.shape, dtype=torch.float32)
    grad_qkv, grad_table = suite.gradients(result, [qkv, table], weight)
    assert torch.equal(grad_qkv[..., 32:], weight)
    # One key has probability 1 whatever its score.
    assert not grad_qkv[..., :32].any()
    assert not grad_table.any()


@KERNELS
@pytest.mark.parametrize("dtype", suite.LOW)
def test_autocast_is_eager_autocast(dtype, kernels):
    inputs = make(PADDED, dtype=torch.float32, grad=True)
    leaves = [suite.exact_leaf(value) for value in inputs]
    weight = suite.random(2, *PADDED[0], HEADS * WIDTH, dtype=torch.float32)
    with torch.autocast("cpu", dtype):
        result = attend(inputs, PADDED, kernels=kernels)
        # In eager code the projection under autocast has given qkv in the low precision.
        low = (inputs[0].to(dtype), inputs[1], inputs[2].to(dtype))
        eager = attend(low, PADDED, suite.naive_attention)
    exact = attend(leaves, PADDED, suite.naive_attention)
    suite.assert_budget(result, exact, eager, dtype)
    got = suite.gradients(result, inputs, weight)
    naive = suite.gradients(eager, inputs, weight)
    for parts in zip(got, suite.gradients(exact, leaves, weight), naive, strict=True):
        suite.assert_budget(*parts, torch.float32)


@KERNELS
def test_autocast_keeps_the_bias_table_and_float64(kernels):
    # Two keys whose biases bfloat16 cannot tell apart: a rounded table gives equal weights.
    qkv = torch.zeros(1, 1, 1, 2, 12)
    qkv[0, 0, 0, :, 8:] = torch.tensor([0.0, 1.0])[:, None]
    table = torch.tensor([[16.05], [16.0], [16.0]])
    with torch.autocast("cpu", torch.bfloat16):
        result = window_attention(qkv, table, window=(1, 1, 2), num_heads=1, kernels=kernels)
        wide = window_attention(qkv.double(), table.double(), window=(1, 1, 2), num_heads=1)
    assert result.dtype == torch.bfloat16
    # Query 0 reads key 1 by row 0, and sigmoid(0.05) is 0.512; query 1 has equal biases.
    assert result[0, 0, 0, 0, 0].item() > 0.51
    assert result[0, 0, 0, 1, 0] == 0.5
    assert wide.dtype == torch.float64


@KERNELS
def test_autocast_casts_another_low_precision(kernels):
    inputs = make(PADDED, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.float16):
        assert attend(inputs, PADDED, kernels=kernels).dtype == torch.float16


@KERNELS
@pytest.mark.parametrize("case", [PADDED, CASES["all clamped"]])
def test_compiles_to_one_graph_for_all_batch_sizes(case, kernels):
    _, table, pad = make(case, dtype=torch.float32, grad=True)
    suite.assert_compiles(
        lambda *inputs: attend(inputs, case, kernels=kernels),
        lambda batch: [make(case, batch, dtype=torch.float32, grad=True)[0], table, pad],
        exact=False,
    )


@KERNELS
def test_scale_of_none_and_zero_is_the_inverse_root_of_the_head_width(kernels):
    inputs = make(PADDED, dtype=torch.float32)
    default = attend(inputs, PADDED, kernels=kernels)
    for scale in (None, 0, 0.0, WIDTH**-0.5):
        assert torch.equal(attend(inputs, PADDED, scale=scale, kernels=kernels), default)
    exact = torch.from_numpy(judged(inputs, PADDED, scale=0.7))
    naive = attend(inputs, PADDED, suite.naive_attention, scale=0.7)
    suite.assert_budget(attend(inputs, PADDED, scale=0.7, kernels=kernels), exact, naive)
    assert (exact - default).abs().max() > 0.1


def test_dropout_drops_probabilities_and_scales_the_others():
    qkv = torch.zeros(2, 4, 6, 6, 3 * 16)
    qkv[..., 32:] = 1
    qkv.requires_grad_()
    table, options = torch.zeros(75, 2), {"window": (2, 3, 3), "num_heads": 2}
    torch.manual_seed(1)
    first = window_attention(qkv, table, dropout=0.25, **options)
    second = window_attention(qkv, table, dropout=0.25, **options)
    torch.manual_seed(1)
    assert torch.equal(window_attention(qkv, table, dropout=0.25, **options), first)
    assert not torch.equal(first, second)
    # Uniform weights: what a query receives is the number of keys it kept / N / keep.
    kept = first * 18 * 0.75
    torch.testing.assert_close(kept, kept.round(), atol=1e-3, rtol=0)
    assert first.mean().item() == pytest.approx(1, abs=0.05)
    # The same draw in the backward: all the weight given out by queries arrives at values.
    (grad_qkv,) = torch.autograd.grad(first.sum(), qkv)
    torch.testing.assert_close(grad_qkv[..., 32:].sum(), first.sum().detach())
    without = window_attention(qkv, table, dropout=0.0, **options)
    torch.testing.assert_close(without, torch.ones_like(without))


@pytest.mark.parametrize(
    ("argument", "value", "said"),
    [
        ("qkv", torch.zeros(4, 6, 6, 24), (4, 6, 6, 24)),
        ("qkv", torch.zeros(1, 4, 6, 6, 24, dtype=torch.int64), torch.int64),
        ("qkv", None, "NoneType"),
        ("qkv|num_heads", torch.zeros(1, 4, 6, 6, 26), 26),
        ("qkv|num_heads", torch.zeros(1, 4, 6, 6, 9), 9),
        ("num_heads", 0, 0),
        ("num_heads", -2, -2),
        ("num_heads", 2.0, 2.0),
        ("num_heads", True, True),
        ("num_heads", None, None),
        ("bias_table", torch.zeros(25, 2), (25, 2)),
        ("bias_table", torch.zeros(75, 4), (75, 4)),
        ("bias_table", torch.zeros(75), (75,)),
        ("bias_table", torch.zeros(75, 2, dtype=torch.float64), torch.float64),
        ("bias_table", torch.zeros(75, 2, dtype=torch.bfloat16), torch.bfloat16),
        ("bias_table", torch.zeros(75, 2, device="meta"), "meta"),
        ("bias_table", None, "NoneType"),
        ("pad_qkv", torch.zeros(8), (8,)),
        ("pad_qkv", torch.zeros(1, 24), (1, 24)),
        ("pad_qkv", torch.zeros(24, device="meta"), "meta"),
        ("pad_qkv", 0.0, "float"),
        ("scale", "large", "large"),
        ("dropout", -0.1, -0.1),
        ("dropout", 1.5, 1.5),
        ("dropout", "half", "half"),
        ("window", (2, 3), (2, 3)),
        ("window", (2, 0, 3), (2, 0, 3)),
        ("window", (2, 3.0, 3), (2, 3.0, 3)),
        ("window", 3, 3),
        ("shift", (1, 1), (1, 1)),
        ("shift", (-1, 1, 1), (-1, 1, 1)),
        ("shift", (1, 3, 1), (1, 3, 1)),
        ("shift", (1, True, 1), (1, True, 1)),
        ("kernels", "flash", "flash"),
    ],
)
def test_refusals(argument, value, said):
    arguments = {"qkv": torch.zeros(1, 4, 6, 6, 24), "bias_table": torch.zeros(75, 2)}
    arguments |= {"window": (2, 3, 3), "shift": (1, 1, 1), "num_heads": 2}
    with suite.refuses("window_attention", argument, said):
        window_attention(**{**arguments, argument.partition("|")[0]: value})


def test_numbers_may_be_those_of_numpy():
    qkv, table = torch.randn(1, 2, 3, 3, 12), torch.randn(27, 2)
    plain = window_attention(qkv, table, window=(2, 2, 2), num_heads=2, scale=0.5)
    scalars = {"num_heads": np.int64(2), "scale": np.float32(0.5), "dropout": np.float64(0)}
    window = np.array([2, 2, 2])
    assert torch.equal(window_attention(qkv, table, window=window, **scalars), plain)
