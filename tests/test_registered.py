"""The registered operators of every compiled kernel set: schemas, and `torch.library.opcheck`."""

import re

import operator_suite as suite
import pytest
import torch

from videoswin_kernels.testing import ATTENTION, MOVEMENT

# What a model traced with one version is loaded with by another: these lines do not change.
SCHEMAS = [
    "cyclic_shift(Tensor x, SymInt[] shift) -> Tensor",
    "window_partition(Tensor x, SymInt[] window, SymInt[] shift) -> Tensor",
    "window_reverse(Tensor windows, SymInt[] grid, SymInt[] window, SymInt[] shift) -> Tensor",
    "window_attention(Tensor qkv, Tensor bias_table, Tensor? pad_qkv, SymInt[] window, "
    "SymInt[] shift, SymInt num_heads, float scale) -> (Tensor out, Tensor log_sum_exp)",
    "window_attention_backward(Tensor grad_out, Tensor qkv, Tensor bias_table, Tensor? pad_qkv, "
    "Tensor out, Tensor log_sum_exp, SymInt[] window, SymInt[] shift, SymInt num_heads, "
    "float scale, bool needs_qkv, bool needs_table, bool needs_pad) "
    "-> (Tensor grad_qkv, Tensor grad_table, Tensor grad_pad)",
    "patch_merging(Tensor x, Tensor weight, Tensor bias, float eps, ScalarType dtype) "
    "-> (Tensor out, Tensor mean, Tensor rstd)",
    "patch_merging_backward(Tensor grad, Tensor x, Tensor weight, Tensor mean, Tensor rstd, "
    "bool needs_x, bool needs_affine) "
    "-> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias)",
    "residual_norm(Tensor x, Tensor branch, Tensor weight, Tensor bias, Tensor? branch_scale, "
    "float eps, ScalarType dtype) -> (Tensor total, Tensor norm, Tensor mean, Tensor rstd)",
    "residual_norm_backward(Tensor? grad_total, Tensor? grad_norm, Tensor total, Tensor weight, "
    "Tensor mean, Tensor rstd, Tensor? branch_scale, ScalarType branch_dtype, bool needs_x, "
    "bool needs_branch, bool needs_affine) "
    "-> (Tensor grad_x, Tensor grad_branch, Tensor grad_weight, Tensor grad_bias)",
]
PADDED = ATTENTION["padded"]
CLAMPED = ATTENTION["D clamped"]


def compiled(operator):
    return suite.every(operator, compiled=True)


def has(run, schema):
    """Whether the kernel set has the operator of a schema."""
    return run in suite.runs(schema.partition("(")[0].removesuffix("_backward"))


def random(run, *shape, dtype=torch.float32, grad=False):
    return run.leaf(suite.random(*shape, dtype=dtype, grad=grad))


def check(run, name, *arguments):
    torch.library.opcheck(run.operator(name), arguments)


@compiled("cyclic_shift")
@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: schema.partition("(")[0])
def test_schemas(schema, run):
    name = schema.partition("(")[0]
    suite.skip_absent(name.removesuffix("_backward"), run)
    text = str(run.operator(name)._schema)
    assert text == f"videoswin_{run.kernels}::{schema}"
    # Sizes may be symbols of a traced program, and a string could not change within one.
    assert not re.search(r"\b(str|int)\b", text), text


@compiled("cyclic_shift")
def test_no_operator_is_registered_beside_these(run):
    prefix = f"videoswin_{run.kernels}::"
    names = {n for n in torch._C._dispatch_get_all_op_names() if n.startswith(prefix)}
    assert names == {prefix + schema.partition("(")[0] for schema in SCHEMAS if has(run, schema)}


@compiled("cyclic_shift")
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("shift", [(0, 0, 0), (1, -2, 7)])
def test_cyclic_shift(shift, grad, run):
    check(run, "cyclic_shift", random(run, 2, 3, 5, 4, 6, grad=grad), shift)


@compiled("window_partition")
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("case", [MOVEMENT["exact"], PADDED, CLAMPED])
def test_window_partition_and_reverse(case, grad, run):
    check(run, "window_partition", random(run, 2, *case.grid, 6, grad=grad), *case[1:])
    windows = random(run, 2 * case.windows, case.tokens, 6, grad=grad)
    check(run, "window_reverse", windows, *case)


def attention_arguments(run, case, *, has_pad, grad=False, dtype=torch.float32, batch=2):
    rows = 1
    for size in case.window:
        rows *= 2 * size - 1
    pad = random(run, 96, dtype=dtype, grad=grad) if has_pad else None
    qkv = random(run, batch, *case.grid, 96, dtype=dtype, grad=grad)
    return qkv, random(run, rows, 2, grad=grad), pad, case.window, case.shift, 2, 0.25


@compiled("window_attention")
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(
    ("name", "has_pad"),
    [
        ("padded, unshifted", True),
        ("padded, one axis shifted", False),
        ("H clamped", True),
        ("all clamped", True),
        ("all clamped", False),
    ],
)
def test_window_attention(name, has_pad, grad, run):
    arguments = attention_arguments(run, ATTENTION[name], has_pad=has_pad, grad=grad)
    check(run, "window_attention", *arguments)


@compiled("window_attention")
@pytest.mark.parametrize(
    "needs", [(True, True, True), (True, False, False), (False, True, False), (False, False, True)]
)
@pytest.mark.parametrize("has_pad", [False, True])
def test_window_attention_backward(has_pad, needs, run):
    case = ATTENTION["padded, one axis shifted"]
    arguments = attention_arguments(run, case, has_pad=has_pad, batch=1)
    out, log_sum_exp = run.operator("window_attention")(*arguments)
    rest = (*arguments[:3], out, log_sum_exp, *arguments[3:])
    needs = (*needs[:2], needs[2] and has_pad)
    check(run, "window_attention_backward", torch.randn_like(out), *rest, *needs)


@compiled("patch_merging")
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(
    ("dtype", "into"), [(torch.float32, torch.float32), (torch.float32, torch.float16)]
)
@pytest.mark.parametrize("grid", [(2, 4, 6), (1, 5, 7)])
def test_patch_merging(grid, dtype, into, grad, run):
    x = random(run, 2, *grid, 6, dtype=dtype, grad=grad)
    weight, bias = (random(run, 24, grad=grad) for _ in range(2))
    check(run, "patch_merging", x, weight, bias, 1e-5, into)


@compiled("patch_merging")
@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_patch_merging_backward(dtype, needs, run):
    x, weight, bias = random(run, 2, 2, 5, 4, 6, dtype=dtype), random(run, 24), random(run, 24)
    out, mean, rstd = run.operator("patch_merging")(x, weight, bias, 1e-5, dtype)
    assert mean.dtype == rstd.dtype == torch.float32
    assert mean.shape == rstd.shape == (out.numel() // 24,)
    grad = torch.randn_like(out)
    check(run, "patch_merging_backward", grad, x, weight, mean, rstd, *needs)
    grads = run.operator("patch_merging_backward")(grad, x, weight, mean, rstd, *needs)
    sizes = [x.numel() * needs[0], 24 * needs[1], 24 * needs[1]]
    assert [value.numel() for value in grads] == sizes
    assert grads[1].dtype == grads[2].dtype == torch.float32


def norm_arguments(run, *, dtype=torch.float32, branch=None, scaled=True, grad=False):
    x = random(run, 2, 3, 1, 5, 7, dtype=dtype, grad=grad)
    other = random(run, 2, 3, 1, 5, 7, dtype=branch or dtype, grad=grad)
    weight, bias = (random(run, 7, grad=grad) for _ in range(2))
    scale = run.put(torch.tensor([2.0, 0.0])) if scaled else None
    return x, other, weight, bias, scale, 1e-5


@compiled("residual_norm")
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("low", [None, torch.float16])
def test_residual_norm(low, scaled, grad, run):
    arguments = norm_arguments(run, branch=low, scaled=scaled, grad=grad)
    check(run, "residual_norm", *arguments, low or torch.float32)


@compiled("residual_norm")
@pytest.mark.parametrize("given", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize(
    "needs", [(True, True, True), (True, False, False), (False, True, False), (False, False, True)]
)
@pytest.mark.parametrize("scaled", [False, True])
def test_residual_norm_backward(scaled, needs, given, run):
    x, branch, weight, bias, scale, eps = norm_arguments(run, branch=torch.float16, scaled=scaled)
    total, norm, mean, rstd = run.operator("residual_norm")(
        x, branch, weight, bias, scale, eps, torch.float32
    )
    assert mean.dtype == rstd.dtype == torch.float32
    assert mean.shape == rstd.shape == (30,)
    ups = [torch.randn_like(total) if has else None for has in given]
    assert norm.dtype == total.dtype
    arguments = (*ups, total, weight, mean, rstd, scale, branch.dtype, *needs)
    check(run, "residual_norm_backward", *arguments)
    grads = run.operator("residual_norm_backward")(*arguments)
    sizes = [x.numel() * needs[0], x.numel() * needs[1], 7 * needs[2], 7 * needs[2]]
    assert [value.numel() for value in grads] == sizes
    assert grads[1].dtype == torch.float16
    assert grads[2].dtype == grads[3].dtype == torch.float32
