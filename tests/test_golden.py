"""The backbone against stored outputs and gradients of the official one."""

import functools

import operator_suite as suite
import pytest
import torch
from model_suite import (
    CASES,
    error,
    golden_case,
    torchvision_features,
    torchvision_name,
    torchvision_twin,
)

from model import SwinTransformer3D


def parameters_of(tensors):
    return {key[6:]: value for key, value in tensors.items() if key.startswith("param.")}


def backward(features, clips, tensors, parameter):
    """{key: tensor} of the output and every stored gradient."""
    (features * tensors["cotangent"].to(features.dtype)).sum().backward()
    grads = {
        key: clips.grad if key == "grad.input" else parameter(key[5:]).grad
        for key in tensors
        if key.startswith("grad.")
    }
    return {"output": features.detach(), **grads}


@functools.cache
def ours(case, dtype, kernels="reference"):
    config, tensors = golden_case(case)
    backbone = SwinTransformer3D(**config, kernels=kernels)
    backbone.load_state_dict(parameters_of(tensors))
    backbone.eval().to(dtype)
    clips = tensors["input"].to(dtype, copy=True).requires_grad_()
    return backward(backbone(clips), clips, tensors, backbone.get_parameter)


@functools.cache
def torchvisions(case):
    config, tensors = golden_case(case)
    twin = torchvision_twin(config, parameters_of(tensors))
    clips = tensors["input"].clone().requires_grad_()
    features = torchvision_features(twin, clips)
    return backward(
        features, clips, tensors, lambda name: twin.get_parameter(torchvision_name(name))
    )


def test_all_seven_cases_are_there():
    assert len(CASES) == 7
    for case in CASES:
        assert sum(key.startswith("grad.") for key in golden_case(case)[1]) > 40


@pytest.mark.trap(1)
@pytest.mark.trap(17)
@pytest.mark.trap(22)
@pytest.mark.trap(32)
@pytest.mark.parametrize("case", CASES)
def test_output_and_gradients_in_float64(case):
    # The files hold float32 roundings (3e-8) of float64 numbers.
    _, tensors = golden_case(case)
    worst = {key: error(value, tensors[key]) for key, value in ours(case, torch.float64).items()}
    assert max(worst.values()) < 1e-6, worst


@pytest.mark.parametrize("case", CASES)
def test_output_and_gradients_in_float32_are_within_twice_the_error_of_torchvision(case):
    _, tensors = golden_case(case)
    theirs = torchvisions(case)
    rounding = torch.finfo(torch.float32).eps
    for key, value in ours(case, torch.float32).items():
        budget = 2 * error(theirs[key], tensors[key]) + rounding
        assert error(value, tensors[key]) <= budget, key


# Emulated, of a minute in all the two here take two seconds.
QUICK = ("clamped_spatial", "odd_video")
BY_SET = [
    pytest.param(case, word, marks=pytest.mark.slow if word == "cuda" and case not in QUICK else ())
    for word in ("cuda", "cpu")
    for case in CASES
]


def skip_unless_there(kernels):
    """Skips where a kernel set cannot run on CPU tensors."""
    reasons = (suite.reason_against(name, kernels) for name in suite.OPERATORS)
    if reason := next(filter(None, reasons), None):
        pytest.skip(reason)


@pytest.mark.parametrize(("case", "kernels"), BY_SET)
def test_output_and_gradients_by_kernels_in_cpp(case, kernels):
    skip_unless_there(kernels)
    _, tensors = golden_case(case)
    theirs = torchvisions(case)
    rounding = torch.finfo(torch.float32).eps
    for key, value in ours(case, torch.float32, kernels).items():
        budget = 2 * error(theirs[key], tensors[key]) + rounding
        assert error(value, tensors[key]) <= budget, key


@pytest.mark.parametrize("case", CASES)
def test_output_and_gradients_in_float64_by_kernels_for_processors(case):
    skip_unless_there("cpu")
    _, tensors = golden_case(case)
    found = ours(case, torch.float64, "cpu")
    worst = {key: error(value, tensors[key]) for key, value in found.items()}
    assert max(worst.values()) < 1e-6, worst


def test_a_table_row_moved_by_one_is_seen():
    # The check above must be able to fail: the smallest mistake of the index is an offset by one.
    config, tensors = golden_case("clamped_spatial")
    parameters = parameters_of(tensors)
    name = "layers.0.blocks.1.attn.relative_position_bias_table"
    parameters[name] = parameters[name].roll(1, 0)
    backbone = SwinTransformer3D(**config, kernels="reference").eval().double()
    backbone.load_state_dict(parameters)
    assert error(backbone(tensors["input"].double()), tensors["output"]) > 1e-3
