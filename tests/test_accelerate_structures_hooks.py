"""Hooks, overrides and exchanged modules within blocks of upstream and of mmaction2 1.x."""

import pytest
import torch
import torch.nn.functional as F
from accelerate_suite import (
    accelerated,
    assert_same,
    assert_same_events,
    calls,
    distance,
    listen,
    outcome,
    runs_here,
    tokens,
)
from official_structures import official
from test_accelerate_structures import FAMILIES, GRID, block
from torch import nn

from videoswin_kernels import accelerate, explain

pytestmark = runs_here


def event_log(module, names, kinds=("forward_pre", "forward", "full_backward")):
    log = []
    for name in names:
        for kind in kinds:
            listen(module.get_submodule(name), kind, log, name)
    return log


@FAMILIES
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(
    "name",
    ["attn", "attn.attn_drop", "attn.softmax", "norm1", "norm2", "drop_path", "mlp", "mlp.fc1", ""],
)
def test_hooks_get_what_they_got(family, name, when):
    original, mask = block(family, drop_path_rate=0.3, qkv_bias=True)
    original.train()
    fast = accelerated(original, "reference")
    logs = [event_log(original, [name])]
    if when == "after":
        accelerate(fast)
    logs.append(event_log(fast, [name]))
    accelerate(fast)
    own, got = outcome(original, GRID, mask), outcome(fast, GRID, mask)
    assert_same(got, own, 1e-11)
    assert logs[0]
    assert_same_events(logs[1], logs[0])


@FAMILIES
@pytest.mark.parametrize("name", ["attn", "attn.attn_drop", "attn.softmax"])
def test_hooks_on_attention_keep_its_path_until_they_go(family, name):
    fast, mask = block(family)
    accelerate(fast)
    for kind in ("forward", "forward_pre", "full_backward", "full_backward_pre"):
        handle = listen(fast.get_submodule(name), kind, [])
        assert calls(fast, GRID, mask) == {"residual_norm": 1}
        handle.remove()
    assert calls(fast, GRID, mask) == {"residual_norm": 1, "window_attention": 1}


@FAMILIES
@pytest.mark.parametrize(
    "name", ["attn", "attn.attn_drop", "attn.softmax", "attn.qkv", "attn.proj"]
)
def test_overrides_within_attention_count(family, name):
    original, mask = block(family)
    fast = accelerated(original)
    before = original(GRID, mask)
    for each in (original, fast):
        module = each.get_submodule(name)
        module.forward = lambda *x, run=module.forward, **mask: 1.5 * run(*x, **mask)
    got, own = outcome(fast, GRID, mask), outcome(original, GRID, mask)
    assert_same(got, own, 1e-11)
    assert distance(own["output"], before) > 1e-3


class Quiet(nn.Module):
    """A softmax that may attend to nothing."""

    def forward(self, scores):
        return scores.exp() / (1 + scores.exp().sum(-1, keepdim=True))


class OwnSoftmax(nn.Softmax):
    def forward(self, scores):
        return super().forward(2 * scores)


class OwnDropout(nn.Dropout):
    def forward(self, weights):
        return 0.5 * weights


OTHERS = {
    "softmax": ("softmax", Quiet()),
    "axis of softmax": ("softmax", nn.Softmax(dim=-2)),
    "subclass of softmax": ("softmax", OwnSoftmax(dim=-1)),
    "attn_drop": ("attn_drop", nn.Softplus()),
    "subclass of attn_drop": ("attn_drop", OwnDropout(0.0)),
}


@FAMILIES
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(("name", "other"), OTHERS.values(), ids=OTHERS)
def test_exchanged_modules_within_attention_count(family, name, other, when):
    original, mask = block(family)
    fast = accelerated(original, "fused" if when == "after" else "reference")
    for each in (original, fast):
        setattr(each.attn, name, other)
    if when == "before":
        accelerate(fast)
    assert_same(outcome(fast, GRID, mask), outcome(original, GRID, mask), 1e-11)


@FAMILIES
@pytest.mark.parametrize("when", ["before", "after"])
def test_another_attention_counts(family, when):
    class Flipped(family.WindowAttention3D):
        def forward(self, x, mask=None):
            return super().forward(x.flip(1), mask)

    original, mask = block(family)
    fast = accelerated(original, "fused" if when == "after" else "reference")
    original.attn.__class__ = fast.attn.__class__ = Flipped
    # Of a word that it has, a block is asked nothing new.
    fast = accelerate(nn.ModuleList([fast, block(family)[0]]))[0] if when == "before" else fast
    assert_same(outcome(fast, GRID, mask), outcome(original, GRID, mask), 1e-11)
    assert calls(fast, GRID, mask) == {"residual_norm": 1}


@FAMILIES
def test_hooks_on_the_linears_fire_once_and_once_more_for_padded_places(family):
    fast, mask = block(family)
    log = event_log(accelerate(fast), ["attn.qkv", "attn.proj", "attn.proj_drop"], ["forward"])
    fast(GRID, mask)
    assert [name for name, *_ in log] == ["attn.qkv", "attn.qkv", "attn.proj", "attn.proj_drop"]
    assert not log[0][2][0].any()
    log.clear()
    fast(tokens(2, 4, 6, 3, 24), None)
    assert [name for name, *_ in log] == ["attn.qkv", "attn.proj", "attn.proj_drop"]


@FAMILIES
@pytest.mark.parametrize("rate", [0.0, 0.4])
def test_dropout_of_attention_weights_keeps_the_original_path(family, rate):
    original, mask = block(family, attn_drop=rate)
    original.train()
    fast = accelerated(original)
    assert_same(outcome(fast, GRID, mask), outcome(original, GRID, mask), 1e-11)
    assert calls(fast, GRID, mask)["window_attention"] == (rate == 0)
    assert calls(fast.eval(), GRID, mask)["window_attention"] == 1
    reasons = [each.reason for each in explain(fast.train()) if each.kernels == "original"]
    assert len(reasons) == (rate > 0)
    assert all("attn" in reason for reason in reasons)


@FAMILIES
@pytest.mark.parametrize("drops", [False, True])
def test_what_drops_attention_weights_is_the_dropout_s_own_mode(family, drops):
    original, mask = block(family, attn_drop=0.4)
    fast = accelerated(original)
    for each in (original, fast):
        each.train(not drops)
        each.attn.attn_drop.train(drops)
    assert_same(outcome(fast, GRID, mask), outcome(original, GRID, mask), 1e-11)
    assert calls(fast, GRID, mask)["window_attention"] == (not drops)


def test_dropout_of_the_projection_is_in_training_alone():
    original, mask = block(official, drop=0.4)
    fast = accelerated(original)
    assert_same(outcome(fast, GRID, mask), outcome(original, GRID, mask), 1e-11)
    fast.attn.proj_drop.train()
    assert distance(fast(GRID, mask), original(GRID, mask)) > 0.01
    fast.attn.proj_drop.p = 1.0
    kept = GRID + fast.mlp(fast.norm2(GRID))
    torch.testing.assert_close(fast(GRID, mask), kept, rtol=1e-10, atol=1e-10)


class LowRank(nn.Module):
    """A Linear and an addition of low rank; at zero it is not the Linear's bias."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.down = nn.Parameter(0.1 * torch.randn(3, base.in_features).double())
        self.up = nn.Parameter(0.1 * torch.randn(base.out_features, 3).double())

    def forward(self, x):
        return self.base(x) + (x @ self.down.T + 0.3) @ self.up.T


class LowRankWithBias(LowRank):
    weight = property(lambda self: self.base.weight)
    bias = property(lambda self: self.base.bias)


@FAMILIES
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("kind", [LowRank, LowRankWithBias])
def test_linears_of_low_rank(family, kind, when):
    original, mask = block(family)
    fast = accelerated(original) if when == "after" else None
    for each in (original, fast):
        if each is not None:
            torch.manual_seed(6)
            each.attn.qkv, each.attn.proj = kind(each.attn.qkv), kind(each.attn.proj)
            each.mlp.fc1 = kind(each.mlp.fc1)
    fast = fast or accelerated(original)
    assert_same(outcome(fast, GRID, mask), outcome(original, GRID, mask), 1e-11)
    assert calls(fast, GRID, mask)["window_attention"] == 1


class Int8Linear(nn.Module):
    """A Linear with weights of eight bits, whose bias is none of its parameters."""

    def __init__(self, base):
        super().__init__()
        self.scale = base.weight.detach().abs().max() / 127
        self.register_buffer("weight", (base.weight.detach() / self.scale).round().to(torch.int8))
        self.kept = base.bias.detach().clone()

    def bias(self):
        return self.kept

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype) * self.scale, self.kept)


def quantised(linear):
    """As torch quantises it, or by hand where it does not."""
    quantize = getattr(torch.ao.quantization, "quantize_dynamic", None)
    if quantize is None or torch.backends.quantized.engine == "none":
        pytest.skip("torch quantises no Linear here")
    return quantize(nn.Sequential(linear), {nn.Linear}, dtype=torch.qint8)[0]


@FAMILIES
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("convert", [Int8Linear, quantised], ids=["by hand", "torch"])
def test_quantised_linears(family, convert):
    original, mask = block(family)
    original.float()
    for name in ("qkv", "proj"):
        setattr(original.attn, name, convert(getattr(original.attn, name)))
    fast, x = accelerated(original), GRID.float()
    got, own = outcome(fast, x, mask), outcome(original, x, mask)
    # torch rounds tokens by the range of them all, and windows have padded places beside them.
    assert distance(got["output"], own["output"]) < (1e-5 if convert is Int8Linear else 0.01)
    assert calls(fast, x, mask)["window_attention"] == 1


class Widening(nn.Module):
    """A Linear that answers in float32."""

    def __init__(self, base):
        super().__init__()
        self.base = base

    def forward(self, x):
        return self.base(x).float()


@FAMILIES
def test_a_branch_wider_than_the_stream_widens_it(family):
    original, mask = block(family)
    original.bfloat16().norm2.float()
    original.mlp.float()
    original.attn.proj = Widening(original.attn.proj)
    x = GRID.bfloat16()
    got, own = outcome(accelerated(original), x, mask), outcome(original, x, mask)
    assert own["output"].dtype == torch.float32
    assert_same(got, own, 0.02)
