"""The optimiser: which parameter gets which rate and decay, and the rate over time."""

from dataclasses import replace
from math import cos, isfinite, pi

import pytest
import torch

from model import create
from train.optim import (
    OptimSettings,
    build_optimizer,
    clip_gradients,
    learning_rate_factor,
    name_factors,
    set_learning_rate,
)

# Upstream's for Swin-T on Kinetics-400, written out: the defaults are not what is tested here.
SETTINGS = OptimSettings(
    lr=1e-3, backbone_lr=0.1, weight_decay=0.02, warmup_epochs=2.5, warmup_start=0.1
)


def published_factors(name: str) -> tuple[float, float]:
    """Learning rate and weight decay of a parameter, as factors, as upstream's logs show them."""
    if name.endswith("relative_position_bias_table"):
        return 1.0, 0.0
    if name.startswith("cls_head."):
        return 1.0, 1.0
    assert name.startswith("backbone."), name
    return 0.1, 1.0


@pytest.fixture
def model():
    return create("swin_nano", num_classes=5)


@pytest.mark.trap(33)
def test_every_parameter_is_in_the_group_that_upstream_trained_it_in(model):
    optimizer = build_optimizer(model, SETTINGS)
    found = {
        id(parameter): (group["lr_factor"], group["weight_decay"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    kinds = set()
    for name, parameter in model.named_parameters():
        rate, decay = published_factors(name)
        assert found[id(parameter)] == (rate, 0.02 * decay), name
        kinds.add((rate, decay, "norm" in name, name.endswith("bias")))
    # Tables, head weights and biases; of the backbone weights and biases of norms and of others.
    assert len(kinds) == 7
    assert len(optimizer.param_groups) == 3


@pytest.mark.trap(33)
@pytest.mark.parametrize("frozen_stages", [-1, 0, 1, 2])
def test_every_parameter_is_in_one_group_and_frozen_ones_in_none(frozen_stages):
    model = create("swin_nano", num_classes=5, frozen_stages=frozen_stages)
    optimizer = build_optimizer(model, SETTINGS)
    held = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    assert len(held) == len(set(held))
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    assert set(held) == trained
    assert (len(trained) < len(list(model.parameters()))) == (frozen_stages >= 0)


@pytest.mark.trap(33)
def test_one_step_moves_each_parameter_by_its_own_rate(model):
    optimizer = build_optimizer(model, replace(SETTINGS, weight_decay=0.0))
    set_learning_rate(optimizer, 0.01)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    # Adam's first step is the learning rate itself, whatever the size of the gradient.
    for name, parameter in model.named_parameters():
        moved = before[name] - parameter.detach()
        expected = torch.full_like(moved, 0.01 * published_factors(name)[0])
        torch.testing.assert_close(moved, expected, rtol=1e-3, atol=1e-6, msg=name)


@pytest.mark.trap(33)
def test_without_gradient_all_but_the_bias_tables_decay(model):
    optimizer = build_optimizer(model, SETTINGS)
    set_learning_rate(optimizer, 1.0)
    for parameter in model.parameters():
        parameter.data.fill_(1.0)
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        rate, decay = published_factors(name)
        kept = torch.full_like(parameter, 1 - rate * decay * 0.02)
        torch.testing.assert_close(parameter.detach(), kept, rtol=1e-6, atol=0, msg=name)


def test_the_longest_key_in_a_name_counts_alone():
    assert name_factors("backbone.norm.weight", 0.1) == (0.1, 1.0)
    assert name_factors("cls_head.norm.weight", 0.1) == (1.0, 0.0)
    assert name_factors("backbone.absolute_pos_embed", 0.1) == (1.0, 0.0)
    assert name_factors("cls_head.fc_cls.bias", 0.1) == (1.0, 1.0)
    assert name_factors("backbone.patch_embed.proj.bias", 0.5) == (0.5, 1.0)


def test_mmaction2_s_groups_multiply_what_a_name_contains(model):
    """Tables at the backbone's rate, norms without decay: another optimiser than upstream's."""
    optimizer = build_optimizer(model, replace(SETTINGS, groups="mmaction2"))
    found = {
        id(parameter): (group["lr_factor"], group["weight_decay"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    for name, parameter in model.named_parameters():
        rate = 1.0 if name.startswith("cls_head.") else 0.1
        decays = not (name.endswith("relative_position_bias_table") or "norm" in name)
        assert found[id(parameter)] == (rate, 0.02 * decays), name
    assert len(optimizer.param_groups) == 3


def test_the_other_cosine_moves_at_every_step():
    settings = replace(SETTINGS, schedule="cosine", warmup_epochs=0)
    factors = [learning_rate_factor(step, 10, 8, settings) for step in range(80)]
    assert factors == pytest.approx([0.5 * (1 + cos(pi * step / 80)) for step in range(80)])
    assert len(set(factors)) == 80


def test_long_gradients_are_cut_to_a_length_and_short_ones_are_not():
    parameters = [torch.nn.Parameter(torch.zeros(size)) for size in (3, 4, 5)]
    parameters[0].grad, parameters[1].grad = torch.full((3,), 2.0), torch.full((4,), -1.0)
    assert clip_gradients(parameters, 0) == pytest.approx(4.0)
    assert clip_gradients(parameters, 5.0) == pytest.approx(4.0)
    assert parameters[0].grad.tolist() == [2.0] * 3
    assert clip_gradients(parameters, 1.0) == pytest.approx(4.0)
    assert parameters[0].grad.tolist() == pytest.approx([0.5] * 3)
    assert parameters[1].grad.tolist() == pytest.approx([-0.25] * 4)
    assert parameters[2].grad is None


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_gradients_that_are_no_numbers_have_no_length_and_stay(number):
    parameter = torch.nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([1.0, number])
    assert not isfinite(clip_gradients([parameter], 0.1))
    assert parameter.grad[0] == 1


@pytest.mark.parametrize(
    ("step", "factor"),
    [
        (0, 0.1),
        (999, 0.4596),
        (1000, 0.4587),
        (2499, 0.9887),
        (2500, 0.9891),
        (3000, 0.9755),
        (15000, 0.5),
        (29999, 0.0027),
    ],
)
def test_learning_rate_is_upstream_s_with_1000_steps_in_30_epochs(step, factor):
    assert round(learning_rate_factor(step, 1000, 30, SETTINGS), 4) == factor


def test_after_the_warm_up_the_rate_changes_between_epochs_alone():
    factors = [learning_rate_factor(step, 10, 8, SETTINGS) for step in range(30, 80)]
    epochs = [set(factors[start : start + 10]) for start in range(0, 50, 10)]
    assert all(len(epoch) == 1 for epoch in epochs)
    assert sorted(set(factors), reverse=True) == [epoch.pop() for epoch in epochs]


def test_without_warm_up_the_first_step_has_the_full_rate():
    settings = replace(SETTINGS, warmup_epochs=0)
    assert learning_rate_factor(0, 10, 4, settings) == 1
    assert learning_rate_factor(9, 10, 4, settings) == 1
    assert learning_rate_factor(20, 10, 4, settings) == pytest.approx(0.5)


def test_a_warm_up_of_half_an_epoch_ends_within_it():
    settings = replace(SETTINGS, warmup_epochs=0.5, warmup_start=0.2)
    factors = [learning_rate_factor(step, 8, 4, settings) for step in range(8)]
    assert factors == pytest.approx([0.2, 0.4, 0.6, 0.8, 1, 1, 1, 1])
