"""Models of torchvision after `accelerate`: the same numbers, gradients and draws."""

import copy
from functools import cache, partial

import operator_suite as suite
import pytest
import torch
from accelerate_suite import (
    FUSED,
    PADDED,
    SIZES,
    SMALL,
    accelerated,
    assert_same,
    assert_within,
    calls,
    clips,
    distance,
    outcome,
    runs_here,
    small,
    tokens,
    types,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from model_suite import randomize
from torch import nn
from torchvision.models import swin_transformer as swin_2d
from torchvision.models.swin_transformer import PatchMerging, SwinTransformerBlock
from torchvision.models.video import swin3d_b, swin3d_s, swin3d_t
from torchvision.models.video.swin_transformer import ShiftedWindowAttention3d, SwinTransformer3d
from torchvision.ops import StochasticDepth

from videoswin_kernels import accelerate

pytestmark = runs_here

# Of a block: attention, and the residual with its norm; of the merging between two stages.
LOW = (torch.float16, torch.bfloat16)


def block(window=(2, 3, 3), shift=(1, 1, 1), kind=SwinTransformerBlock, **options):
    """A block of torchvision, 24 channels in two heads."""
    made = kind(24, 2, list(window), list(shift), attn_layer=ShiftedWindowAttention3d, **options)
    return randomize(made).eval()


GRID = (2, 3, 10, 9, 24)


def merging():
    """A merging beside a block: without one it could be of a 2-D model."""
    return nn.ModuleList([block(), randomize(PatchMerging(24)).eval()])


def parts(kind, **options):
    """A block, its attention or a merging in float64, and the same accelerated."""
    original = (merging() if kind == "merging" else block(**options)).double()
    fast = accelerated(original)
    if kind == "merging":
        return original[1], fast[1]
    return (original.attn, fast.attn) if kind == "attention" else (original, fast)


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("dtype", suite.DTYPES, ids=str)
def test_logits_and_gradients_are_equal(dtype, size):
    original = small()
    fast = accelerated(original)
    exact = outcome(copy.deepcopy(original).double(), clips(size, torch.float64))
    own, got = (outcome(each.to(dtype), clips(size, dtype)) for each in (original, fast))
    assert len(exact) == 2 + len(list(original.parameters()))
    if dtype == torch.float64:
        assert_same(got, exact, 1e-12)
    else:
        assert_within(got, own, exact, dtype)
    assert calls(fast, clips(size, dtype)) == FUSED


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("autocast", LOW, ids=str)
def test_autocast_is_as_exact(autocast, size):
    original = small()
    own, got = (
        outcome(each, clips(size), autocast=autocast) for each in (original, accelerated(original))
    )
    exact = outcome(original.double(), clips(size, torch.float64))
    assert_within(got, own, exact, autocast)


TINY = {
    "patch_size": [1, 2, 2],
    "embed_dim": 8,
    "num_heads": [1, 2],
    "window_size": [2, 3, 2],
}
EXTENT = st.integers(1, 17)


@settings(max_examples=100, derandomize=True, deadline=None, database=None)
@given(st.tuples(st.integers(1, 2), st.just(3), st.integers(1, 5), EXTENT, EXTENT))
def test_any_size_of_clips(size):
    (original, fast), x = tiny(), clips(size, torch.float64)
    assert_same(outcome(fast, x), outcome(original, x), 1e-11)


@cache
def tiny():
    original = small(**TINY).double()
    return original, accelerated(original)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=str)
def test_stochastic_depth_draws_the_same_numbers(autocast):
    original = small(stochastic_depth_prob=0.5).train()
    fast, x = accelerated(original), clips((6, *PADDED[1:]))
    got = outcome(fast, x, autocast=autocast)
    state = torch.get_rng_state()
    own = outcome(original, x, autocast=autocast)
    assert torch.equal(torch.get_rng_state(), state)
    # What Bernoulli numbers are does not depend on their dtype.
    exact = outcome(copy.deepcopy(original).double(), x.double())
    assert_within(got, own, exact, autocast or torch.float32)
    # Other numbers, and none, make another outcome: it is not by chance that these are equal.
    assert distance(outcome(fast, x, seed=2)["output"], own["output"]) > 0.1
    assert distance(outcome(fast.eval(), x)["output"], own["output"]) > 0.1
    assert calls(fast.train(), x) == FUSED


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", ["row", "batch"])
@pytest.mark.parametrize("rate", [0.5, 1.0])
def test_stochastic_depth_of_a_block(rate, mode, dtype):
    """In both of its modes, also where it drops everything."""
    original = block().train()
    original.stochastic_depth = StochasticDepth(rate, mode)
    judge, x = copy.deepcopy(original).double(), tokens(8, 2, 5, 4, 24, dtype=dtype)
    fast, original = accelerated(original).to(dtype), original.to(dtype)
    dropped = 0
    for seed in range(3):
        own = outcome(original, x, seed=seed)
        exact = outcome(judge, x.double(), seed=seed)
        assert_within(outcome(fast, x, seed=seed), own, exact, dtype)
        dropped += torch.equal(own["output"][0], x[0])
    assert (dropped > 0) if rate < 1 else (dropped == 3)


def test_an_identity_in_place_of_stochastic_depth():
    original = block().double().train()
    original.stochastic_depth = nn.Identity()
    x = tokens(*GRID)
    assert_same(outcome(accelerated(original), x), outcome(original, x), 1e-11)


def test_twenty_steps_of_training():
    original = small(stochastic_depth_prob=0.2).train()
    labels, losses = torch.arange(6) % 5, []
    for model in (original, accelerated(original)):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        torch.manual_seed(4)
        losses.append([])
        for step in range(20):
            x = torch.randn(6, 3, 4, 24, 20, generator=torch.Generator().manual_seed(step % 4))
            loss = nn.functional.cross_entropy(model(x), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert losses[0][-1] < 0.7 * losses[0][0]


def test_frozen_parameters_get_no_gradient():
    original = small().double()
    for name, parameter in original.named_parameters():
        parameter.requires_grad_(not any(part in name for part in ("norm2", "table", "1.norm")))
    fast, x = accelerated(original), clips(dtype=torch.float64)
    own = outcome(original, x)
    assert_same(outcome(fast, x), own, 1e-11)
    assert not any("table" in name for name in own)


@pytest.mark.parametrize("layout", list(suite.layouts(torch.zeros(2, 3, 4, 6, 8))))
@pytest.mark.parametrize("kind", ["block", "attention", "merging"])
def test_every_layout_of_tokens(kind, layout):
    original, fast = parts(kind)
    x = suite.layouts(tokens(*GRID))[layout]
    assert_same(outcome(fast, x), outcome(original, x), 1e-11)
    with torch.inference_mode():
        torch.testing.assert_close(fast(x), original(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("size", [(6, 5), (2, 6, 5), (2, 1, 2, 7, 5), (7, 1, 1, 3)])
def test_merging_of_any_number_of_axes(size):
    """What it merges are the two axes before the channels, whatever stands before them."""
    (original, fast), x = parts("merging"), tokens(*size, 24)
    assert_same(outcome(fast, x), outcome(original, x), 1e-12)


def test_two_dimensional_parts_beside_compute_what_they_did():
    """Their merging is of the class of the 3-D one, and asks how many axes it is given."""
    torch.manual_seed(0)
    flat = swin_2d.SwinTransformer([2, 2], 8, [1, 1], [1, 2], [3, 3], num_classes=3)
    both = nn.ModuleDict({"flat": randomize(flat), "solid": small(**TINY)}).double().eval()
    fast, picture = accelerated(both), tokens(2, 3, 14, 10)
    assert torch.equal(fast["flat"](picture), both["flat"](picture))
    assert calls(fast["flat"], picture) == {}
    before = types(both["flat"])
    changed = {name for name, kind in types(fast["flat"]).items() if kind is not before[name]}
    assert changed == {"features.2"}
    x = clips((1, 3, 3, 9, 7), torch.float64)
    assert_same(outcome(fast["solid"], x), outcome(both["solid"], x), 1e-12)


@pytest.mark.parametrize("kind", ["block", "attention", "merging"])
def test_an_empty_batch(kind):
    """The original takes none where it shifts."""
    (original, fast), x = parts(kind, shift=(0, 0, 0)), tokens(0, *GRID[1:])
    assert_same(outcome(fast, x), outcome(original, x), 0.0)


@pytest.mark.parametrize(
    "norm",
    [
        partial(nn.LayerNorm, eps=0.3),
        partial(nn.LayerNorm, bias=False),
        partial(nn.LayerNorm, elementwise_affine=False),
        nn.RMSNorm,
        lambda dim: nn.Identity(),
        lambda dim: Doubled(dim),
    ],
    ids=["eps", "no bias", "no weight", "RMSNorm", "Identity", "subclass"],
)
def test_norms_of_every_kind(norm):
    original = small(norm_layer=norm).double()
    fast, x = accelerated(original), clips(dtype=torch.float64)
    assert_same(outcome(fast, x), outcome(original, x), 1e-11)
    is_plain = type(original.norm) is nn.LayerNorm and original.norm.bias is not None
    assert calls(fast, x) == (FUSED if is_plain else {"window_attention": 4})


def test_a_norm_over_more_than_the_channels():
    """Also where every axis of it has as many."""
    original = block().double()
    original.norm2 = nn.LayerNorm((24, 24), dtype=torch.float64)
    x = tokens(1, 2, 3, 24, 24)
    assert_same(outcome(accelerated(original), x), outcome(original, x), 1e-11)


class Doubled(nn.LayerNorm):
    """Its forward is not that of its base."""

    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize("rate", [0.0, 0.4])
def test_dropout_of_attention_weights_keeps_the_original_path(rate):
    original = small(attention_dropout=rate).train()
    fast, x = accelerated(original), clips()
    assert calls(fast, x)["window_attention"] == (0 if rate else 4)
    assert calls(fast, x)["residual_norm"] == 4
    assert_same(outcome(fast, x), outcome(original, x), 1e-5)
    assert calls(fast.eval(), x) == FUSED
    assert_same(outcome(fast, x), outcome(original.eval(), x), 1e-5)
    # Back again: what a module does is asked each time.
    assert calls(fast.train(), x)["window_attention"] == (0 if rate else 4)


def test_dropout_of_the_projection():
    """Not the original's draws, but the original's rate and factor, and in training alone."""
    fast = accelerated(block(dropout=0.4).attn).double()
    x = tokens(*GRID)
    kept = fast(x)
    dropped = fast.train()(x)
    is_kept = dropped != 0
    assert 0.55 < is_kept.double().mean() < 0.65
    torch.testing.assert_close(dropped[is_kept], kept[is_kept] / 0.6)


def test_dropout_in_the_mlp_is_its_own():
    original = small(dropout=0.3).double()
    original.features.train()
    for each in original.modules():
        if isinstance(each, ShiftedWindowAttention3d):
            each.dropout = 0.0
    x = clips(dtype=torch.float64)
    assert_same(outcome(accelerated(original), x), outcome(original, x), 1e-11)


def test_attributes_are_read_at_each_pass():
    original = block(window=(2, 3, 3), shift=(0, 0, 0)).double()
    fast, x = accelerated(original), tokens(*GRID)
    before = fast(x)
    for each in (original, fast):
        each.attn.shift_size = [1, 1, 1]
        each.norm2.eps = 0.5
    assert_same(outcome(fast, x), outcome(original, x), 1e-11)
    assert distance(fast(x), before) > 1e-3


def test_parameters_of_another_moment():
    """Those of `functional_call`, and those that a state dict brings."""
    original, other = small().double(), randomize(SwinTransformer3d(**SMALL), seed=7).double()
    fast, x = accelerated(original), clips(dtype=torch.float64)
    state = other.eval().state_dict()
    got = torch.func.functional_call(fast, state, (x,))
    torch.testing.assert_close(got, other(x), rtol=1e-10, atol=1e-10)
    fast.load_state_dict(state)
    assert_same(outcome(fast, x), outcome(other, x), 1e-11)


def test_a_clip_has_the_same_logits_in_any_batch():
    fast, x = accelerated(small()).double(), clips((3, *PADDED[1:]), torch.float64)
    with torch.inference_mode():
        alone = torch.cat([fast(each[None]) for each in x])
        torch.testing.assert_close(fast(x), alone, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kernels", ["cpu", "fused", "auto"])
def test_words_for_processors_run_their_kernels(kernels):
    if kernels == "auto" and suite.reason_against("window_attention", "auto"):
        pytest.skip("auto runs nothing here")
    assert calls(accelerated(small(), kernels), clips()) == FUSED


@suite.every("window_attention", compiled=True)
def test_a_block_and_a_merging_by_every_kernel_set(run):
    """Head widths of 16: what kernels for GPUs take."""
    for operator in ("residual_norm", "patch_merging"):
        suite.skip_absent(operator, run)
    torch.manual_seed(0)
    parts = [SwinTransformerBlock(32, 2, [2, 3, 3], [1, 1, 1], attn_layer=ShiftedWindowAttention3d)]
    original = randomize(nn.Sequential(*parts, PatchMerging(32))).eval()
    fast = accelerated(original, run.kernels).to(run.device)
    x = tokens(1, 3, 4, 5, 32, dtype=torch.float32)
    with torch.no_grad():
        got = fast(x.to(run.device)).cpu()
        assert distance(got, original(x)) < 1e-5
    assert calls(fast, x.to(run.device), kernels=run.kernels) == {
        "window_attention": 1,
        "residual_norm": 1,
        "patch_merging": 1,
    }


def test_a_real_model():
    torch.manual_seed(0)
    original = randomize(swin3d_t()).eval()
    fast, x = accelerate(copy.deepcopy(original)), clips((1, 3, 4, 48, 40))
    with torch.inference_mode():
        got, own, exact = fast(x), original(x), original.double()(x.double())
    suite.assert_budget(got, exact, own)


@pytest.mark.slow
@pytest.mark.parametrize("build", [swin3d_t, swin3d_s, swin3d_b])
def test_logits_and_gradients_of_real_models(build):
    torch.manual_seed(0)
    original = randomize(build()).eval()
    fast, x = accelerated(original), clips((1, 3, 8, 64, 64))
    exact = outcome(copy.deepcopy(original).double(), x.double())
    assert_same(outcome(copy.deepcopy(fast).double(), x.double()), exact, 1e-10)
    assert_within(outcome(fast, x), outcome(original, x), exact, torch.float32)
    got, own = (outcome(each, x, autocast=torch.bfloat16) for each in (fast, original))
    assert_within(got, own, exact, torch.bfloat16)
