"""A step of the optimiser: however its clips are divided, the gradients of their mean loss."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

pytest.importorskip("tyro")

from train.optim import OptimSettings, build_optimizer
from train.parallel import Group
from train.recipe import LoopSettings
from train.step import Stepper
from train.transforms import normalize

CPU = Group(torch.device("cpu"))
SHAPE = (3, 4, 8, 8)


class Net(nn.Module):
    """Clips [B, 3, T, H, W] to logits [B, 5]."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 7), nn.Linear(7, 5)
        self.sizes = []

    def forward(self, clips):
        self.sizes.append(len(clips))
        return self.second(self.first(clips.mean(dim=(2, 3, 4))).tanh())


@pytest.fixture
def clips():
    return torch.randint(256, (7, *SHAPE), dtype=torch.uint8)


LABELS = torch.tensor([0, 1, 2, 3, 4, 0, 3])


def stepper(optim=None, group=CPU, **loop):
    torch.manual_seed(3)
    net = Net()
    optim = optim or OptimSettings(lr=1e-2)
    settings = LoopSettings(**loop)
    return Stepper(net, build_optimizer(net, optim), optim, settings, SHAPE, group)


def gradients(found, clips, labels, **loss):
    """Those of the mean loss, and its value, on a copy of the weights as they are."""
    net = Net()
    net.load_state_dict(found.module.state_dict())
    value = F.cross_entropy(net(normalize(clips)), labels, **loss)
    value.backward()
    return [parameter.grad for parameter in net.parameters()], value.item()


@pytest.fixture
def kept(monkeypatch):
    """The gradients that an optimiser has seen last."""
    seen = []
    plain = torch.optim.AdamW.step

    def step(self, *arguments):
        seen[:] = [p.grad.clone() for group in self.param_groups for p in group["params"]]
        return plain(self, *arguments)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    return seen


@pytest.mark.parametrize("size", [0, 1, 2, 3, 7, 9])
def test_gradients_are_those_of_all_clips_in_however_many_passes(clips, kept, size):
    found = stepper(clips_per_pass=size)
    expected, loss = gradients(found, clips, LABELS)
    taken = found.step(clips, LABELS, 7, found.num_passes(7))
    torch.testing.assert_close(kept, expected)
    assert taken.loss.item() / 7 == pytest.approx(loss, rel=1e-6)
    assert max(found.module.sizes) == min(size or 7, 7)
    assert sum(found.module.sizes) == 7
    length = torch.cat([each.flatten() for each in expected]).norm().item()
    assert taken.norm == pytest.approx(length, rel=1e-5)
    assert all(parameter.grad is None for parameter in found.module.parameters())


def test_clips_that_could_not_be_read_are_missed_by_nobody(clips, kept):
    found = stepper(clips_per_pass=2)
    expected, _ = gradients(found, clips[:3], LABELS[:3])
    found.step(clips[:3], LABELS[:3], 3, found.num_passes(7))
    torch.testing.assert_close(kept, expected)
    assert found.module.sizes == [2, 1]


def test_a_process_among_others_has_its_share_of_the_mean_and_every_pass(clips, kept):
    """Three of ten clips: what the other process adds is averaged with this one's gradients."""
    found = stepper(group=Group(torch.device("cpu"), 1, 2), clips_per_pass=2)
    expected, _ = gradients(found, clips[:3], LABELS[:3])
    found.step(clips[:3], LABELS[:3], 10, found.num_passes(5))
    torch.testing.assert_close(kept, [2 * 3 / 10 * each for each in expected])
    assert found.module.sizes == [2, 1, 1]


def test_a_process_without_clips_has_gradients_of_zero(kept):
    found = stepper(group=Group(torch.device("cpu"), 1, 2))
    none = torch.empty(0, dtype=torch.uint8)
    taken = found.step(none, torch.empty(0, dtype=torch.int64), 4, 1)
    assert not any(each.any() for each in kept)
    assert (taken.loss.item(), taken.hits.item(), taken.norm) == (0, 0, 0)


def test_label_smoothing_is_upstream_s_blending(clips, kept):
    """On the right class 1 - 0.1 + 0.1 / 5, and 0.1 / 5 on each of the others."""
    found = stepper(OptimSettings(label_smoothing=0.1))
    targets = torch.full((7, 5), 0.1 / 5).scatter(1, LABELS[:, None], 1 - 0.1 + 0.1 / 5)
    expected, _ = gradients(found, clips, targets)
    found.step(clips, LABELS, 7, 1)
    torch.testing.assert_close(kept, expected)


def test_gradients_are_cut_once_they_are_whole(clips, kept):
    found = stepper(OptimSettings(clip_norm=1e-3), clips_per_pass=2)
    expected, _ = gradients(found, clips, LABELS)
    taken = found.step(clips, LABELS, 7, 4)
    torch.testing.assert_close(kept, [each * (1e-3 / taken.norm) for each in expected])


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_mixed_precision_is_near_float32_and_keeps_its_weights(clips, kept, precision):
    found = stepper(precision=precision)
    expected, _ = gradients(found, clips, LABELS)
    found.step(clips, LABELS, 7, 1)
    # Two roundings of the weights and the hidden values.
    torch.testing.assert_close(kept, expected, rtol=0.1, atol=2e-2)
    assert not torch.equal(kept[0], expected[0])
    assert {each.dtype for each in found.module.parameters()} == {torch.float32}


def test_float16_is_scaled_and_its_scale_shrinks_where_gradients_overflow(clips):
    found = stepper(precision="float16")
    scale = found.scaler.get_scale()
    assert scale > 1
    assert not found.step(clips, LABELS, 7, 1).is_skipped
    found.scaler.update(2.0**40)
    before = [each.clone() for each in found.module.parameters()]
    assert found.step(clips, LABELS, 7, 1).is_skipped
    assert found.scaler.get_scale() == 2.0**39
    for one, other in zip(before, found.module.parameters(), strict=True):
        assert torch.equal(one, other)
    assert stepper(precision="bfloat16").scaler.state_dict() == {}


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_step_without_finite_gradients_changes_nothing(clips, number):
    found = stepper()
    found.step(clips, LABELS, 7, 1)
    state = {name: value.clone() for name, value in found.module.state_dict().items()}
    plain = found.module.forward
    found.module.forward = lambda clips: plain(clips) * number
    taken = found.step(clips, LABELS, 7, 1)
    assert taken.is_skipped
    for name, value in found.module.state_dict().items():
        assert torch.equal(value, state[name])
    assert all(parameter.grad is None for parameter in found.module.parameters())
    steps = {each["step"].item() for each in found.optimizer.state.values()}
    assert steps == {1}
