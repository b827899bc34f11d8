"""kernels="cpu": types in any mixture, each number of a half precision, roundings, no numbers."""

import itertools
import math
from functools import partial

import numpy as np
import operator_suite as suite
import pytest
import torch
from test_cpu_exponentials import LEVELS, at_level
from test_cpu_kernels import attend, attention_inputs, bits, check, differentiated, exact_merging

from videoswin_kernels import extension, patch_merging, residual_norm, window_attention
from videoswin_kernels.testing import Case

pytestmark = pytest.mark.skipif(
    extension.why_not("_ops_cpu") is not None, reason=str(extension.why_not("_ops_cpu"))
)
LOW = pytest.mark.parametrize("dtype", suite.LOW, ids=str)
# Of whole vectors at every level, and one that ends within a vector.
WIDTH = pytest.mark.parametrize("width", [64, 37])


@pytest.fixture(params=LEVELS)
def level(request):
    """Each level that this processor has."""
    with at_level(request.param) as name:
        yield name


# Any type of x with any of the branch; weight, bias and branch_scale of each type with each of x.
MIXTURES = [
    (x, branch, *(suite.DTYPES[(i + 2 * j + k) % 4] for k in (0, 1, 3)))
    for (i, x), (j, branch) in itertools.product(enumerate(suite.DTYPES), repeat=2)
]


@pytest.mark.parametrize("dtypes", MIXTURES, ids=lambda dtypes: str(dtypes[:2]))
def test_types_in_any_mixture(dtypes, level):
    shapes = [(3, 2, 3, 5, 37)] * 2 + [(37,)] * 2
    pairs = zip(shapes, dtypes, strict=False)
    inputs = [suite.random(*shape, dtype=dtype, grad=True) for shape, dtype in pairs]
    scale = torch.tensor([0.0, 1.25, -4.0], dtype=dtypes[4])
    ours, theirs = (
        partial(residual_norm, branch_scale=scale, kernels=kernels)
        for kernels in ("cpu", "reference")
    )
    exact = partial(residual_norm, branch_scale=scale.double(), kernels="reference")
    check(inputs, ours, exact, theirs)
    results = ours(*inputs), theirs(*inputs)
    assert torch.equal(results[0][0], results[1][0])
    for other in results[0]:
        assert other.dtype == dtypes[0]
    x = suite.random(2, 3, 5, 4, 9, dtype=dtypes[0], grad=True)
    weights = [suite.random(36, dtype=dtype, grad=True) for dtype in dtypes[2:4]]
    ours, theirs = (partial(patch_merging, kernels=kernels) for kernels in ("cpu", "reference"))
    check([x, *weights], ours, exact_merging, theirs)


def rows_of(values, width):
    """[1, 1, 1, rows, width] of all values, filled up with ones."""
    return torch.cat([values, values.new_ones(-len(values) % width)]).view(1, 1, 1, -1, width)


def minus_zeros(like, dtype):
    """What leaves any number that it is added to as it is, and the sign of a zero, too."""
    return torch.full(like.shape, -0.0, dtype=dtype)


def added(x, branch):
    weight = torch.ones(x.shape[-1])
    return residual_norm(x, branch, weight, weight, kernels="cpu")


def assert_same_numbers(got, expected):
    """The same bits, and no number where there shall be none."""
    assert got.dtype == expected.dtype
    assert torch.equal(got.isnan(), expected.isnan())
    got, expected = (value.masked_fill(value.isnan(), 0) for value in (got, expected))
    assert torch.equal(*bits([got, expected]))


def every_number(dtype):
    return torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype)


@LOW
@WIDTH
def test_every_number_is_read_and_written_as_it_is(dtype, width, level):
    x = rows_of(every_number(dtype), width)
    for other in suite.DTYPES:
        zeros = minus_zeros(x, other)
        assert_same_numbers(added(x, zeros)[0], x)
        total, norm = added(zeros, x)
        # In float32 first, where x is not float64.
        assert_same_numbers(total, x.to(torch.promote_types(other, torch.float32)).to(other))
        is_finite = torch.isfinite(total).all(-1)
        assert not torch.isfinite(norm[~is_finite]).any()


@LOW
def test_every_number_is_the_value_of_a_token_that_is_alone(dtype, level):
    qkv = torch.zeros(1, 1, 1, 1 << 12, 48, dtype=dtype)
    qkv[..., 32:] = every_number(dtype).view(-1, 16)
    table = torch.zeros(1, 1)
    out = window_attention(qkv, table, window=(1, 1, 1), num_heads=1, kernels="cpu")
    is_finite = torch.isfinite(qkv)[..., 32:].all(-1)
    assert torch.equal(out[is_finite], qkv[is_finite][..., 32:])


def hard_to_round(dtype):
    """Float32 half-way between any two neighbours, and beside that; ends; anything."""
    positive = every_number(dtype)[1 << 15 :]
    positive = positive[torch.isfinite(positive)].float()
    ties = (positive[:-1] / 2 + positive[1:] / 2).numpy()
    beside = [np.nextafter(ties, np.float32(end)) for end in (-np.inf, np.inf)]
    largest = positive[-1].numpy()
    # Where it overflows: 65520 in float16, beyond the largest by half a step in bfloat16.
    above = (largest.view(np.uint32) + np.arange(1 << 17, dtype=np.uint32)).view(np.float32)
    above = above[np.isfinite(above)]
    ends = np.array([2.0**-25, 2.0**-149, 65520, 1e38, np.inf, np.nan], dtype=np.float32)
    # No numbers either, of which a half precision would keep nothing, and of all ones.
    others = np.array([0x7F800001, 0x7F80FFFF, 0x7FFFFFFF], dtype=np.uint32).view(np.float32)
    values = torch.from_numpy(np.concatenate([ties, *beside, above, ends, others]))
    anything = torch.randint(-(1 << 31), 1 << 31, (1 << 16,)).to(torch.int32).view(torch.float32)
    return torch.cat([values, -values, anything])


@LOW
@WIDTH
def test_roundings_to_a_half_precision_are_those_of_torch(dtype, width, level):
    branch = rows_of(hard_to_round(dtype), width)
    low = minus_zeros(branch, dtype).requires_grad_()
    expected = branch.to(dtype)
    assert_same_numbers(added(low, branch)[0].detach(), expected)
    # The gradient of a branch in a half precision, on a float32 stream.
    total, _ = added(torch.zeros_like(branch), low)
    assert_same_numbers(torch.autograd.grad(total, low, branch)[0], expected)


@pytest.mark.parametrize("dtype", suite.DTYPES, ids=str)
def test_what_is_no_number_is_not_hidden(dtype, level):
    """One number of a query, a key or a value: all that depends on it says so, and nothing else."""
    case = Case((2, 4, 6), (2, 3, 3), (0, 1, 1))
    finite = attention_inputs(case, 1, 2, 8, dtype)
    for part, value in itertools.product(range(3), (math.nan, math.inf, -math.inf)):
        inputs = [each.detach().clone() for each in finite]
        inputs[0][0, 1, 2, 3, 16 * part + 3] = value
        results = [
            differentiated(
                partial(attend, case, kernels=kernels), [v.requires_grad_() for v in inputs]
            )
            for kernels in ("cpu", "reference")
        ]
        wrong = [
            (torch.isfinite(got) != torch.isfinite(expected)).sum().item()
            for got, expected in zip(*results, strict=True)
        ]
        assert wrong == [0] * 4, f"{value} in {'qkv'[part]}: of out and gradients, {wrong} numbers"
