"""Loading the formats of other programs: torchvision's released models, and every layout."""

import dataclasses
import gc
from pathlib import Path

import pytest
import torch
from model_suite import error, randomize
from safetensors.torch import save_file
from torch import nn
from torchvision.models.video import swin3d_b, swin3d_s, swin3d_t
from weights_suite import (
    CLASSES,
    FORMATS,
    HEAD,
    SMALL,
    assert_holds,
    assert_same_dict,
    buffers_of,
    model_of,
    official_dict,
    own_dict,
    parameters_of,
    refusal,
    snapshot,
)

from model import SwinTransformer3D, VideoSwin, create, load_weights
from model.weights import Loaded, to_torchvision
from train.checkpoint import save_checkpoint

# One frame; depth, height and width clamped; padding of every kind; windows that fit exactly.
SIZES = [(4, 32, 40), (1, 32, 32), (20, 28, 48), (16, 56, 28), (6, 20, 36), (5, 33, 45)]


@pytest.fixture(scope="module", params=[swin3d_t, swin3d_s, swin3d_b], ids=lambda f: f.__name__)
def twins(request):
    """torchvision's model, ours loaded from its state dict, and what loading reported."""
    theirs = randomize(request.param()).eval()
    ours = create(request.param.__name__.replace("3d", ""), num_classes=400).eval()
    loaded = load_weights(ours, theirs.state_dict())
    yield theirs, ours, loaded
    del theirs, ours
    gc.collect()


@pytest.mark.parametrize("size", SIZES)
def test_logits_are_those_of_torchvision(twins, size):
    theirs, ours, _ = twins
    clips = torch.randn(1, 3, *size)
    with torch.inference_mode():
        got, expected = ours(clips), theirs(clips)
    assert expected.std() > 0.1
    assert error(got, expected) < 1e-5


def test_torchvision_gets_back_what_it_gave(twins):
    theirs, ours, _ = twins
    assert_same_dict(to_torchvision(ours), theirs.state_dict())


def test_of_a_released_torchvision_model_only_index_buffers_are_dropped(twins):
    theirs, _, loaded = twins
    assert loaded.format == "torchvision"
    assert sorted(loaded.dropped) == buffers_of(theirs.state_dict())
    assert loaded.fresh == loaded.resized == ()


@pytest.mark.parametrize("classes", [CLASSES, None], ids=["classifier", "backbone"])
@pytest.mark.parametrize("form", FORMATS)
def test_every_format_loads_exactly_and_says_what_it_was(form, classes):
    prefix = classes is not None
    state = FORMATS[form](classes=classes, prefix=prefix)
    before = {name: (id(value), value.clone()) for name, value in state.items()}
    net = model_of(classes=classes)
    loaded = load_weights(net, state)
    assert_holds(net, own_dict(classes=classes, prefix=prefix))
    assert (loaded.format, sorted(loaded.dropped)) == (form, buffers_of(state))
    assert loaded.fresh == loaded.resized == ()
    assert list(state) == list(before)
    assert all(id(state[name]) == key for name, (key, _) in before.items())
    assert all(torch.equal(state[name], value) for name, (_, value) in before.items())


@pytest.mark.parametrize("form", FORMATS)
def test_a_bare_backbone_drops_the_head_of_a_full_file(form):
    state = FORMATS[form]()
    net = model_of(classes=None)
    loaded = load_weights(net, state)
    assert_holds(net, own_dict(classes=None, prefix=False))
    head = ["head.weight", "head.bias"] if form == "torchvision" else HEAD
    assert sorted(loaded.dropped) == sorted([*buffers_of(state), *head])
    assert loaded.fresh == ()


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("prefix", [False, True])
def test_a_classifier_takes_a_bare_backbone_only_with_a_fresh_head(form, prefix):
    state = FORMATS[form](classes=None, prefix=prefix)
    net = model_of()
    message = refusal(net, state)
    assert all(name in message for name in HEAD)
    head = {name: net.get_parameter(name).detach().clone() for name in HEAD}
    loaded = load_weights(net, state, fresh=("cls_head",))
    assert_holds(net, {**own_dict(classes=None), **head})
    assert sorted(loaded.fresh) == sorted(HEAD)
    assert sorted(loaded.dropped) == buffers_of(state)


@pytest.mark.parametrize("form", FORMATS)
def test_a_head_of_other_classes_is_refused_with_its_cure(form):
    state = FORMATS[form](classes=3)
    net = model_of()
    assert 'fresh=("cls_head",)' in refusal(net, state)
    head = {name: net.get_parameter(name).detach().clone() for name in HEAD}
    loaded = load_weights(net, state, fresh=("cls_head",))
    assert_holds(net, {**own_dict(), **head})
    assert sorted(loaded.fresh) == sorted(HEAD)
    theirs = ["head.weight", "head.bias"] if form == "torchvision" else HEAD
    assert sorted(loaded.dropped) == sorted([*buffers_of(state), *theirs])


def test_norms_of_dense_features_can_be_fresh():
    backbone = model_of({**SMALL, "out_indices": (0, 1)}, classes=None)
    message = refusal(backbone, official_dict())
    assert "norm0.weight" in message
    assert "norm0.bias" in message
    kept = {name: backbone.get_parameter(name).clone() for name in ("norm0.weight", "norm0.bias")}
    loaded = load_weights(backbone, official_dict(), fresh=("norm0",))
    assert_holds(backbone, {**own_dict(classes=None, prefix=False), **kept})
    assert sorted(loaded.fresh) == sorted(kept)


@pytest.mark.parametrize(
    ("fresh", "kind"),
    [(("cls_haed",), ValueError), (("norm0",), ValueError), ("cls_head", TypeError)],
)
def test_fresh_refuses_what_names_no_module(fresh, kind):
    net = model_of()
    before = snapshot(net)
    with pytest.raises(kind):
        load_weights(net, official_dict(), fresh=fresh)
    assert_holds(net, before)


def test_only_our_models_with_storage_are_loaded():
    with pytest.raises(TypeError):
        load_weights(nn.Linear(2, 2), official_dict())
    with torch.device("meta"):
        net = VideoSwin(SwinTransformer3D(**SMALL), CLASSES)
    with pytest.raises(ValueError, match="meta"):
        load_weights(net, official_dict())


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(
    "wrapping", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."]
)
def test_prefixes_of_wrappers_are_dropped_but_reported(form, wrapping):
    state = {f"{wrapping}{name}": value for name, value in FORMATS[form]().items()}
    net = model_of()
    loaded = load_weights(net, state)
    assert_holds(net, own_dict())
    assert loaded.format == form
    assert sorted(loaded.dropped) == buffers_of(state)


@pytest.mark.parametrize(
    "wrap", [nn.DataParallel, torch.compile, lambda net: nn.ModuleDict({"module": net})]
)
def test_a_wrapped_model_of_ours_loads(wrap):
    source, net = model_of(seed=1), model_of()
    load_weights(net, wrap(source).state_dict())
    assert_holds(net, snapshot(source))


def mmcv_container(state):
    return {"meta": {"epoch": 30, "config": "model = dict()\n", "time": "now"}, "state_dict": state}


def timm_container(state):
    return {"model": state, "epoch": 3, "max_accuracy": 81.3, "lr_scheduler": {"last": [0.1]}}


def training_container(state):
    """As mmcv saves while training: other tensors stand beside the weights."""
    moment = {"exp_avg": torch.ones(3), "step": torch.tensor(2.0)}
    return {**mmcv_container(state), "optimizer": {"state": {0: moment}, "param_groups": []}}


@pytest.mark.parametrize("contain", [mmcv_container, timm_container, training_container])
@pytest.mark.parametrize("form", FORMATS)
def test_containers_are_unwrapped(form, contain, tmp_path):
    state = {f"module.{name}": value for name, value in FORMATS[form]().items()}
    torch.save(contain(state), tmp_path / "weights.pth")
    for weights in (contain(state), tmp_path / "weights.pth"):
        net = model_of()
        assert load_weights(net, weights).format == form
        assert_holds(net, own_dict())


def test_a_checkpoint_of_training_loads(tmp_path):
    optimizer = {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 0.1}]}
    path = tmp_path / "last.pt"
    save_checkpoint(path, {"model": own_dict(), "optimizer": optimizer, "step": 7, "broken": {}})
    net = model_of()
    assert load_weights(net, path).format == "own"
    assert_holds(net, own_dict())


def zipped(state, path):
    torch.save(state, path)


def legacy(state, path):
    torch.save(state, path, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("weights.pth", zipped),
        ("weights.pt", zipped),
        ("weights.pth", legacy),
        ("weights.pt", legacy),
        ("epoch_30", zipped),
        ("epoch_30.tar", legacy),
        ("weights.safetensors", save_file),
    ],
)
@pytest.mark.parametrize("kind", [str, Path])
@pytest.mark.parametrize("form", FORMATS)
def test_files_are_known_by_their_content(form, name, write, kind, tmp_path):
    write(FORMATS[form](), tmp_path / name)
    net = model_of()
    assert load_weights(net, kind(tmp_path / name)).format == form
    assert_holds(net, own_dict())


@pytest.mark.parametrize("write", [zipped, save_file])
@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float64, torch.float32])
@pytest.mark.parametrize("used", [torch.float32, torch.bfloat16, torch.float64])
def test_floating_dtypes_become_that_of_the_model(write, stored, used, tmp_path):
    state = official_dict()
    state = {k: v.to(stored) if v.is_floating_point() else v for k, v in state.items()}
    write(state, tmp_path / "weights")
    net = model_of().to(used)
    if write is save_file:
        (tmp_path / "weights").rename(tmp_path / "weights.safetensors")
    load_weights(net, next(tmp_path.iterdir()))
    assert {parameter.dtype for parameter in net.parameters()} == {used}
    assert_holds(net, parameters_of(state))


def test_a_loaded_model_keeps_its_parameters_and_shares_none_with_the_source():
    net, source = model_of().train(), model_of(seed=1)
    net.backbone.patch_embed.requires_grad_(False)
    before = [(id(parameter), parameter.requires_grad) for parameter in net.parameters()]
    load_weights(net, dict(source.named_parameters()))
    assert [(id(parameter), parameter.requires_grad) for parameter in net.parameters()] == before
    assert net.training
    expected = snapshot(source)
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.zero_()
    assert_holds(net, expected)


def test_the_report_is_frozen_and_made_of_tuples():
    loaded = load_weights(model_of(), official_dict())
    assert isinstance(loaded, Loaded)
    fields = [field.name for field in dataclasses.fields(loaded)]
    assert sorted(fields) == ["dropped", "format", "fresh", "resized"]
    assert {type(getattr(loaded, name)) for name in fields if name != "format"} == {tuple}
    with pytest.raises(dataclasses.FrozenInstanceError):
        loaded.format = "own"
