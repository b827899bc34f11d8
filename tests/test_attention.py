"""window_attention: the seven questions and autocast."""

import loops
import operator_suite as suite
import plain
import pytest
import torch

from videoswin_kernels import window_attention
from videoswin_kernels.testing import ATTENTION as CASES
from videoswin_kernels.testing import HEAD_WIDTHS, Case

EVERY = suite.every("window_attention")
CASE = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
PADDED = CASES["padded"]
SMALL = CASES["padded, one axis shifted"]
REFERENCE = suite.Run("reference", "cpu")
CLAMPED = CASES["H and W clamped"]
HEADS, WIDTH = 2, 16


def make(
    case, batch=2, dtype=torch.float64, table_dtype=torch.float32, grad=False, std=1.0, width=WIDTH
):
    """(qkv, bias_table, pad_qkv) of the case, leaves if they shall have gradients."""
    if dtype == torch.float64:
        table_dtype = torch.float64
    qkv = suite.random(batch, *case.grid, 3 * HEADS * width, dtype=dtype, grad=grad)
    rows = loops.table_rows(case.window)
    table = suite.random(rows, HEADS, dtype=table_dtype, std=std, grad=grad)
    return qkv, table, suite.random(3 * HEADS * width, dtype=dtype, grad=grad)


def _options(inputs, case, options):
    return {"num_heads": HEADS, "window": case[1], "shift": case[2], "pad_qkv": inputs[2]} | options


def attend(run, inputs, case, **options):
    """The operator on (qkv, bias_table, pad_qkv)."""
    return run(window_attention, *inputs[:2], **_options(inputs, case, options))


def naive(run, inputs, case, **options):
    """The naive composition on the same device."""
    return run.plain(plain.attention, *inputs[:2], **_options(inputs, case, options))


def exactly(leaves, case, **options):
    """The naive composition, for float64 leaves."""
    return plain.attention(*leaves[:2], **_options(leaves, case, options))


def judged(inputs, case, **options):
    """The float64 result of the loops."""
    qkv, table, pad = [None if t is None else t.detach().double().numpy() for t in inputs]
    return loops.window_attention(qkv, table, case[1], case[2], HEADS, pad, **options)


@suite.every("window_attention", suite.DTYPES)
@CASE
def test_forward(case, run, dtype):
    inputs = make(case, dtype=dtype)
    result = attend(run, inputs, case)
    assert result.is_contiguous()
    exact = judged(inputs, case)
    if dtype == torch.float64:
        suite.assert_near_loops(result, exact)
    suite.assert_budget(result, torch.from_numpy(exact), naive(run, inputs, case), dtype)


@suite.every("window_attention", suite.DTYPES)
@pytest.mark.parametrize("has_pad", [True, False])
@pytest.mark.parametrize("width", HEAD_WIDTHS)
def test_every_head_width_and_a_batch_of_three(width, has_pad, run, dtype):
    qkv, table, pad = make(SMALL, batch=3, dtype=dtype, width=width)
    inputs = qkv, table, pad if has_pad else None
    exact = exactly([v if v is None else v.double() for v in inputs], SMALL)
    suite.assert_budget(attend(run, inputs, SMALL), exact, naive(run, inputs, SMALL), dtype)


@CASE
def test_torchvision_computes_the_same(case):
    """A second judge of the reference beside the loops, that shares no line with them."""
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
        torch.testing.assert_close(attend(REFERENCE, inputs, case), theirs(x))


@suite.every("window_attention", suite.LOW)
@pytest.mark.parametrize("case", [PADDED, CLAMPED])
def test_a_bias_table_in_the_dtype_of_qkv(case, run, dtype):
    inputs = make(case, dtype=dtype, table_dtype=dtype)
    exact = torch.from_numpy(judged(inputs, case))
    suite.assert_budget(attend(run, inputs, case), exact, naive(run, inputs, case), dtype)


@suite.every("window_attention", suite.LOW)
def test_gradients_are_in_the_dtypes_of_what_they_are_of(run, dtype):
    for table_dtype in (dtype, torch.float32):
        inputs = make(PADDED, dtype=dtype, table_dtype=table_dtype, grad=True)
        result = attend(run, inputs, PADDED)
        grads = suite.gradients(result, inputs, torch.ones_like(result))
        assert [g.dtype for g in grads] == [dtype, table_dtype, dtype]


@suite.every("window_attention", suite.DTYPES)
@CASE
def test_gradients(case, run, dtype):
    inputs = make(case, dtype=dtype, grad=True)
    leaves = [suite.exact_leaf(value) for value in inputs]
    weight = suite.random(2, *case.grid, HEADS * WIDTH, dtype=dtype)
    got = suite.gradients(attend(run, inputs, case), inputs, weight)
    own = suite.gradients(naive(run, inputs, case), inputs, weight)
    exact = suite.gradients(exactly(leaves, case), leaves, weight)
    for index, value in enumerate(inputs):
        if dtype == torch.float64:
            torch.testing.assert_close(got[index], exact[index], rtol=1e-11, atol=1e-11)
        suite.assert_budget(got[index], exact[index], own[index], value.dtype)


@suite.every("window_attention", [torch.float32, torch.float16])
@pytest.mark.parametrize("width", HEAD_WIDTHS)
def test_gradients_of_every_head_width_without_pad_qkv(width, run, dtype):
    inputs = (*make(SMALL, batch=3, dtype=dtype, width=width, grad=True)[:2], None)
    leaves = [suite.exact_leaf(value) for value in inputs]
    weight = suite.random(3, *SMALL.grid, HEADS * width, dtype=dtype)
    got = suite.gradients(attend(run, inputs, SMALL), inputs[:2], weight)
    own = suite.gradients(naive(run, inputs, SMALL), inputs[:2], weight)
    exact = suite.gradients(exactly(leaves, SMALL), leaves[:2], weight)
    for value, *parts in zip(inputs[:2], got, exact, own, strict=True):
        suite.assert_budget(*parts, value.dtype)


@pytest.mark.parametrize(
    "case", [((2, 3, 2), (1, 2, 2), (0, 1, 1)), ((2, 1, 2), (2, 2, 2), (0,) * 3)]
)
def test_gradcheck(case):
    inputs = [value.detach() for value in make(Case(*case), batch=1)]
    small = [inputs[0][..., :6].clone(), inputs[1][:, :1].clone(), inputs[2][:6].clone()]
    for value in small:
        value.requires_grad_()

    def attention(qkv, table, pad):
        options = {"window": case[1], "shift": case[2], "num_heads": 1, "pad_qkv": pad}
        return window_attention(qkv, table, kernels="reference", **options)

    assert torch.autograd.gradcheck(attention, small)


@EVERY
@pytest.mark.trap(32)
def test_every_layout(run):
    inputs = make(SMALL, dtype=torch.float32)
    exact = torch.from_numpy(judged(inputs, SMALL))
    own = naive(run, inputs, SMALL)
    qkv, table, pad = map(run.put, inputs)
    table, pad = table.t().contiguous().t(), torch.stack([pad, pad], -1)[:, 1]
    for name, view in suite.layouts(qkv).items():
        result = attend(run, (view, table, pad), SMALL)
        assert result.is_contiguous(), name
        suite.assert_budget(result, exact, own)


@EVERY
@pytest.mark.trap(32)
def test_an_expanded_input(run):
    inputs = make(SMALL, dtype=torch.float32)
    qkv = run.put(inputs[0])[:1, :, :1, :, :1].expand(2, *SMALL.grid, 3 * HEADS * WIDTH)
    result = attend(run, (qkv, *inputs[1:]), SMALL)
    assert torch.equal(result, attend(run, (qkv.contiguous(), *inputs[1:]), SMALL))


@EVERY
@pytest.mark.trap(32)
def test_gradients_of_every_layout(run):
    inputs = make(SMALL, dtype=torch.float32, grad=True)
    qkv, table, pad = map(run.leaf, inputs)
    up = suite.random(2, *SMALL.grid, HEADS * WIDTH, dtype=torch.float32)
    expected = suite.gradients(naive(run, inputs, SMALL), inputs, up)
    views = suite.layouts(qkv.detach()).values()
    for view, grad in zip(views, suite.layouts(run.put(up)).values(), strict=True):
        view = view.detach().requires_grad_()
        options = _options((view, table, pad), SMALL, {"kernels": run.kernels})
        result = window_attention(view, table, **options)
        got = torch.autograd.grad(result, [view, table, pad], grad)
        for value, other in zip(got, expected, strict=True):
            torch.testing.assert_close(value.cpu(), other, rtol=1e-4, atol=1e-5)
    # What `sum` sends back: one number, with strides of 0.
    result = attend(run, inputs, SMALL)
    got = torch.autograd.grad(result.sum(), inputs, retain_graph=True)
    expected = torch.autograd.grad(result, inputs, torch.ones_like(result))
    assert all(map(torch.equal, got, expected))


@EVERY
@pytest.mark.parametrize("case", [PADDED, CLAMPED])
def test_empty_batch(case, run):
    inputs = make(case, batch=0, dtype=torch.float32, grad=True)
    result = attend(run, inputs, case)
    assert result.shape == (0, *case.grid, HEADS * WIDTH)
    for value, grad in zip(inputs, torch.autograd.grad(result.sum(), inputs), strict=True):
        assert torch.equal(grad, torch.zeros_like(value))


@suite.every("window_attention", compiled=True)
@pytest.mark.slow
def test_more_than_65535_windows_interpreted(run):
    if not run.is_interpreted:
        pytest.skip("asked of what is not interpreted by the next test, with gradients")
    qkv = suite.random(1, 1, 257, 256, 48, dtype=torch.float16)
    result = run(window_attention, qkv, torch.ones(1, 1), window=(1, 1, 1), num_heads=1)
    assert torch.equal(result, qkv[..., 32:])


@pytest.mark.slow
@EVERY
def test_more_than_65535_windows_of_one_token(run):
    if run.is_interpreted:
        pytest.skip("65,792 programs take minutes in Triton's interpreter")
    qkv = suite.random(1, 1, 257, 256, 48, dtype=torch.float32, grad=True)
    table = torch.ones(1, 1, requires_grad=True)
    result = run(window_attention, qkv, table, window=(1, 1, 1), num_heads=1)
    assert torch.equal(result, qkv[..., 32:])
    weight = suite.random(*result.shape, dtype=torch.float32)
    grad_qkv, grad_table = suite.gradients(result, [qkv, table], weight)
    assert torch.equal(grad_qkv[..., 32:], weight)
    # One key has probability 1 whatever its score.
    assert not grad_qkv[..., :32].any()
    assert not grad_table.any()


@EVERY
@pytest.mark.parametrize("axis", [0, 2])
def test_offsets_beyond_2_31(axis, run, far):
    case = Case((3, 2, 3), (2, 2, 3), (1, 0, 0))
    qkv, table, pad = make(case, dtype=torch.float16, grad=True)
    weight = torch.randn(2, *case.grid, HEADS * WIDTH, dtype=torch.float16)
    results = []
    for place in (run.put, lambda x: far(run.put(x), axis)):
        leaves = [place(qkv.detach()).requires_grad_(), *map(run.leaf, (table, pad))]
        result = window_attention(*leaves[:2], **_options(leaves, case, {"kernels": run.kernels}))
        results.append([result, *torch.autograd.grad(result, leaves, place(weight))])
    assert all(map(torch.equal, *results))


@suite.every("window_attention", suite.LOW)
def test_autocast_is_eager_autocast(run, dtype):
    inputs = make(PADDED, dtype=torch.float32, grad=True)
    leaves = [suite.exact_leaf(value) for value in inputs]
    with torch.autocast(run.device, dtype):
        result = attend(run, inputs, PADDED)
        # In eager code the projection under autocast has given qkv in the low precision.
        low = (inputs[0].to(dtype), inputs[1], inputs[2].to(dtype))
        eager = naive(run, low, PADDED)
    exact = exactly(leaves, PADDED)
    suite.assert_budget(result, exact, eager, dtype)
    weight = suite.random(2, *PADDED.grid, HEADS * WIDTH, dtype=torch.float32)
    got = suite.gradients(result, inputs, weight)
    own = suite.gradients(eager, inputs, weight)
    for parts in zip(got, suite.gradients(exact, leaves, weight), own, strict=True):
        suite.assert_budget(*parts, torch.float32)


@suite.every("window_attention", suite.LOW)
def test_autocast_keeps_the_bias_table(run, dtype):
    # Two keys whose biases no low precision can tell apart: a rounded table gives equal weights.
    qkv = torch.zeros(1, 1, 1, 2, 48)
    qkv[0, 0, 0, :, 32:] = torch.tensor([0.0, 1.0])[:, None]
    table = torch.tensor([[1024.25], [1024.0], [1024.0]])
    with torch.autocast(run.device, dtype):
        result = run(window_attention, qkv, table, window=(1, 1, 2), num_heads=1)
    assert result.dtype == dtype
    # Query 0 reads key 1 by row 0, and sigmoid(0.25) is 0.562; query 1 has equal biases.
    assert result[0, 0, 0, 0, 0].item() == pytest.approx(0.562, abs=0.005)
    assert result[0, 0, 0, 1, 0] == 0.5


@suite.every("window_attention", [torch.float64])
def test_autocast_keeps_float64(run, dtype):
    with torch.autocast(run.device, torch.bfloat16):
        assert attend(run, make(PADDED, dtype=dtype), PADDED).dtype == dtype


@EVERY
def test_autocast_casts_another_low_precision(run):
    inputs = make(PADDED, dtype=torch.bfloat16)
    with torch.autocast(run.device, torch.float16):
        assert attend(run, inputs, PADDED).dtype == torch.float16


@EVERY
@pytest.mark.parametrize("case", [CASES["padded, unshifted"], CASES["all clamped"]])
def test_compiles_to_one_graph_for_all_batch_sizes(case, run):
    _, table, pad = make(case, dtype=torch.float32, grad=True)
    options = {"window": case.window, "shift": case.shift, "num_heads": HEADS}
    suite.assert_compiles(
        run,
        lambda qkv, table, pad: window_attention(
            qkv, table, pad_qkv=pad, kernels=run.kernels, **options
        ),
        lambda batch: [make(case, batch, dtype=torch.float32, grad=True)[0], table, pad],
        exact=False,
    )


@EVERY
def test_scale_of_none_and_zero_is_the_inverse_root_of_the_head_width(run):
    case = CASES["padded, unshifted"]
    inputs = make(case, batch=1, dtype=torch.float32)
    default = attend(run, inputs, case)
    for scale in (None, 0, 0.0, WIDTH**-0.5):
        assert torch.equal(attend(run, inputs, case, scale=scale), default)
    exact = torch.from_numpy(judged(inputs, case, scale=0.7))
    own = naive(run, inputs, case, scale=0.7)
    suite.assert_budget(attend(run, inputs, case, scale=0.7), exact, own)
    assert (exact - default).abs().max() > 0.1
