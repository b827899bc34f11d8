"""What the tests of `accelerate` share: small models, what comes of a pass, who computed it."""

import copy
from collections import Counter

import operator_suite as suite
import pytest
import torch
from model_suite import randomize
from test_declared import Calls
from torchvision.models.video.swin_transformer import SwinTransformer3d

from videoswin_kernels import accelerate

REASON = suite.reason_against("window_attention", "cpu")
runs_here = pytest.mark.skipif(REASON is not None, reason=str(REASON))

SMALL = {
    "patch_size": [2, 4, 4],
    "embed_dim": 24,
    "depths": [2, 2],
    "num_heads": [2, 4],
    "window_size": [2, 3, 3],
    "num_classes": 5,
    "stochastic_depth_prob": 0.0,
}
# How often a pass of `small` calls each operator.
FUSED = {"window_attention": 4, "residual_norm": 4, "patch_merging": 1}
# Clips [B, 3, T, H, W] for windows (2, 3, 3) of patches (2, 4, 4). Their token grids: padded on
# every axis; clamped to one window; of odd numbers of pixels; a whole number of windows.
SIZES = {
    "padded": (2, 3, 6, 40, 36),
    "clamped": (1, 3, 2, 8, 8),
    "odd": (3, 3, 5, 29, 50),
    "exact": (1, 3, 8, 24, 24),
}
PADDED = SIZES["padded"]


def small(**options):
    """torchvision's model with two stages of two blocks and weights far from init, in eval mode."""
    torch.manual_seed(3)
    return randomize(SwinTransformer3d(**{**SMALL, **options})).eval()


def accelerated(module, kernels="fused"):
    """An accelerated copy: the module itself stays what it is."""
    return accelerate(copy.deepcopy(module), kernels)


def clips(size=PADDED, dtype=torch.float32):
    """Normal values that are exact in every dtype."""
    drawn = torch.randn(size, generator=torch.Generator().manual_seed(5))
    return drawn.bfloat16().to(dtype)


def tokens(*size, dtype=torch.float64):
    """A token grid of normal values."""
    return clips(size, dtype)


def outcome(module, x, *others, seed=1, autocast=None):
    """What one pass forward and one backward give: {name: tensor}.

    Names are "output", "input" for the gradient of x, and those of the parameters, which have their
    gradients in place of what they had; what has no gradient is missing. Everything random begins
    with `seed`.
    """
    torch.manual_seed(seed)
    x = x.detach().requires_grad_()
    module.zero_grad()
    with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
        output = module(x, *others)
    weight = torch.linspace(-1, 2, output.numel(), dtype=torch.float64).cos()
    (output * weight.view_as(output).to(output.dtype)).sum().backward()
    result = {"output": output.detach(), "input": x.grad}
    result |= {name: each.grad for name, each in module.named_parameters()}
    return {name: each.clone() for name, each in result.items() if each is not None}


def distance(got, expected):
    """Relative error in the Euclidean norm; 0 of nothing."""
    got, expected = got.double(), expected.double()
    assert torch.isfinite(got).all()
    size = expected.norm().item()
    return (got - expected).norm().item() / (size or 1.0)


def assert_same(got, expected, tolerance):
    """Two outcomes have the same names, shapes and dtypes, and nearly the same values."""
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert got[name].shape == value.shape, name
        assert got[name].dtype == value.dtype, name
        assert distance(got[name], value) <= tolerance, name


def assert_within(got, own, exact, dtype):
    """Each error to float64 is at most twice the original's own in the dtype, and one rounding."""
    assert got.keys() == own.keys() == exact.keys()
    for name, judge in exact.items():
        assert got[name].dtype == own[name].dtype, name
        assert got[name].shape == own[name].shape, name
        allowed = 2 * distance(own[name], judge) + torch.finfo(dtype).eps / 2
        assert distance(got[name], judge) <= allowed, name


def calls(module, x, *others, kernels="cpu"):
    """How often a pass forward calls each operator of a kernel set."""
    with Calls(kernels) as recorded, torch.no_grad():
        module(x, *others)
    return Counter(recorded.names)


def types(module):
    """The class of each module within, by name."""
    return {name: type(each) for name, each in module.named_modules()}


def listen(module, kind, log, name=""):
    """Writes down what a hook of this kind gets, and returns its handle."""

    def hook(_, *values):
        log.append((name, kind, [value.detach().clone() for value in _tensors(values)]))

    return getattr(module, f"register_{kind}_hook")(hook)


def _tensors(values):
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, tuple | list):
            yield from _tensors(value)


def assert_same_events(got, expected, tolerance=1e-10):
    """The same hooks fired in the same order, and got nearly the same tensors."""
    assert [event[:2] for event in got] == [event[:2] for event in expected]
    for (name, kind, mine), (_, _, its) in zip(got, expected, strict=True):
        assert [each.shape for each in mine] == [each.shape for each in its], (name, kind)
        for one, other in zip(mine, its, strict=True):
            assert distance(one, other) <= tolerance, (name, kind)
