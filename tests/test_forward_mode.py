"""Forward-mode derivatives and transforms of `torch.func`: of the reference alone, never zero.

A registered operator drops tangents without a word, so `auto` takes the reference for tensors that
have one or stand in a transform, and a kernel set asked for by name refuses them.
"""

import operator_suite as suite
import pytest
import torch
from test_declared import Calls
from torch.autograd import forward_ad

import videoswin_kernels
from videoswin_kernels import geometry
from videoswin_kernels.ops._checks import is_transformed
from videoswin_kernels.selection import Call, UnavailableError, choose

OPERATOR = pytest.mark.parametrize("operator", suite.OPERATORS)
GRID, WINDOW, SHIFT = (2, 3, 2), (2, 2, 3), (1, 1, 1)
SENTENCE = "its kernels have no forward-mode derivatives and no transforms of torch.func, got"


def small_call(operator, dtype=torch.float64):
    """(function of tensors and `kernels`, its tensors), on a padded and shifted grid."""
    call = getattr(videoswin_kernels, operator)
    options = {"window": WINDOW, "shift": SHIFT}
    x = suite.random(1, *GRID, 2, dtype=dtype)
    tensors = (x,)
    if operator == "cyclic_shift":
        options = {"shift": SHIFT}
    elif operator == "window_reverse":
        tensors = (videoswin_kernels.window_partition(x, **options, kernels="reference"),)
        options["grid"] = GRID
    elif operator == "window_attention":
        table = suite.random(geometry.table_rows(WINDOW), 2, dtype=dtype)
        qkv = suite.random(1, *GRID, 96, dtype=dtype)
        tensors = (qkv, table, suite.random(96, dtype=dtype))

        def function(qkv, table, pad_qkv, kernels):
            return call(qkv, table, pad_qkv=pad_qkv, num_heads=2, kernels=kernels, **options)

        return function, tensors
    elif operator == "patch_merging":
        options, tensors = {}, (x, *suite.random(2, 8, dtype=dtype))
    elif operator == "residual_norm":
        tensors = (x, torch.randn_like(x), *suite.random(2, 2, dtype=dtype))
        scale = suite.random(1, dtype=dtype)

        def function(x, branch, weight, bias, scale, kernels):
            return call(x, branch, weight, bias, branch_scale=scale, kernels=kernels)

        return function, (*tensors, scale)
    return (lambda *tensors, kernels: call(*tensors, kernels=kernels, **options)), tensors


def sides(results):
    return results if isinstance(results, tuple) else (results,)


def total(results):
    """A sum in which no two values count the same."""
    return sum((each * torch.linspace(1, 2, each.numel()).view_as(each)).sum() for each in results)


def jvp(function, tensors):
    return torch.func.jvp(function, tensors, tuple(each.cos() for each in tensors))


def dual_of(place):
    def dual(function, tensors):
        with forward_ad.dual_level():
            given = list(tensors)
            given[place] = forward_ad.make_dual(given[place], given[place].cos())
            tangents = [forward_ad.unpack_dual(each).tangent for each in sides(function(*given))]
            # The sum of residual_norm knows nothing of its weight and bias.
            return tuple(each for each in tangents if each is not None)

    return dual


def jacfwd(function, tensors):
    # Of the last argument, the smallest; branch_scale takes no gradient, but has a tangent.
    return torch.func.jacfwd(function, argnums=len(tensors) - 1)(*tensors)


def vmap_of(place):
    def vmap(function, tensors):
        given, axes = list(tensors), [None] * len(tensors)
        given[place], axes[place] = torch.stack((given[place], given[place].cos())), 0
        return torch.vmap(function, tuple(axes))(*given)

    return vmap


def grad(function, tensors):
    return torch.func.grad(lambda *tensors: total(sides(function(*tensors))))(*tensors)


TRANSFORMS = {
    "jvp": jvp,
    "jacfwd": jacfwd,
    "grad": grad,
    "dual level": dual_of(0),
    "vmap": vmap_of(0),
}
TRANSFORM = pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)


def assert_auto_is_the_reference(function, tensors, transform):
    results = []
    for word in ("auto", "reference"):
        outputs = transform(lambda *given, word=word: function(*given, kernels=word), tensors)
        results.append(torch.utils._pytree.tree_leaves(outputs))
    assert results[1]
    for got, expected in zip(*results, strict=True):
        assert expected.any()
        assert torch.equal(got, expected)


@OPERATOR
@TRANSFORM
def test_auto_is_the_reference(operator, transform):
    assert_auto_is_the_reference(*small_call(operator), transform)


@OPERATOR
def test_a_tangent_or_an_axis_of_any_argument_alone_is_seen(operator):
    function, tensors = small_call(operator)
    for place in range(len(tensors)):
        for transform in (dual_of(place), vmap_of(place)):
            assert_auto_is_the_reference(function, tensors, transform)


@OPERATOR
def test_tangents_are_those_of_the_gradients(operator):
    function, tensors = small_call(operator)
    if operator == "residual_norm":
        # branch_scale gets no gradient.
        *tensors, scale = tensors
        whole = function
        function = lambda *given, kernels: whole(*given, scale, kernels=kernels)  # noqa: E731
    run = lambda *given: total(sides(function(*given, kernels="auto")))  # noqa: E731
    _, tangent = jvp(run, tuple(tensors))
    leaves = [each.clone().requires_grad_() for each in tensors]
    grads = torch.autograd.grad(run(*leaves), leaves)
    expected = sum((g * each.cos()).sum() for g, each in zip(grads, tensors, strict=True))
    torch.testing.assert_close(tangent, expected, rtol=1e-12, atol=1e-12)


@OPERATOR
@TRANSFORM
def test_a_kernel_set_asked_for_by_name_refuses(operator, transform):
    words = [word for word in suite.kernel_sets(operator) if word != "reference"]
    if not words:
        pytest.skip("no compiled kernel set runs here")
    if "cpu" in words:
        words.append("fused")
    function, tensors = small_call(operator, torch.float32)
    for word in words:
        function(*tensors, kernels=word)
        refusal = suite.REFUSAL.format(operator, word)
        with pytest.raises(UnavailableError, match=refusal) as caught:
            transform(lambda *given, word=word: function(*given, kernels=word), tensors)
        assert SENTENCE in str(caught.value)
        # Nothing of it stays.
        function(*tensors, kernels=word)


@OPERATOR
@pytest.mark.parametrize("device", ["cpu", "cuda", "meta"])
@pytest.mark.parametrize("word", suite.NAMED)
def test_every_kernel_set_refuses_on_every_device(operator, device, word):
    call = Call(operator, device, is_transformed=True)
    with pytest.raises(UnavailableError, match=SENTENCE):
        choose(call, word)
    assert choose(call, "auto").kernels == "reference"


@OPERATOR
def test_tensors_without_a_tangent_keep_their_kernels_within_a_transform(operator):
    if "cpu" not in suite.kernel_sets(operator):
        pytest.skip("no kernels for processors here")
    function, tensors = small_call(operator)
    with forward_ad.dual_level(), Calls("cpu") as calls:
        forward_ad.make_dual(tensors[0], tensors[0])
        function(*tensors, kernels="auto")
    assert calls.names == [operator]


def test_what_is_seen_of_tensors_of_every_kind():
    x = torch.ones(2)
    with torch.inference_mode():
        inference = torch.ones(2)
    plain = (x, x.bool(), x.int(), inference, torch.nn.Parameter(x), x.to("meta"))
    assert not any(map(is_transformed, plain))
    with forward_ad.dual_level():
        assert not is_transformed(None, *plain)
        dual = forward_ad.make_dual(x, x)
        for mode in (torch.no_grad(), torch.enable_grad()):
            with mode:
                assert is_transformed(x, None, dual)
    assert not is_transformed(dual)
    seen = []
    torch.vmap(lambda row: seen.append((is_transformed(row), is_transformed(x))) or row)(x)
    assert seen == [(True, False)]
