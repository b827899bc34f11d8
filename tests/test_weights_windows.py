"""Windows of equal shapes, plain `load_state_dict`, and models built with their weights."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from weights_suite import (
    CLASSES,
    FORMATS,
    SMALL,
    assert_holds,
    buffers_of,
    check_sentence,
    imagenet_dict,
    mmaction2_dict,
    model_of,
    official_dict,
    own_dict,
    parameters_of,
    position_index,
    refusal,
    snapshot,
)

from model import SwinTransformer3D, create, load_weights
from model.variants import VARIANTS
from model.weights import WeightsError, save_weights

LIKE_RELEASED = {**SMALL, "window_size": (8, 7, 7), "depths": (1,), "num_heads": (1,)}
TURNED = {**LIKE_RELEASED, "window_size": (7, 8, 7)}


@pytest.mark.trap(24)
@pytest.mark.parametrize(
    ("write", "suffix"), [(torch.save, ".pth"), (save_file, ".safetensors"), (None, "")]
)
@pytest.mark.parametrize("form", ["official", "mmaction2", "torchvision"])
def test_a_file_of_another_window_of_the_same_shapes_is_refused(form, write, suffix, tmp_path):
    state, turned = FORMATS[form](LIKE_RELEASED), FORMATS[form](TURNED)
    assert {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in turned.items()}
    right, wrong = state, turned
    if write is not None:
        right, wrong = tmp_path / f"right{suffix}", tmp_path / f"wrong{suffix}"
        write(state, right)
        write(turned, wrong)
    net = model_of(LIKE_RELEASED)
    for options in ({}, {"interpolate_time": True}):
        message = refusal(net, wrong, **options)
        assert "7x8x7" in message
        assert "8x7x7" in message
    load_weights(net, right)
    assert_holds(net, own_dict(LIKE_RELEASED))


@pytest.mark.trap(24)
@pytest.mark.parametrize("name", ["new.pt", "new.safetensors"])
def test_our_own_file_of_another_window_of_the_same_shapes_is_refused(name, tmp_path):
    save_weights(model_of(TURNED, seed=1), tmp_path / name)
    message = refusal(model_of(LIKE_RELEASED), tmp_path / name)
    assert "7x8x7" in message
    assert "8x7x7" in message
    load_weights(model_of(TURNED), tmp_path / name)


@pytest.mark.trap(24)
@pytest.mark.parametrize("classes", [CLASSES, None], ids=["classifier", "backbone"])
def test_plain_load_state_dict_checks_index_buffers(classes):
    prefix = classes is not None
    net = model_of(LIKE_RELEASED, classes)
    state = official_dict(LIKE_RELEASED, classes, prefix)
    wrong = official_dict(TURNED, classes, prefix)
    (name,) = buffers_of(state)
    with pytest.raises(RuntimeError, match=name.replace(".", r"\.")):
        net.load_state_dict(wrong)
    with pytest.raises(RuntimeError, match=name.replace(".", r"\.")):
        net.load_state_dict({**state, name: position_index((4, 7, 7))})
    result = net.load_state_dict(state)
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert_holds(net, parameters_of(state))
    assert not buffers_of(net.state_dict())
    assert not list(net.buffers())


@pytest.mark.parametrize("pretrained2d", [True, False])
@pytest.mark.parametrize("as_file", [True, False])
def test_a_backbone_is_built_with_its_weights(pretrained2d, as_file, tmp_path):
    for state in (official_dict(), mmaction2_dict(classes=None, prefix=False), imagenet_dict()):
        weights = {"model": state}
        if as_file:
            weights = tmp_path / "weights.pth"
            torch.save({"model": state}, weights)
        built = SwinTransformer3D(weights, pretrained2d, **SMALL, frozen_stages=1)
        expected = model_of(classes=None)
        load_weights(expected, state)
        assert_holds(built, snapshot(expected))
        assert not built.patch_embed.proj.weight.requires_grad


def test_a_backbone_is_not_built_with_weights_of_another():
    with pytest.raises(WeightsError) as caught:
        SwinTransformer3D(official_dict(), **{**SMALL, "window_size": (4, 3, 3)})
    check_sentence(str(caught.value))


NANO = {**VARIANTS["swin_nano"]}


@pytest.mark.parametrize("as_file", [str, Path, None])
def test_create_takes_a_path_or_a_mapping(as_file, tmp_path):
    weights = state = official_dict(NANO)
    if as_file:
        torch.save(state, tmp_path / "nano.pth")
        weights = as_file(tmp_path / "nano.pth")
    assert_holds(create("swin_nano", num_classes=CLASSES, weights=weights), own_dict(NANO))
    backbone = create("swin_nano", weights=weights)
    assert_holds(backbone, own_dict(NANO, classes=None, prefix=False))


def test_create_passes_on_what_loading_may_do():
    state = official_dict(NANO)
    with pytest.raises(WeightsError, match=r'fresh=\("cls_head",\)'):
        create("swin_nano", num_classes=9, weights=state)
    net = create("swin_nano", num_classes=9, weights=state, fresh=("cls_head",))
    assert_holds(net.backbone, own_dict(NANO, classes=None, prefix=False))
    assert not net.cls_head.fc_cls.bias.any()
    longer = dict(num_classes=CLASSES, weights=state, window_size=(8, 4, 4))
    with pytest.raises(WeightsError, match="interpolate_time=True"):
        create("swin_nano", **longer)
    create("swin_nano", **longer, interpolate_time=True)


def test_create_lists_the_weights_a_variant_has():
    with pytest.raises(ValueError, match="k401") as caught:
        create("swin_t", num_classes=400, weights="k401")
    assert not isinstance(caught.value, WeightsError)
    for name in ("k400", "k400_torchvision", "in1k"):
        assert name in str(caught.value)
