"""The exponential of the C++ kernels for processors: its whole range, at every level of x86-64."""

import contextlib
import math

import numpy as np
import pytest
import torch

from videoswin_kernels import extension

pytestmark = pytest.mark.skipif(
    extension.why_not("_ops_cpu") is not None, reason=str(extension.why_not("_ops_cpu"))
)
LEVELS = ("baseline", "v3", "v4")
SMALLEST = torch.finfo(torch.float32).tiny
CHUNK = 1 << 20


@contextlib.contextmanager
def at_level(name):
    """Kernels of a level of x86-64, if this processor has it; those of before, afterwards."""
    before = extension.cpu_level()
    if extension.cpu_level(LEVELS.index(name)) is None:
        pytest.skip(f"this processor has no {name}")
    try:
        yield name
    finally:
        extension.cpu_level(LEVELS.index(before))


@pytest.fixture(params=LEVELS)
def level(request):
    with at_level(request.param) as name:
        yield name


def exponentials(values):
    """exp of each value, in memory of its own."""
    result = values.clone()
    extension.operators("_ops_cpu").exponentials(result)
    return result


def bits(value):
    """The pattern of a float32."""
    return int(np.float32(value).view(np.uint32))


def every(step, first, last):
    """Float32 values from one to the other, of one sign, as every `step`-th pattern; in chunks."""
    patterns = np.arange(bits(first), bits(last) + 1, step, dtype=np.uint32)
    for begin in range(0, len(patterns), CHUNK):
        yield torch.from_numpy(patterns[begin : begin + CHUNK].view(np.float32))


def assert_within_two_ulp(x, got):
    """At most 2 ulp from exp(x); exactly 0 where that is below the normal numbers."""
    exact = x.double().exp()
    is_normal = exact >= SMALLEST
    assert not got[~is_normal].any()
    assert torch.isfinite(got).all()
    ulp = torch.from_numpy(np.spacing(exact.float().numpy())).double()
    error = ((got.double() - exact).abs() / ulp)[is_normal]
    assert error.numel() == 0 or error.max() <= 2, x[is_normal][error.argmax()]


# Where exp(x) is not 1 to float32, and where it is.
@pytest.mark.parametrize("span", [(61, -(2.0**-26), -104.0), (4099, -0.0, -(2.0**-26))])
def test_scores_below_the_largest(span, level):
    for x in every(*span):
        got = exponentials(x)
        assert_within_two_ulp(x, got)
        assert got.max() <= 1


def test_scores_a_little_above_the_largest(level):
    for x in every(509, 0.0, 0.1):
        assert_within_two_ulp(x, exponentials(x))


def test_where_normal_numbers_end(level):
    """Each of the patterns beside the logarithm of the smallest one."""
    edge = bits(math.log(SMALLEST))
    patterns = np.arange(edge - 5000, edge + 5000, dtype=np.uint32)
    x = torch.from_numpy(patterns.view(np.float32))
    got = exponentials(x)
    assert_within_two_ulp(x, got)
    # Both sides of it were asked.
    assert 0 < (got == 0).sum() < len(got)


def test_edges(level):
    tiny = 2.0**-149
    for dtype in (torch.float32, torch.float64):
        x = torch.tensor([0.0, -0.0, tiny, -tiny, -math.inf, -3e38], dtype=dtype)
        assert exponentials(x).tolist() == [1, 1, 1, 1, 0, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_no_number_stays_none(dtype, level):
    x = torch.zeros(67, dtype=dtype)
    x[::3] = math.nan
    x[3::6] = -math.nan
    assert torch.equal(exponentials(x).isnan(), x.isnan())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_any_number_of_values_anywhere(dtype, level):
    """What stands beside them stays as it was, and each value is what it is elsewhere."""
    x = torch.linspace(-20, 0, 80, dtype=dtype)
    whole = exponentials(x)
    for count in range(70):
        for first in (0, 1, 7):
            inside = slice(first, first + count)
            memory = x.clone()
            extension.operators("_ops_cpu").exponentials(memory[inside])
            assert torch.equal(memory[inside], whole[inside])
            memory[inside] = x[inside]
            assert torch.equal(memory, x)


def test_float64_is_that_of_the_c_library(level):
    x = torch.linspace(-760, 1, 20_011, dtype=torch.float64)
    expected = [math.exp(value) for value in x.tolist()]
    assert exponentials(x).tolist() == expected
