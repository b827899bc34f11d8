"""Converting to the formats of other programs, and our own files."""

import functools
import os
from pathlib import Path

import pytest
import torch
from model_suite import error
from torchvision.models.video.swin_transformer import SwinTransformer3d
from weights_suite import (
    CLASSES,
    FORMATS,
    SMALL,
    assert_holds,
    assert_same_dict,
    buffers_of,
    imagenet_dict,
    mmaction2_dict,
    model_of,
    official_dict,
    parameters_of,
    position_index,
    snapshot,
    torchvision_dict,
)

from model import load_weights
from model.weights import Loaded, WeightsError, save_weights, to_official, to_torchvision

WINDOW = SMALL["window_size"]


@functools.cache
def expected_of(convert, classes):
    """What a conversion must give; official files have the prefix, bare backbones too."""
    return {to_official: official_dict, to_torchvision: torchvision_dict}[convert](classes=classes)


@pytest.mark.parametrize("convert", [to_official, to_torchvision])
@pytest.mark.parametrize("classes", [CLASSES, None], ids=["classifier", "backbone"])
@pytest.mark.parametrize("form", FORMATS)
def test_every_format_converts_to_both_through_a_model_and_without(form, classes, convert):
    state = FORMATS[form](classes=classes, prefix=classes is not None)
    window = WINDOW if form == "own" else None
    net = model_of(classes=classes)
    load_weights(net, state)
    for converted in (convert(net), convert(state, window), convert(state, WINDOW)):
        assert type(converted) is dict
        assert_same_dict(converted, expected_of(convert, classes))
        assert not any(value.requires_grad for value in converted.values())


@pytest.mark.parametrize("convert", [to_official, to_torchvision])
@pytest.mark.parametrize("form", FORMATS)
def test_without_index_buffers_a_mapping_needs_its_window(form, convert):
    state = parameters_of(FORMATS[form]())
    with pytest.raises(ValueError, match="window_size"):
        convert(state)
    assert_same_dict(convert(state, WINDOW), expected_of(convert, CLASSES))


@pytest.mark.parametrize("convert", [to_official, to_torchvision])
@pytest.mark.parametrize("wrapping", ["module.", "_orig_mod."])
def test_prefixes_of_wrappers_are_converted_away(wrapping, convert):
    state = {f"{wrapping}{name}": value for name, value in mmaction2_dict().items()}
    assert_same_dict(convert(state), expected_of(convert, CLASSES))


def source_of(form):
    """(weights, a function that reads them) of a format, or of one of our models."""
    if form == "model":
        net = model_of()
        return net, lambda: snapshot(net)
    state = FORMATS[form]()
    return state, lambda: {name: value.clone() for name, value in state.items()}


@pytest.mark.parametrize("convert", [to_official, to_torchvision])
@pytest.mark.parametrize("form", [*FORMATS, "model"])
def test_conversion_leaves_its_source_as_it_was(form, convert):
    weights, read = source_of(form)
    before = read()
    convert(weights, WINDOW).clear()
    assert_same_dict(read(), before)


@pytest.mark.parametrize("convert", [to_official, to_torchvision])
@pytest.mark.parametrize("form", [*FORMATS, "model"])
def test_what_is_converted_shares_no_memory_with_its_source(form, convert):
    weights, read = source_of(form)
    before = read()
    for value in convert(weights, WINDOW).values():
        value.zero_()
    assert_same_dict(read(), before)


@pytest.mark.parametrize("convert", [to_official, to_torchvision])
def test_two_conversions_share_no_index_buffer(convert):
    first, second = convert(model_of()), convert(model_of())
    for name in buffers_of(first):
        first[name].zero_()
    assert_same_dict(
        {n: second[n] for n in buffers_of(second)},
        {name: position_index(WINDOW) for name in buffers_of(second)},
    )


@pytest.mark.parametrize("convert", [to_official, to_torchvision])
def test_weights_of_images_are_not_converted(convert):
    with pytest.raises(WeightsError) as caught:
        convert(imagenet_dict(), WINDOW)
    assert "\n" not in str(caught.value)


def test_torchvision_itself_loads_what_is_converted_for_it():
    theirs = SwinTransformer3d(
        patch_size=[2, 4, 4], embed_dim=16, depths=[2, 1], num_heads=[1, 2],
        window_size=[2, 3, 3], num_classes=CLASSES,
    ).eval()  # fmt: skip
    ours = model_of()
    theirs.load_state_dict(to_torchvision(ours))
    clips = torch.randn(1, 3, 7, 34, 26)
    assert error(ours(clips), theirs(clips)) < 1e-5


@pytest.mark.parametrize("classes", [CLASSES, None], ids=["classifier", "backbone"])
@pytest.mark.parametrize("name", ["new.pt", "new.pth", "new.safetensors"])
def test_our_own_files_load_back_to_the_bit(name, classes, tmp_path):
    source, net = model_of(classes=classes, seed=1), model_of(classes=classes)
    path = tmp_path / name
    path.write_text("an older file")
    for kind in (str, Path):
        save_weights(source, kind(path))
        assert os.listdir(tmp_path) == [name]
        loaded = load_weights(net, path)
        assert_holds(net, snapshot(source))
        assert loaded == Loaded(format="own", dropped=(), fresh=(), resized=())
    half = model_of(classes=classes).bfloat16()
    load_weights(half, path)
    assert_holds(half, snapshot(source))


def test_our_own_files_have_one_of_three_suffixes(tmp_path):
    for name in ("new.bin", "new", "new.pt.gz"):
        with pytest.raises(ValueError, match="safetensors"):
            save_weights(model_of(), tmp_path / name)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["new.pt", "new.safetensors"])
def test_a_write_that_dies_leaves_the_old_file(name, tmp_path, monkeypatch):
    path, older = tmp_path / name, model_of(seed=1)
    save_weights(older, path)

    def die(*_):
        raise OSError("the machine goes down")

    monkeypatch.setattr(os, "replace", die)
    with pytest.raises(OSError, match="goes down"):
        save_weights(model_of(seed=2), path)
    net = model_of()
    load_weights(net, path)
    assert_holds(net, snapshot(older))
