"""`accelerate` on the classes of the official repository and of mmaction2 1.x.

`official_structures` has them; `model.create` judges it, so that what is compared is Video Swin.
"""

import pickle

import official_structures as structures
import pytest
import torch
from accelerate_suite import (
    FUSED,
    accelerated,
    assert_same,
    assert_within,
    calls,
    clips,
    distance,
    listen,
    outcome,
    runs_here,
    tokens,
    types,
)
from model_suite import randomize
from official_structures import MmcvDropPath, TimmDropPath, mask_of, mm, official
from torch import nn

from model import SwinTransformer3D
from videoswin_kernels import accelerate, explain

pytestmark = runs_here

FAMILIES = pytest.mark.parametrize("family", [official, mm], ids=["official", "mm"])
# For patches (2, 4, 4): token grids padded on all axes, clamped, odd, and of whole windows.
SIZES = {
    "padded": (2, 3, 6, 40, 36),
    "clamped": (1, 3, 2, 8, 8),
    "thin": (3, 3, 8, 4, 52),
    "exact": (1, 3, 8, 24, 24),
}
X = clips(SIZES["padded"], torch.float64)


def backbone(family, **options):
    torch.manual_seed(3)
    return randomize(family.SwinTransformer3D(**options)).double().eval()


def block(family, shift=(1, 1, 1), **options):
    """A block whose window is (2, 3, 3), and the mask of a grid (3, 5, 4) padded to (4, 6, 6)."""
    made = family.SwinTransformerBlock3D(24, 2, (2, 3, 3), shift, **options)
    mask = mask_of((4, 6, 6), (2, 3, 3), shift)
    return randomize(made).double().eval(), mask


GRID = tokens(2, 3, 5, 4, 24)


@FAMILIES
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_the_structure_is_video_swin(family, size):
    made = backbone(family)
    judge = SwinTransformer3D(
        patch_size=(2, 4, 4), embed_dim=24, depths=(2, 2), num_heads=(2, 4), window_size=(2, 3, 3)
    )
    state = {
        name.replace("patch_embed.", "patch_embed.proj."): value
        for name, value in made.state_dict().items()
    }
    judge.double().eval().load_state_dict(state)
    x = clips(size, torch.float64)
    torch.testing.assert_close(made(x), judge(x), rtol=1e-10, atol=1e-10)


@FAMILIES
@pytest.mark.parametrize("checkpoints", [False, True])
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_features_and_gradients_are_equal(family, checkpoints, size):
    original = backbone(family, checkpoints=checkpoints)
    fast, x = accelerated(original), clips(size, torch.float64)
    state = original.state_dict()
    assert list(fast.state_dict()) == list(state)
    assert all(torch.equal(fast.state_dict()[name], value) for name, value in state.items())
    assert_same(outcome(fast, x), outcome(original, x), 1e-11)
    counts = calls(fast, x)
    # What is computed again need not be fused with what is kept.
    assert counts == FUSED if not checkpoints else counts["window_attention"] == 4


@FAMILIES
@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=str)
def test_single_and_mixed_precision_are_as_exact(family, autocast):
    exact = outcome(backbone(family), X)
    original = backbone(family).float()
    own, got = (outcome(m, X.float(), autocast=autocast) for m in (original, accelerated(original)))
    assert_within(got, own, exact, autocast or torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("checkpoints", [False, True])
@pytest.mark.parametrize("draws", [TimmDropPath, MmcvDropPath])
def test_stochastic_depth_draws_the_same_numbers(draws, checkpoints, dtype):
    family = structures.family(drop_path=draws)
    original = backbone(family, drop_path_rate=0.5, checkpoints=checkpoints).train().to(dtype)
    fast, x = accelerated(original), clips((6, 3, 4, 24, 20), dtype)
    for seed in (1, 2):
        own = outcome(original, x, seed=seed)
        state = torch.get_rng_state()
        got = outcome(fast, x, seed=seed)
        assert torch.equal(torch.get_rng_state(), state)
        close = 1e-5 if dtype == torch.float32 else 0.1
        assert distance(got["output"], own["output"]) < close
        assert distance(got["input"], own["input"]) < 3 * close
    if not checkpoints:
        assert calls(fast, x) == FUSED


def test_a_branch_may_be_dropped_without_its_factor():
    original, mask = block(official)
    original.drop_path = TimmDropPath(0.5, scale_by_keep=False)
    x = tokens(8, 3, 5, 4, 24)
    fast = accelerated(original.train())
    assert_same(outcome(fast, x, mask), outcome(original, x, mask), 1e-11)


class OtherDropPath(nn.Module):
    """Its rate is under another name than that of others."""

    def __init__(self):
        super().__init__()
        self.rate = 0.5

    def forward(self, x):
        if not self.training:
            return x
        return x * torch.bernoulli(torch.full((len(x), 1, 1, 1, 1), self.rate, dtype=x.dtype))


class Half(nn.Identity):
    """Under the name of what does nothing."""

    def forward(self, x):
        return 0.5 * x


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_subclass_of_identity_in_place_of_stochastic_depth_is_called(when):
    original, mask = block(official)
    fast = accelerated(original, "fused" if when == "after" else "reference")
    original.drop_path = fast.drop_path = Half()
    assert_same(outcome(accelerate(fast), GRID, mask), outcome(original, GRID, mask), 1e-11)


class PerChannel(OtherDropPath):
    """It drops channels in place of clips."""

    def forward(self, x):
        return x * torch.bernoulli(
            torch.full((len(x), 1, 1, 1, x.shape[-1]), self.rate, dtype=x.dtype)
        )


@pytest.mark.parametrize("name", ["DropPath", "Other"])
@pytest.mark.parametrize("kind", [OtherDropPath, PerChannel])
def test_another_stochastic_depth_does_what_it_did(kind, name):
    """Whatever its name; a block that has it may be refused, but not computed otherwise."""
    original, mask = block(official)
    later = accelerated(original.train())
    original.drop_path = later.drop_path = type(name, (kind,), {})()
    own = outcome(original, GRID, mask)
    if kind is OtherDropPath or name == "Other":
        # Of a name that it takes for another's, one that drops no clips cannot be told later.
        assert_same(outcome(later, GRID, mask), own, 1e-11)
    try:
        fast = accelerated(original)
    except ValueError:
        assert kind is PerChannel
        assert name == "DropPath"
    else:
        assert_same(outcome(fast, GRID, mask), own, 1e-11)


@FAMILIES
def test_checkpointing_computes_again_in_place_of_keeping(family):
    kept = {}
    for checkpoints in (False, True):
        model = accelerated(backbone(family, checkpoints=checkpoints))
        block, saved, passes = model.layers[0].blocks[1], [], []
        block.norm1.register_forward_hook(lambda *_, passes=passes: passes.append("norm1"))
        # Before it: to compute again ends with the last tensor that is wanted.
        block.mlp.register_forward_pre_hook(lambda *_, passes=passes: passes.append("mlp"))
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, saved=saved: saved.append(t.numel()) or t, lambda t: t
        ):
            output = model(X)
        output.sum().backward()
        assert passes == ["norm1", "mlp"] + (["mlp", "norm1"] if checkpoints else [])
        kept[checkpoints] = sum(saved)
    assert kept[True] < kept[False] / 2


def test_checkpointing_of_the_older_kind():
    family = structures.family(use_reentrant=True)
    original = backbone(family, checkpoints=True, drop_path_rate=0.3).train()
    fast = accelerated(original)
    assert_same(outcome(fast, X), outcome(original, X), 1e-11)
    reasons = [each.reason for each in explain(fast) if each.kernels == "original"]
    assert [each.partition(" recomputes ")[0] for each in reasons] == [
        f"layers.{stage}.blocks.{place}" for stage in (0, 1) for place in (0, 1)
    ]


@FAMILIES
def test_checkpointing_is_switched_as_before(family):
    name = "use_checkpoint" if family is official else "with_cp"
    fast, mask = block(family)
    passes = []
    accelerate(fast).norm1.register_forward_hook(lambda *_: passes.append(None))
    for checkpoints in (True, False):
        setattr(fast, name, checkpoints)
        passes.clear()
        outcome(fast, GRID, mask)
        assert len(passes) == 1 + checkpoints


@FAMILIES
def test_the_mask_that_a_stage_brings_is_not_read(family):
    original, mask = block(family)
    fast = accelerated(original)
    expected = original(GRID, mask)
    assert distance(original(GRID, 0 * mask), expected) > 1e-3
    for other in (mask, 0 * mask, torch.full_like(mask, torch.nan), mask[:0]):
        torch.testing.assert_close(fast(GRID, other), expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(fast(GRID, mask_matrix=mask), expected, rtol=1e-10, atol=1e-10)
    # Without one nothing is masked, as in the original.
    torch.testing.assert_close(fast(GRID, None), original(GRID, None), rtol=1e-10, atol=1e-10)


@FAMILIES
@pytest.mark.parametrize(
    "options",
    [{"qkv_bias": False}, {"norm_layer": lambda dim: nn.LayerNorm(dim, eps=0.3)}, {"mlp_ratio": 2}],
    ids=lambda options: next(iter(options)),
)
def test_options_of_the_structure(family, options):
    original = backbone(family, **options)
    assert_same(outcome(accelerated(original), X), outcome(original, X), 1e-11)


@FAMILIES
@pytest.mark.parametrize("factor", [0.5, None])
def test_the_scale_of_the_scores_is_that_of_the_module(family, factor):
    """What upstream calls qk_scale."""
    original, mask = block(family)
    fast = accelerated(original)
    for each in (original, fast):
        each.attn.scale = each.attn.scale if factor is None else factor
    assert_same(outcome(fast, GRID, mask), outcome(original, GRID, mask), 1e-11)


@FAMILIES
def test_classes_copies_pickles_and_the_way_back(family):
    original = backbone(family)
    fast = accelerated(original)
    for name, kind in types(fast).items():
        is_part = kind.__name__ in ("SwinTransformerBlock3D", "PatchMerging")
        assert issubclass(kind, types(original)[name])
        assert kind.__name__ == types(original)[name].__name__
        assert (kind is not types(original)[name]) == is_part or kind.__name__.startswith("Window")
    data = pickle.dumps(fast)
    assert b"videoswin" not in data
    assert types(pickle.loads(data)) == types(original)
    assert torch.equal(accelerate(pickle.loads(data))(X), fast(X))
    assert types(accelerate(fast, "reference")) == types(original)
    assert torch.equal(fast(X), original(X))


@FAMILIES
@pytest.mark.parametrize("frozen", ["norm2", "attn", "mlp"])
def test_frozen_parts(family, frozen):
    original, mask = block(family)
    original.get_submodule(frozen).requires_grad_(False)
    got = outcome(accelerated(original), GRID, mask)
    assert_same(got, outcome(original, GRID, mask), 1e-11)
    assert not any(name.startswith(frozen) for name in got)


@FAMILIES
def test_a_subclass_with_a_forward_of_its_own_keeps_it(family):
    class Mine(family.SwinTransformerBlock3D):
        def forward_part2(self, x):
            return 0.5 * super().forward_part2(x)

    class Merging(family.PatchMerging):
        def forward(self, x):
            return 0.5 * super().forward(x)

    original = backbone(family)
    original.layers[0].blocks[1].__class__ = Mine
    original.layers[0].downsample.__class__ = Merging
    fast = accelerated(original)
    assert type(fast.layers[0].blocks[1]) is Mine
    assert type(fast.layers[0].downsample) is Merging
    assert_same(outcome(fast, X), outcome(original, X), 1e-11)
    assert calls(fast, X) == {"window_attention": 3, "residual_norm": 3}


def test_explain_names_the_parts_of_a_backbone():
    fast = accelerate(backbone(official))
    assert {each.operator: each.kernels for each in explain(fast)} == dict.fromkeys(FUSED, "cpu")
    listen(fast.layers[1].blocks[0].attn, "forward", [])
    listen(fast.layers[0].downsample.norm, "forward", [])
    listen(fast.layers[0].blocks[1].drop_path, "forward", [])
    reasons = [each.reason for each in explain(fast) if each.kernels == "original"]
    paths = ["layers.1.blocks.0.attn", "layers.0.downsample.norm", "layers.0.blocks.1.drop_path"]
    assert sorted(reasons) == sorted(f"{path} has hooks" for path in paths)
