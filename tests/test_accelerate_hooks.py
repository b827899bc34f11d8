"""After `accelerate` the hooks, overrides and exchanged modules of users do what they did."""

import pytest
import torch
from accelerate_suite import (
    FUSED,
    accelerated,
    assert_same,
    assert_same_events,
    calls,
    clips,
    distance,
    listen,
    outcome,
    runs_here,
    small,
    tokens,
    types,
)
from torch import nn
from torch.nn.utils import parametrize
from torchvision.models.swin_transformer import SwinTransformerBlock
from torchvision.models.video.swin_transformer import ShiftedWindowAttention3d
from torchvision.ops import StochasticDepth

from videoswin_kernels import accelerate

pytestmark = runs_here

KINDS = ("forward_pre", "forward", "full_backward_pre", "full_backward")
BLOCK = ("norm1", "attn", "stochastic_depth", "norm2", "mlp")
MERGING = ("reduction", "norm")
# As a user sees them: the second block of the first stage, and the merging behind it.
MODULES = (
    "features.0.1",
    *(f"features.0.1.{name}" for name in BLOCK),
    "features.1",
    *(f"features.1.{name}" for name in MERGING),
)
# A grid of 3 x 5 x 4 tokens, padded and shifted, whatever else.
X = clips((1, 3, 6, 19, 16), torch.float64)
# What runs where every norm is its own.


@pytest.fixture(scope="module")
def plain():
    """The model whose copies are accelerated and hooked."""
    return small().double()


def copies(plain, *, before=lambda model: None, after=lambda model: None):
    """A model, and an accelerated one; both changed, the second before or after."""
    models = [accelerated(plain, "reference"), accelerated(plain, "reference")]
    before(models[0]), after(models[0])
    before(models[1])
    accelerate(models[1])
    after(models[1])
    return models


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", MODULES)
def test_hooks_get_what_they_got(plain, name, when):
    logs = []

    def hook(model):
        logs.append([])
        for kind in KINDS:
            listen(model.get_submodule(name), kind, logs[-1], name)

    original, fast = copies(plain, **{when: hook})
    own, got = outcome(original.train(), X), outcome(fast.train(), X)
    assert_same(got, own, 1e-11)
    # Both branches of a block are dropped by one module.
    assert len(logs[0]) == len(KINDS) * (2 if "stochastic" in name else 1)
    assert_same_events(logs[1], logs[0])


def test_hooks_of_all_modules_fire_in_the_same_order(plain):
    logs = []

    def hook(model):
        logs.append([])
        for name, module in model.named_modules():
            if not name.endswith(("qkv", "proj")):
                for kind in KINDS:
                    listen(module, kind, logs[-1], name)

    original, fast = copies(plain, after=hook)
    own, got = outcome(original, X), outcome(fast, X)
    assert_same(got, own, 1e-11)
    assert_same_events(logs[1], logs[0])


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", MODULES)
def test_a_hook_changes_what_it_changed(plain, name, when):
    def hook(model):
        module = model.get_submodule(name)
        module.register_forward_pre_hook(lambda _, values: (1.5 * values[0],))
        module.register_forward_hook(lambda _, values, output: output + 0.1 * output.cos())

    original, fast = copies(plain, **{when: hook})
    own = outcome(original, X)
    assert_same(outcome(fast, X), own, 1e-11)
    assert distance(own["output"], plain(X)) > 1e-3


@pytest.mark.parametrize(
    ("name", "lost"),
    [
        ("features.0.1.norm2", {"residual_norm": 1}),
        ("features.0.1.stochastic_depth", {"residual_norm": 1}),
        ("features.1.norm", {"patch_merging": 1}),
        ("features.0.1.norm1", {}),
        ("features.0.1.mlp", {}),
        ("features.0.1.attn", {}),
        ("features.0.1", {}),
    ],
)
def test_only_what_is_hooked_is_not_fused_and_only_until_the_hook_goes(plain, name, lost):
    fast = accelerated(plain)
    left = {operator: count - lost.get(operator, 0) for operator, count in FUSED.items()}
    for kind in KINDS:
        handle = listen(fast.get_submodule(name), kind, [])
        assert calls(fast, X) == {operator: count for operator, count in left.items() if count}
        handle.remove()
    assert calls(fast, X) == FUSED


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("is_padded", [False, True])
def test_hooks_on_the_linears_of_attention_fire(plain, is_padded, when):
    """The original reads their weights, and never calls them."""
    log = []

    def hook(model):
        for name in ("qkv", "proj"):
            linear = model.features[0][1].attn.get_submodule(name)
            for kind in ("forward_pre", "forward"):
                listen(linear, kind, log, name)

    original, fast = copies(plain, **{when: hook})
    x = X if is_padded else clips((2, 3, 8, 24, 24), torch.float64)
    own = outcome(original, x)
    log.clear()
    assert_same(outcome(fast, x), own, 1e-11)
    calls = [(name, values) for name, kind, values in log if kind == "forward_pre"]
    assert [name for name, _ in calls] == ["qkv"] * (1 + is_padded) + ["proj"]
    assert len(log) == 2 * len(calls)
    # Zeros for the padded places, and then the tokens.
    assert [bool(values[0].any()) for _, values in calls] == [False] * is_padded + [True, True]


def test_a_forward_hook_on_qkv_changes_padded_places_too(plain):
    fast, judge = accelerated(plain), accelerated(plain, "reference")
    fast.features[0][1].attn.qkv.register_forward_hook(lambda _, values, output: 1.5 * output)
    linear = judge.features[0][1].attn.qkv
    with torch.no_grad():
        linear.weight *= 1.5
        linear.bias *= 1.5
    torch.testing.assert_close(fast(X), judge(X), rtol=1e-10, atol=1e-10)


class Twice(nn.Module):
    """A parametrisation."""

    def forward(self, value):
        return 2 * value


def doubled(module, name):
    """A parameter parametrised; torch exchanges the class of the module."""
    parametrize.register_parametrization(module, name, Twice())


def overridden(module):
    """An override of `forward` in the instance."""
    forward = module.forward
    module.forward = lambda *inputs: forward(*inputs) + 0.1 * forward(*inputs).cos()


def one_block(model):
    return model.features[0][1]


CHANGES = {
    "norm2 parametrised": lambda model: doubled(one_block(model).norm2, "weight"),
    "norm2's bias parametrised": lambda model: doubled(one_block(model).norm2, "bias"),
    "norm of the merging parametrised": lambda model: doubled(model.features[1].norm, "bias"),
    "reduction parametrised": lambda model: doubled(model.features[1].reduction, "weight"),
    "qkv parametrised": lambda model: doubled(one_block(model).attn.qkv, "weight"),
    "qkv's bias parametrised": lambda model: doubled(one_block(model).attn.qkv, "bias"),
    "proj parametrised": lambda model: doubled(one_block(model).attn.proj, "weight"),
    "table parametrised": lambda model: doubled(
        one_block(model).attn, "relative_position_bias_table"
    ),
    "forward of norm1": lambda model: overridden(one_block(model).norm1),
    "forward of norm2": lambda model: overridden(one_block(model).norm2),
    "forward of attn": lambda model: overridden(one_block(model).attn),
    "forward of mlp": lambda model: overridden(one_block(model).mlp),
    "forward of stochastic_depth": lambda model: overridden(one_block(model).stochastic_depth),
    "forward of a block": lambda model: overridden(one_block(model)),
    "forward of the merging": lambda model: overridden(model.features[1]),
    "forward of its norm": lambda model: overridden(model.features[1].norm),
    "another norm2": lambda model: setattr(one_block(model), "norm2", nn.Tanh()),
    "another mlp": lambda model: setattr(one_block(model), "mlp", nn.Tanh()),
    "another attention": lambda model: setattr(one_block(model), "attn", nn.Tanh()),
    "another stochastic_depth": lambda model: setattr(
        one_block(model), "stochastic_depth", StochasticDepth(0.5, "batch")
    ),
    "norm of two axes": lambda model: setattr(
        one_block(model), "norm2", nn.LayerNorm((4, 24), dtype=torch.float64)
    ),
    "no bias in qkv": lambda model: setattr(one_block(model).attn.qkv, "bias", None),
}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_a_user_has_changed_counts(plain, change, when):
    original, fast = copies(plain, **{when: change})
    own = outcome(original.train(), X)
    assert_same(outcome(fast.train(), X), own, 1e-11)
    assert distance(own["output"], plain(X)) > 1e-4


class OwnBlock(SwinTransformerBlock):
    def forward(self, x):
        return 2 * super().forward(x)


class OwnAttention(ShiftedWindowAttention3d):
    def forward(self, x):
        return 2 * super().forward(x)


class OwnBias(ShiftedWindowAttention3d):
    """What the forward of its base is made of is another."""

    def get_relative_position_bias(self, window_size):
        return 2 * super().get_relative_position_bias(window_size)


class NamedAlone(SwinTransformerBlock):
    """A subclass of whose methods none is the forward's."""

    def extra_repr(self):
        return "mine"


def with_block(kind):
    """A model whose second block is of a subclass."""
    model = small().double()
    if issubclass(kind, SwinTransformerBlock):
        model.features[0][1].__class__ = kind
    else:
        model.features[0][1].attn.__class__ = kind
    return model


@pytest.mark.parametrize("kind", [OwnBlock, OwnAttention, OwnBias])
def test_a_subclass_with_a_forward_of_its_own_keeps_it(kind):
    original = with_block(kind)
    fast = accelerated(original)
    assert_same(outcome(fast, X), outcome(original, X), 1e-11)
    changed = [name for name, each in types(original).items() if each is kind]
    assert len(changed) == 1
    assert types(fast)[changed[0]] is kind or issubclass(types(fast)[changed[0]], kind)
    assert calls(fast, X)["window_attention"] == (4 if kind is OwnBlock else 3)


def test_a_subclass_with_the_same_forward_is_accelerated():
    original = with_block(NamedAlone)
    fast = accelerated(original)
    assert_same(outcome(fast, X), outcome(original, X), 1e-11)
    assert calls(fast, X) == FUSED
    assert "mine" in repr(fast)
    assert types(fast)["features.0.1"].__name__ == "NamedAlone"
    assert type(accelerate(fast, "reference").features[0][1]) is NamedAlone


class LoRA(nn.Module):
    """A Linear and an addition of low rank, without weight or bias of its own."""

    def __init__(self, base, offset=0.0):
        super().__init__()
        generator = torch.Generator().manual_seed(9)
        self.base, self.offset = base, offset
        down = torch.randn(3, base.in_features, generator=generator, dtype=base.weight.dtype)
        up = torch.randn(base.out_features, 3, generator=generator, dtype=base.weight.dtype)
        self.down, self.up = nn.Parameter(0.1 * down), nn.Parameter(0.1 * up)

    def forward(self, x):
        return self.base(x) + (x @ self.down.T) @ self.up.T + self.offset

    def merge(self):
        """What it computes, as a Linear."""
        merged = nn.Linear(self.base.in_features, self.base.out_features, dtype=self.up.dtype)
        with torch.no_grad():
            merged.weight.copy_(self.base.weight + self.up @ self.down)
            merged.bias.copy_(self.base.bias + self.offset)
        return merged


class LoRAWithBias(LoRA):
    """As some libraries have it: the weight and bias of the Linear within can be asked for."""

    weight = property(lambda self: self.base.weight)
    bias = property(lambda self: self.base.bias)


class LoRALinear(nn.Linear):
    """As others have it: a Linear whose forward adds something."""

    def forward(self, x):
        return super().forward(x) * 1.25

    def merge(self):
        merged = nn.Linear(self.in_features, self.out_features, dtype=self.weight.dtype)
        with torch.no_grad():
            merged.weight.copy_(1.25 * self.weight)
            merged.bias.copy_(1.25 * self.bias)
        return merged


def low_rank(linear, kind, offset=0.3):
    if kind is not LoRALinear:
        return kind(linear, offset)
    linear.__class__ = LoRALinear
    return linear


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("where", ["qkv", "proj"])
@pytest.mark.parametrize("kind", [LoRA, LoRAWithBias, LoRALinear])
def test_linears_of_low_rank_count_also_at_padded_places(plain, kind, where, when):
    """The original's attention reads weights past such a Linear; the judge has them merged."""
    fast, judge = accelerated(plain, "fused" if when == "after" else "reference"), None
    attention = fast.features[0][1].attn
    setattr(attention, where, low_rank(attention.get_submodule(where), kind))
    accelerate(fast)
    judge = accelerated(plain, "reference")
    setattr(judge.features[0][1].attn, where, attention.get_submodule(where).merge())
    got, own = outcome(fast, X), outcome(judge, X)
    for name in ("output", "input"):
        assert distance(got[name], own[name]) < 1e-11, name
    assert distance(own["output"], plain(X)) > 1e-3
    added = [name for name in got if name.endswith((".up", ".down"))]
    assert len(added) == (0 if kind is LoRALinear else 2)
    assert all(got[name].abs().max() > 0 for name in added)


@pytest.mark.parametrize("is_padded", [False, True])
def test_padded_places_are_asked_of_qkv_before_the_tokens_and_only_where_there_are_any(is_padded):
    fast = accelerated(small().double()).features[0][1].attn
    asked = []

    class Asked(LoRA):
        def forward(self, x):
            asked.append(x.detach())
            return super().forward(x)

    fast.qkv = Asked(fast.qkv)
    x = tokens(2, 3, 5, 4, 24) if is_padded else tokens(2, 4, 6, 3, 24)
    fast(x)
    assert len(asked) == 1 + is_padded
    assert torch.equal(asked[-1], x)
    if is_padded:
        assert not asked[0].any()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_quantised_linears_keep_working():
    """Their bias is a method, and their weight, too."""
    torch.manual_seed(0)
    plain, x = small(), X.float()
    fast = accelerated(plain)
    quantize = getattr(torch.ao.quantization, "quantize_dynamic", None)
    if quantize is None or torch.backends.quantized.engine == "none":
        pytest.skip("torch quantises no Linear here")
    for stage in (0, 2):
        for each in fast.features[stage]:
            each.attn = quantize(each.attn, {nn.Linear}, dtype=torch.qint8)
    accelerate(fast)
    assert type(fast.features[0][1].attn.qkv) is not nn.Linear
    with torch.no_grad():
        got, own = fast(x), plain(x)
    # Eight bits of weights and of tokens.
    assert 1e-6 < distance(got, own) < 0.1
    assert calls(fast, x) == FUSED


def test_hooks_of_a_user_stay_silent_while_parts_are_asked(plain):
    """And nothing is drawn, no gradient is kept, nothing needs one."""
    model = accelerated(plain, "reference").train()

    def shout(*_):
        raise AssertionError("a hook has fired")

    for module in model.modules():
        for kind in KINDS:
            getattr(module, f"register_{kind}_hook")(shout)
    state = torch.get_rng_state()
    accelerate(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(module.training for module in model.modules())
