"""Weights of images become those of videos, and bias tables take another window depth."""

import functools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from model_suite import error
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from weights_suite import (
    CLASSES,
    HEAD,
    SMALL,
    assert_holds,
    buffers_of,
    imagenet_dict,
    model_of,
    official_dict,
    own_dict,
    parameters_of,
    position_index,
    refusal,
    snapshot,
)

from model import load_weights
from model.weights import save_weights

INFLATION = Path(__file__).parent / "golden" / "inflation"
CASES = ["inflate_12_to_7", "inflate_same_7"]
IMAGE_HEAD = ["head.bias", "head.weight"]


@functools.cache
def golden(case):
    """(config, the two-dimensional weights, what the official program makes of some of them)."""
    with safe_open(INFLATION / f"{case}.safetensors", "pt") as file:
        config = json.loads(file.metadata()["config"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    state, inflated = (
        {k.removeprefix(kind): v for k, v in tensors.items() if k.startswith(kind)}
        for kind in ("checkpoint2d.", "inflated.")
    )
    return config, state, inflated


def tables_of(model):
    return sorted(name for name, _ in model.named_parameters() if name.endswith("table"))


def test_both_golden_inflations_are_there():
    assert sorted(path.stem for path in INFLATION.glob("*.safetensors")) == CASES


@pytest.mark.trap(26)
@pytest.mark.parametrize("wrap", [dict, lambda state: {"model": state, "epoch": 300}])
@pytest.mark.parametrize("classes", [CLASSES, None], ids=["classifier", "backbone"])
@pytest.mark.parametrize("case", CASES)
def test_inflation_is_that_of_the_official_program(case, classes, wrap):
    config, state, inflated = golden(case)
    net = model_of(config, classes)
    head = {name: value for name, value in snapshot(net).items() if name in HEAD}
    loaded = load_weights(net, wrap(state))
    copied = {name: v for name, v in parameters_of(state).items() if name not in IMAGE_HEAD}
    prefix = "backbone." if head else ""
    expected = {f"{prefix}{name}": value for name, value in {**copied, **inflated}.items()}
    assert_holds(net, {**expected, **head})
    assert loaded.format == "imagenet"
    assert sorted(loaded.dropped) == sorted([*buffers_of(state), *IMAGE_HEAD])
    assert sorted(loaded.fresh) == sorted(head)
    assert sorted(loaded.resized) == (tables_of(net) if case == "inflate_12_to_7" else [])


@pytest.mark.trap(26)
def test_a_file_of_images_inflates_as_its_mapping_does(tmp_path):
    config, state, _ = golden("inflate_12_to_7")
    expected, net = model_of(config), model_of(config, seed=8)
    load_weights(expected, state)
    net.cls_head.load_state_dict(expected.cls_head.state_dict())
    torch.save({"model": {f"module.{name}": v for name, v in state.items()}}, tmp_path / "a.pth")
    save_file(state, tmp_path / "a.safetensors")
    for name in ("a.pth", "a.safetensors"):
        load_weights(net, tmp_path / name)
        assert_holds(net, snapshot(expected))


@pytest.mark.trap(26)
@pytest.mark.parametrize("frames", [1, 2, 4])
def test_a_still_clip_is_embedded_as_its_image(frames):
    config = {**SMALL, "patch_size": (frames, 4, 4)}
    state = imagenet_dict(config)
    backbone = model_of(config, classes=None)
    load_weights(backbone, state)
    image = torch.randn(2, 3, 12, 20)
    conv = F.conv2d(
        image, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=4
    )
    norm = state["patch_embed.norm.weight"], state["patch_embed.norm.bias"]
    flat = F.layer_norm(conv.permute(0, 2, 3, 1), (16,), *norm)
    tokens = backbone.patch_embed(image[:, :, None].expand(-1, -1, 2 * frames, -1, -1))
    assert tokens.shape == (2, 2, 3, 5, 16)
    for depth in range(2):
        assert error(tokens[:, depth], flat) < 1e-6


@pytest.mark.trap(26)
def test_every_time_offset_gets_the_same_undivided_table():
    state = imagenet_dict()
    backbone = model_of(classes=None)
    loaded = load_weights(backbone, state)
    assert loaded.resized == ()
    for name in tables_of(backbone):
        slabs = backbone.get_parameter(name).unflatten(0, (3, 25))
        assert all(torch.equal(slab, state[name]) for slab in slabs)


@pytest.mark.trap(26)
def test_tables_of_images_fit_a_window_that_is_not_square():
    state = imagenet_dict(window=4)
    backbone = model_of({**SMALL, "window_size": (2, 3, 5)}, classes=None)
    loaded = load_weights(backbone, state)
    assert sorted(loaded.resized) == tables_of(backbone)
    for name in tables_of(backbone):
        square = state[name].T.reshape(1, -1, 7, 7)
        scaled = F.interpolate(square, size=(5, 9), mode="bicubic", align_corners=False)
        for slab in backbone.get_parameter(name).unflatten(0, (3, 45)):
            assert error(slab, scaled.flatten(2)[0].T) < 1e-6


TABLE = "layers.0.blocks.1.attn.relative_position_bias_table"


@pytest.mark.trap(26)
def test_tables_of_other_heads_are_refused():
    for window in (3, 7):
        state = imagenet_dict({**SMALL, "num_heads": (2, 2)}, window=window)
        assert TABLE in refusal(model_of(), state)


@pytest.mark.trap(26)
def test_a_table_that_is_no_square_is_refused():
    state = imagenet_dict(window=7)
    state[TABLE] = state[TABLE][:-1]
    message = refusal(model_of(), state)
    assert TABLE in message
    assert "168" in message


@pytest.mark.trap(26)
def test_an_absolute_position_embedding_is_refused():
    state = {"absolute_pos_embed": torch.randn(1, 9, 16), **imagenet_dict()}
    assert "absolute_pos_embed" in refusal(model_of(), state)


@pytest.mark.parametrize(
    "name", ["patch_embed.proj.weight", "layers.0.downsample.norm.bias", "norm.weight", TABLE]
)
def test_weights_of_images_are_as_strictly_checked(name):
    state = imagenet_dict()
    net = model_of()
    assert name in refusal(net, {k: v for k, v in state.items() if k != name})
    assert name in refusal(net, {**state, name: state[name][1:]})
    broken = state[name].clone()
    broken.view(-1)[0] = torch.nan
    assert name in refusal(net, {**state, name: broken})
    assert f"{name}x" in refusal(net, {**state, f"{name}x": state[name]})


def stretched(table, window, depth):
    """`table` of `window` at another depth: lines between the middles of cells, by NumPy."""
    old, new = 2 * window[0] - 1, 2 * depth - 1
    columns = table.double().numpy().reshape(old, -1).T
    places = (np.arange(new) + 0.5) * old / new - 0.5
    lines = [np.interp(places, np.arange(old), column) for column in columns]
    return torch.from_numpy(np.stack(lines, 1).reshape(-1, table.shape[1]))


def of_depth(depth):
    return {**SMALL, "window_size": (depth, 3, 3)}


# Where a sample lies is rounded too: float32 knows places up to 15 to within 5e-7.
CLOSE = 3e-6


def assert_stretched(net, state, old, new):
    """Tables are interpolated, and everything else is a copy."""
    for name, value in parameters_of(state).items():
        got = net.get_parameter(name)
        if name.endswith("table"):
            assert got.shape[0] == (2 * new - 1) * 25
            assert error(got, stretched(value, (old, 3, 3), new)) < CLOSE, name
        else:
            assert torch.equal(got, value), name


@pytest.mark.trap(25)
@pytest.mark.parametrize("has_index", [True, False])
@pytest.mark.parametrize(("old", "new"), [(4, 8), (8, 4), (3, 7), (1, 5), (5, 1)])
def test_another_window_depth_raises_or_interpolates(old, new, has_index):
    state = official_dict(of_depth(old)) if has_index else own_dict(of_depth(old))
    net = model_of(of_depth(new))
    message = refusal(net, state)
    assert "interpolate_time=True" in message
    assert f"{old}x3x3" in message
    assert f"{new}x3x3" in message
    loaded = load_weights(net, state, interpolate_time=True)
    assert_stretched(net, state, old, new)
    assert sorted(loaded.resized) == tables_of(net)
    assert sorted(loaded.dropped) == buffers_of(state)


@pytest.mark.trap(25)
@pytest.mark.parametrize("has_index", [True, False])
def test_a_released_window_never_loads_silently_into_the_longer_one(has_index):
    released = {**SMALL, "window_size": (8, 7, 7), "depths": (1,), "num_heads": (1,)}
    longer = model_of({**released, "window_size": (16, 7, 7)})
    message = refusal(longer, (official_dict if has_index else own_dict)(released))
    assert all(word in message for word in ("8x7x7", "16x7x7", "interpolate_time=True"))


@pytest.mark.trap(25)
@pytest.mark.parametrize("name", ["new.pt", "new.safetensors"])
def test_our_own_file_of_another_window_depth(name, tmp_path):
    source, net = model_of(of_depth(4), seed=1), model_of(of_depth(8))
    save_weights(source, tmp_path / name)
    assert "interpolate_time=True" in refusal(net, tmp_path / name)
    load_weights(net, tmp_path / name, interpolate_time=True)
    assert_stretched(net, snapshot(source), 4, 8)


@pytest.mark.trap(25)
@pytest.mark.parametrize("has_index", [True, False])
def test_the_same_window_is_never_interpolated(has_index):
    state = official_dict() if has_index else own_dict()
    net = model_of()
    assert load_weights(net, state, interpolate_time=True).resized == ()
    assert_holds(net, own_dict())


@pytest.mark.trap(25)
def test_what_is_linear_in_time_stays_linear_between_the_ends():
    state = official_dict(of_depth(4))
    slope, start = torch.randn(2, 1, 25, 1, generator=torch.Generator().manual_seed(3))
    lines = (start + slope * torch.arange(-3, 4).view(7, 1, 1)).reshape(175, 1)
    name = f"backbone.{TABLE}"
    state[name] = lines
    net = model_of(of_depth(8))
    load_weights(net, state, interpolate_time=True)
    table = net.get_parameter(name).detach().unflatten(0, (15, 25))
    # Half a cell at each end lies outside of the old samples, where the table stays level.
    steps = table.diff(dim=0)[1:-1]
    assert error(steps, (slope * 7 / 15).expand_as(steps)) < 1e-5
    assert error(table[7], start[0]) < 1e-6
    for end in (0, -1):
        assert torch.equal(table[end], lines.view(7, 25, 1)[end])


@pytest.mark.trap(25)
@pytest.mark.parametrize(("old", "new"), [(4, 8), (8, 4), (3, 7)])
def test_what_is_symmetric_in_time_stays_symmetric(old, new):
    state = own_dict(of_depth(old))
    for name in filter(lambda name: name.endswith("table"), state):
        slabs = state[name].unflatten(0, (2 * old - 1, 25))
        state[name] = (slabs + slabs.flip(0)).flatten(0, 1)
    net = model_of(of_depth(new))
    load_weights(net, state, interpolate_time=True)
    for name in tables_of(net):
        slabs = net.get_parameter(name).unflatten(0, (2 * new - 1, 25))
        assert error(slabs, slabs.flip(0)) < CLOSE


@pytest.mark.trap(25)
@pytest.mark.parametrize(
    ("stored", "used", "tolerance"),
    [
        (torch.float64, torch.float64, 1e-12),
        (torch.float16, torch.float32, CLOSE),
        (torch.bfloat16, torch.float32, CLOSE),
        (torch.float32, torch.bfloat16, 4e-3),
    ],
)
def test_interpolation_is_as_precise_as_the_wider_of_float32_and_the_file(stored, used, tolerance):
    state = {name: value.to(stored) for name, value in own_dict(of_depth(4)).items()}
    net = model_of(of_depth(8)).to(used)
    load_weights(net, state, interpolate_time=True)
    for name in tables_of(net):
        expected = stretched(state[name], (4, 3, 3), 8)
        assert error(net.get_parameter(name), expected) < tolerance


@pytest.mark.trap(25)
@pytest.mark.parametrize("has_index", [True, False])
@pytest.mark.parametrize("window", [(2, 3, 4), (4, 4, 3), (4, 5, 5), (5, 2, 3)])
def test_only_time_is_interpolated(window, has_index):
    state = (official_dict if has_index else own_dict)({**SMALL, "window_size": window})
    message = refusal(model_of(), state, interpolate_time=True)
    tables = [name for name in state if name.endswith("table")]
    assert "x".join(map(str, window)) in message or all(name in message for name in tables)
    if has_index:
        assert "x".join(map(str, window)) in message
        assert "2x3x3" in message


@pytest.mark.trap(24)
@pytest.mark.trap(25)
def test_index_buffers_are_checked_before_interpolation():
    state = official_dict(of_depth(4))
    *_, name = buffers_of(state)
    net = model_of(of_depth(8))
    for wrong in (state[name].roll(1, 0), position_index((3, 4, 3)), position_index((8, 3, 3))):
        assert name in refusal(net, {**state, name: wrong}, interpolate_time=True)


def test_a_static_window_keeps_its_logits_when_a_clip_is_shorter_than_both_windows():
    # A table that is level in time must not depend on the depth of the window.
    state = own_dict(of_depth(4))
    for name in filter(lambda name: name.endswith("table"), state):
        state[name] = state[name].unflatten(0, (7, 25))[:1].repeat(7, 1, 1).flatten(0, 1)
    short, long = model_of(of_depth(4)), model_of(of_depth(8))
    load_weights(short, state)
    load_weights(long, state, interpolate_time=True)
    clips = nn.functional.pad(torch.randn(1, 3, 6, 28, 28), (0, 1))
    assert error(long(clips), short(clips)) < 1e-6
