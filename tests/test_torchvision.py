"""The classifier against torchvision's swin3d_t, its own port of the official model."""

import functools

import operator_suite as suite
import pytest
import torch
from model_suite import error, randomize, torchvision_name
from torchvision.models.video import swin3d_t

from model import create


@functools.cache
def twins(kernels="reference"):
    """Ours and torchvision's Swin-T with the same weights, far from init."""
    ours = randomize(create("swin_t", num_classes=400, kernels=kernels)).eval()
    theirs = swin3d_t().eval()
    state = {torchvision_name(name): value for name, value in ours.state_dict().items()}
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert not unexpected
    assert all(key.endswith("relative_position_index") for key in missing)
    return ours, theirs


def test_parameters_stand_in_the_same_order():
    ours, theirs = twins()
    names = [torchvision_name(name) for name, _ in ours.named_parameters()]
    assert names == [name for name, _ in theirs.named_parameters()]


# Clamped height and width; padding of every kind; one frame; a depth of 15 in windows of 8.
SIZES = pytest.mark.parametrize(
    "size",
    [(8, 112, 112), (20, 96, 120), (32, 64, 64), (1, 32, 32), (30, 64, 40), (16, 128, 100)],
)


@pytest.mark.trap(1)
@pytest.mark.trap(2)
@pytest.mark.trap(3)
@pytest.mark.trap(17)
@SIZES
def test_logits_are_equal(size):
    ours, theirs = twins()
    clips = torch.randn(1, 3, *size)
    with torch.inference_mode():
        got, expected = ours(clips), theirs(clips)
    assert expected.std() > 0.1
    assert torch.equal(got, expected)


@SIZES
def test_logits_by_kernels_for_processors(size):
    if reason := suite.reason_against("window_attention", "cpu"):
        pytest.skip(reason)
    ours, theirs = twins("cpu")
    clips = torch.randn(1, 3, *size)
    with torch.inference_mode():
        got, expected = ours(clips), theirs(clips)
    assert error(got, expected) < 1e-5
