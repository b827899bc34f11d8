"""The model: sizes, arithmetic per layer, training behaviour, dtypes, refusals."""

import functools

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from model_suite import randomize
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import model.video_swin
from model import SwinTransformer3D, VideoSwin, create
from model.variants import VARIANTS
from videoswin_kernels.ops import _vectors

SMALL = dict(
    patch_size=(2, 4, 4),
    patch_norm=True,
    window_size=(8, 7, 7),
    embed_dim=16,
    depths=(2, 2),
    num_heads=(1, 2),
)


def small(**overrides):
    return SwinTransformer3D(**{**SMALL, **overrides})


def clips(*size, dtype=torch.float32):
    return torch.randn(*size, dtype=dtype)


@pytest.mark.parametrize(
    ("name", "classes", "parameters"),
    [
        ("swin_t", None, 27_850_470),
        ("swin_t", 400, 28_158_070),
        ("swin_t", 600, 28_311_870),
        ("swin_t", 700, 28_388_770),
        ("swin_t", 174, 27_984_276),
        ("swin_s", None, 49_509_078),
        ("swin_s", 400, 49_816_678),
        ("swin_s", 600, 49_970_478),
        ("swin_s", 700, 50_047_378),
        ("swin_s", 174, 49_642_884),
        ("swin_b", None, 87_638_984),
        ("swin_b", 400, 88_048_984),
        ("swin_b", 600, 88_253_984),
        ("swin_b", 700, 88_356_484),
        ("swin_b", 174, 87_817_334),
        ("swin_b_w1677", None, 88_655_688),
        ("swin_b_w1677", 400, 89_065_688),
        ("swin_b_w1677", 600, 89_270_688),
        ("swin_b_w1677", 700, 89_373_188),
        ("swin_b_w1677", 174, 88_834_038),
        ("swin_l", None, 196_339_116),
        ("swin_l", 400, 196_953_916),
        ("swin_l", 600, 197_261_316),
        ("swin_l", 700, 197_415_016),
        ("swin_l", 174, 196_606_554),
    ],
)
def test_parameter_counts(name, classes, parameters):
    with torch.device("meta"):
        built = create(name, num_classes=classes)
    assert sum(p.numel() for p in built.parameters()) == parameters
    assert not list(built.buffers())


def test_parameter_count_of_swin_l_at_384_pixels():
    with torch.device("meta"):
        built = create("swin_l", num_classes=400, window_size=(8, 12, 12))
    assert sum(p.numel() for p in built.parameters()) == 199_999_516


@pytest.mark.parametrize(
    ("name", "gmacs"),
    [
        ("swin_t", 87.76),
        ("swin_s", 165.68),
        ("swin_b", 281.33),
        ("swin_b_w1677", 320.36),
        ("swin_l", 603.27),
    ],
)
def test_multiply_accumulates_of_a_view(name, gmacs):
    with torch.device("meta"):
        backbone = create(name).eval()
        view = torch.empty(1, 3, 32, 224, 224)
    with FlopCounterMode(display=False) as counter:
        backbone(view)
    assert counter.get_total_flops() / 2e9 == pytest.approx(gmacs, abs=0.1)


@pytest.mark.trap(14)
def test_the_mlp_has_the_exact_gelu():
    mlp = randomize(model.video_swin.Mlp(16, 64)).double()
    x = 2 * clips(5, 16, dtype=torch.float64)
    exact = F.linear(F.gelu(mlp.fc1(x)), mlp.fc2.weight, mlp.fc2.bias)
    tanh = F.linear(F.gelu(mlp.fc1(x), approximate="tanh"), mlp.fc2.weight, mlp.fc2.bias)
    assert torch.equal(mlp(x), exact)
    assert (exact - tanh).abs().max() > 1e-4


@pytest.mark.trap(18)
def test_stochastic_depth_grows_linearly_over_all_blocks():
    backbone = small(depths=(2, 3), drop_path_rate=0.4)
    rates = [block.drop_path.rate for layer in backbone.layers for block in layer.blocks]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])


@pytest.mark.trap(18)
def test_stochastic_depth_drops_each_branch_of_each_clip_on_its_own():
    backbone = small(depths=(2,), num_heads=(1,), drop_path_rate=0.5).train()
    block = randomize(backbone.layers[0].blocks[1])
    x = clips(64, 1, 2, 3, 16)
    drawn = []
    block.drop_path.register_forward_hook(lambda *args: drawn.append(args[-1]))
    out = block(x)
    assert len(drawn) == 2
    assert set(torch.cat(drawn).tolist()) == {0.0, 2.0}
    assert not torch.equal(*drawn)
    assert 0.3 < torch.cat(drawn).eq(0).float().mean() < 0.7
    both_dropped = (drawn[0] == 0) & (drawn[1] == 0)
    assert torch.equal(out[both_dropped], x[both_dropped])
    assert not torch.isclose(out[~both_dropped], x[~both_dropped]).all()
    # A kept branch counts double: the mean over draws is the undropped block.
    first = x + 2 * block.attn(block.norm1(x))
    torch.testing.assert_close(
        out[drawn[0] > 0], (first + _second_branch(block, first, drawn[1]))[drawn[0] > 0]
    )


def _second_branch(block, x, factor):
    return block.mlp(block.norm2(x)) * factor.view(-1, 1, 1, 1, 1)


def test_nothing_is_dropped_in_eval_mode():
    backbone = small(drop_rate=0.5, attn_drop_rate=0.5, drop_path_rate=0.5).eval()
    x = clips(2, 3, 4, 32, 32)
    assert torch.equal(backbone(x), backbone(x))
    backbone.train()
    assert not torch.equal(backbone(x), backbone(x))


@pytest.mark.trap(19)
@pytest.mark.parametrize("drop", ["drop_rate", "attn_drop_rate", "drop_path_rate"])
def test_checkpointing_changes_no_gradient(drop):
    grads = []
    for use_checkpoint in (False, True):
        backbone = randomize(small(**{drop: 0.5}, use_checkpoint=use_checkpoint)).train()
        x = torch.randn(2, 3, 4, 32, 32, generator=torch.Generator().manual_seed(1))
        torch.manual_seed(2)
        backbone(x).square().sum().backward()
        grads.append([p.grad for p in backbone.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_checkpointing_keeps_fewer_activations():
    saved = {}
    for use_checkpoint in (False, True):
        backbone, kept = small(use_checkpoint=use_checkpoint).train(), []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, kept=kept: kept.append(t.numel()) or t, lambda t: t
        ):
            backbone(clips(1, 3, 4, 32, 32))
        saved[use_checkpoint] = sum(kept)
    assert saved[True] < saved[False] / 3


@pytest.mark.trap(20)
@pytest.mark.parametrize("frozen", [-1, 0, 1, 2])
@pytest.mark.parametrize("use_checkpoint", [False, True])
def test_every_trainable_parameter_gets_a_gradient(frozen, use_checkpoint):
    backbone = small(frozen_stages=frozen, use_checkpoint=use_checkpoint).train()
    backbone(clips(1, 3, 4, 32, 32)).square().sum().backward()
    for name, parameter in backbone.named_parameters():
        is_frozen = (frozen >= 0 and name.startswith("patch_embed")) or any(
            name.startswith(f"layers.{stage}.") for stage in range(max(frozen, 0))
        )
        assert parameter.requires_grad is not is_frozen, name
        assert (parameter.grad is None) is is_frozen, name


def test_modes_return_the_model_and_leave_frozen_stages_in_eval_mode():
    backbone = small(frozen_stages=1, drop_rate=0.5)
    assert backbone.train() is backbone
    assert not backbone.patch_embed.training
    assert not backbone.pos_drop.training
    assert not any(module.training for module in backbone.layers[0].modules())
    assert all(module.training for module in backbone.layers[1].modules())
    assert backbone.norm.training
    assert backbone.eval() is backbone
    assert not any(module.training for module in backbone.modules())


@pytest.mark.trap(28)
@pytest.mark.parametrize("frames", [1, 5, 16])
def test_the_depth_is_halved_by_the_patches_and_never_again(frames):
    backbone = small(depths=(1, 1, 1), num_heads=(1, 2, 4))
    features = backbone(clips(1, 3, frames, 36, 52))
    assert features.shape == (1, 64, -(-frames // 2), 3, 4)


@pytest.mark.trap(29)
def test_the_head_pools_all_tokens_at_once_in_float32():
    head = model.video_swin.I3DHead(8, 5, dropout=0.5).eval().bfloat16()
    nn.init.normal_(head.fc_cls.weight)
    features = (100 + clips(2, 8, 3, 5, 7)).bfloat16()
    pooled = features.double().mean(dim=(2, 3, 4)).bfloat16()
    assert torch.equal(head(features), head.fc_cls(pooled))


@pytest.mark.trap(29)
def test_dropout_of_the_head_comes_after_the_pooling():
    head = model.video_swin.I3DHead(1000, 1, dropout=0.5).train()
    nn.init.ones_(head.fc_cls.weight)
    # Dropped per pooled channel and doubled: an even number near 1000, which dropping
    # tokens before the pooling would not give.
    logit = head(torch.ones(1, 1000, 2, 3, 3)).item()
    assert logit % 2 == 0
    assert 800 < logit < 1200


@pytest.mark.trap(30)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_module_in_half_precision_runs_and_stays_in_it(dtype):
    # 20 frames pad the depth, 44 pixels the width; the blocks shift, so the mask is added.
    net = randomize(VideoSwin(small(), 7)).eval()
    x = clips(1, 3, 20, 32, 44)
    exact = net.double()(x.double())
    half = net.to(dtype)(x.to(dtype))
    assert half.dtype == dtype
    # Some 20 roundings on the way to the logits; a wrong mask or bias is off by its size.
    assert (half.double() - exact).norm() / exact.norm() < 8 * torch.finfo(dtype).eps
    half_features = net.backbone(x.to(dtype))
    assert half_features.dtype == dtype


def test_autocast_runs_matrix_products_in_bfloat16_and_trains_float32_weights():
    net = randomize(VideoSwin(small(), 7)).eval()
    x = clips(1, 3, 20, 32, 44)
    with torch.autocast("cpu", torch.bfloat16):
        attended = net.backbone.layers[0].blocks[0].attn(clips(1, 2, 8, 8, 16))
        logits = net(x)
    assert attended.dtype == torch.bfloat16
    logits.float().square().sum().backward()
    halved = {name: p.grad for name, p in net.named_parameters()}
    net.zero_grad()
    exact = net(x)
    exact.square().sum().backward()
    assert (logits.float() - exact).norm() / exact.norm() < 8 * torch.finfo(torch.bfloat16).eps
    for name, parameter in net.named_parameters():
        assert halved[name].dtype == torch.float32
        cosine = F.cosine_similarity(halved[name].flatten(), parameter.grad.flatten(), dim=0)
        assert cosine > 0.99, name


@pytest.mark.trap(31)
@pytest.mark.parametrize("kernels", ["reference", "auto"])
def test_clips_of_many_sizes_leave_nothing_behind(kernels, monkeypatch):
    import gc

    # Kernels keep vectors of indices: none but the newest under this bound.
    monkeypatch.setattr(_vectors, "_held", {})
    monkeypatch.setattr(_vectors, "CPU_BYTES", 1)
    backbone = small(depths=(2,), num_heads=(1,), kernels=kernels).eval()

    def tensors():
        gc.collect()
        return sum(issubclass(type(item), torch.Tensor) for item in gc.get_objects())

    with torch.inference_mode():
        backbone(clips(1, 3, 4, 32, 32))
        before = tensors()
        for width in range(36, 68, 4):
            backbone(clips(1, 3, 4, 32, width))
    assert tensors() == before


def test_views_are_clips_and_their_logits_stand_apart():
    net = randomize(VideoSwin(small(), 7)).eval()
    x = clips(2, 3, 3, 4, 32, 32)
    logits = net(x)
    assert logits.shape == (2, 3, 7)
    torch.testing.assert_close(logits[1, 2], net(x[1, 2][None])[0])
    assert net(x[:0]).shape == (0, 3, 7)


def test_out_indices_return_the_tokens_before_each_merging():
    backbone = small(out_indices=(0, 1)).eval()
    plain = small().eval()
    missing, unexpected = plain.load_state_dict(backbone.state_dict(), strict=False)
    assert not missing
    assert unexpected == ["norm0.weight", "norm0.bias"]
    x = clips(1, 3, 4, 32, 48)
    first, last = backbone(x)
    assert first.shape == (1, 16, 2, 8, 12)
    assert torch.equal(last, plain(x))
    stage = plain.layers[0](plain.patch_embed(x))
    torch.testing.assert_close(first.permute(0, 2, 3, 4, 1), F.layer_norm(stage, (16,)))
    early = small(out_indices=(0,)).eval()
    early.layers[1].register_forward_hook(lambda *_: pytest.fail("a stage ran for nothing"))
    assert early(x)[0].shape == first.shape


def test_an_empty_batch_gives_empty_features():
    assert small().eval()(clips(0, 3, 4, 32, 32)).shape == (0, 32, 2, 4, 4)


def test_the_model_compiles_whole_with_one_graph_for_two_batch_sizes():
    net = randomize(VideoSwin(small(), 7)).eval()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(net, fullgraph=True, backend=counter)
    for batch in (2, 3):
        x = clips(batch, 3, 20, 32, 44)
        # Only the batch: one graph for many grids is what compiled kernel sets are for.
        torch._dynamo.mark_dynamic(x, 0)
        torch.testing.assert_close(compiled(x), net(x))
    assert counter.frame_count == 1


def test_initial_weights():
    torch.manual_seed(0)
    net = VideoSwin(small(embed_dim=96, num_heads=(3, 6)), 400)
    for name, parameter in net.named_parameters():
        if "patch_embed.proj" in name:
            bound = (3 * 2 * 4 * 4) ** -0.5
            assert 0.9 * bound < parameter.abs().max() <= bound
        elif name.endswith("bias"):
            assert not parameter.any(), name
        elif "norm" in name:
            assert (parameter == 1).all(), name
        elif "fc_cls" in name:
            assert parameter.std().item() == pytest.approx(0.01, rel=0.05)
        elif parameter.dim() == 2:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.05), name


@pytest.mark.parametrize(
    ("overrides", "kind", "sentence"),
    [
        (dict(window_size=(8, 7)), ValueError, r"window_size must be three integers.*\(8, 7\)"),
        (dict(patch_size=(2, 4, 0)), ValueError, r"patch_size must be three.*\(2, 4, 0\)"),
        (dict(num_heads=(1,)), ValueError, r"num_heads must have one entry per stage"),
        (dict(num_heads=(3, 2)), ValueError, "num_heads must divide the 16 channels of stage 0"),
        (dict(frozen_stages=3), ValueError, "frozen_stages must be -1 to 2, got 3"),
        (
            dict(out_indices=(2,)),
            ValueError,
            r"out_indices must be stages within 0 to 1, got \(2,\)",
        ),
        (dict(out_indices=()), ValueError, r"out_indices must be stages within 0 to 1, got \(\)"),
        (dict(frozen_stages=None), ValueError, "frozen_stages must be -1 to 2, got None"),
        (dict(num_heads=(0, 1)), ValueError, r"num_heads must be integers of at least 1.*\(0, 1\)"),
        (dict(depths=()), ValueError, r"depths must be integers of at least 1, got \(\)"),
        (dict(depths=2), ValueError, "depths must be integers of at least 1, got 2"),
        (dict(embed_dim=0), ValueError, "embed_dim must be integers of at least 1, got 0"),
        (dict(mlp_ratio=-1), ValueError, "mlp_ratio must be above 0, got -1"),
        (dict(drop_path_rate=1.0), ValueError, "drop_path_rate must be at least 0 and below 1"),
        (dict(kernels="fast"), ValueError, "kernels must be one of auto, .*got 'fast'"),
        (dict(norm_layer=nn.BatchNorm1d), TypeError, "norm_layer must make nn.LayerNorm"),
        (
            dict(norm_layer=functools.partial(nn.LayerNorm, elementwise_affine=False)),
            TypeError,
            "norm_layer must make nn.LayerNorm with weight and bias",
        ),
    ],
)
def test_the_backbone_refuses(overrides, kind, sentence):
    with pytest.raises(kind, match=f"SwinTransformer3D: {sentence}"):
        small(**overrides)


@pytest.mark.parametrize("size", [(3, 4, 32, 32), (1, 1, 4, 32, 32), (1, 3, 0, 32, 32)])
def test_the_backbone_refuses_clips_of_another_shape(size):
    with pytest.raises(ValueError, match=r"clips must be \[B, 3, T, H, W\].*got \["):
        small()(clips(*size))


def test_the_classifier_refuses():
    with pytest.raises(ValueError, match="VideoSwin: backbone must return one feature map"):
        VideoSwin(small(out_indices=(0, 1)), 7)
    with pytest.raises(ValueError, match=r"VideoSwin: clips must be \[B, 3, T, H, W\] or"):
        VideoSwin(small(), 7)(clips(3, 4, 32, 32))


def test_kernels_that_cannot_run_are_refused_at_the_first_clip(no_libraries):
    backbone = small(kernels="fused")
    with pytest.raises(RuntimeError, match="kernels='fused' cannot run"):
        backbone(clips(1, 3, 4, 32, 32))


def test_create_refuses():
    with pytest.raises(ValueError, match=r"create: name must be one of swin_t, .*got 'swin_x'"):
        create("swin_x")
    with pytest.raises(ValueError, match="create: weights must be a name that swin_nano has"):
        create("swin_nano", weights="k400")
    with pytest.raises(TypeError, match="create: fresh and interpolate_time belong to weights"):
        create("swin_nano", num_classes=3, fresh=("cls_head",))
    with pytest.raises(TypeError, match="create: dropout belongs to the head"):
        create("swin_nano", dropout=0.1)
    with pytest.raises(TypeError, match="window"):
        create("swin_nano", window=(8, 7, 7))


@pytest.mark.parametrize("name", VARIANTS)
def test_create_passes_overrides_on(name):
    with torch.device("meta"):
        net = create(name, num_classes=5, dropout=0.1, kernels="reference", drop_path_rate=0.05)
    assert net.cls_head.dropout.p == 0.1
    assert net.backbone.layers[-1].blocks[-1].drop_path.rate == pytest.approx(0.05)
    users = [module for module in net.modules() if hasattr(module, "operator")]
    assert {module.kernels for module in users} == {"reference"}
