"""Weights files as other programs lay them out, and what every test of loading checks.

Names, order, shapes and index buffers are written out a second time here, from the layouts that
the programs publish; nothing asks the loader under test. Values are far from their initial ones.
"""

import re
from math import prod
from pathlib import Path

import numpy as np
import pytest
import torch
from model_suite import randomize, torchvision_name

from model import SwinTransformer3D, VideoSwin
from model.weights import WeightsError, load_weights

SMALL = dict(
    patch_size=(2, 4, 4),
    patch_norm=True,
    window_size=(2, 3, 3),
    embed_dim=16,
    depths=(2, 1),
    num_heads=(1, 2),
)
CLASSES = 5
HEAD = ("cls_head.fc_cls.weight", "cls_head.fc_cls.bias")
BUFFERS = ("relative_position_index", "attn_mask")


def position_index(window):
    """[N, N] int64: the row of the bias table for each query and key, from their offset."""
    places = np.array(list(np.ndindex(*window)))
    offsets = places[:, None] - places[None] + np.array(window) - 1
    axes = tuple(np.moveaxis(offsets, -1, 0))
    rows = np.ravel_multi_index(axes, tuple(2 * extent - 1 for extent in window))
    return torch.from_numpy(rows.astype(np.int64))


def _norm(name, width):
    return [(f"{name}.weight", (width,)), (f"{name}.bias", (width,))]


def _linear(name, inputs, outputs):
    return [(f"{name}.weight", (outputs, inputs)), (f"{name}.bias", (outputs,))]


def _block(width, heads, window):
    table = (prod(2 * extent - 1 for extent in window), heads)
    return [
        *_norm("norm1", width),
        ("attn.relative_position_bias_table", table),
        ("attn.relative_position_index", (prod(window),) * 2),
        *_linear("attn.qkv", width, 3 * width),
        *_linear("attn.proj", width, width),
        *_norm("norm2", width),
        *_linear("mlp.fc1", width, 4 * width),
        *_linear("mlp.fc2", 4 * width, width),
    ]


def _backbone(config, patch, window):
    """(name, shape) of every entry of a backbone; two-dimensional with patch and window of two."""
    width, last = config["embed_dim"], len(config["depths"]) - 1
    entries = [("patch_embed.proj.weight", (width, 3, *patch)), ("patch_embed.proj.bias", (width,))]
    entries += _norm("patch_embed.norm", width)
    for stage, (depth, heads) in enumerate(zip(config["depths"], config["num_heads"], strict=True)):
        for block in range(depth):
            prefix = f"layers.{stage}.blocks.{block}"
            if len(window) == 2 and block % 2 and stage < last:
                entries.append((f"{prefix}.attn_mask", (4, prod(window), prod(window))))
            entries += [(f"{prefix}.{name}", shape) for name, shape in _block(width, heads, window)]
        if stage < last:
            prefix = f"layers.{stage}.downsample"
            entries.append((f"{prefix}.reduction.weight", (2 * width, 4 * width)))
            entries += _norm(f"{prefix}.norm", 4 * width)
            width *= 2
    return entries + _norm("norm", width)


def _filled(entries, window, seed):
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in entries:
        if name.endswith("relative_position_index"):
            state[name] = position_index(window)
            continue
        value = torch.empty(shape)
        if name.endswith("attn_mask"):
            value = -100.0 * torch.randint(2, shape, generator=generator)
        elif name.endswith("table"):
            value.normal_(generator=generator)
        elif "norm" in name and name.endswith("weight"):
            value.uniform_(0.5, 1.5, generator=generator)
        elif name.endswith("bias"):
            value.normal_(std=0.2, generator=generator)
        else:
            value.normal_(std=prod(shape[1:]) ** -0.5, generator=generator)
        state[name] = value
    return state


def official_dict(config=SMALL, classes=CLASSES, prefix=True, seed=0):
    """A state dict of the official program; without `prefix`, that of its bare backbone."""
    window = config["window_size"]
    entries = _backbone(config, config["patch_size"], window)
    if prefix:
        entries = [(f"backbone.{name}", shape) for name, shape in entries]
    if classes is not None:
        entries += _linear("cls_head.fc_cls", entries[-1][1][0], classes)
    return _filled(entries, window, seed)


def mmaction2_dict(config=SMALL, classes=CLASSES, prefix=True, seed=0):
    """The same of mmaction2 1.x, which numbers the final norm by its stage."""
    last = len(config["depths"]) - 1
    state = official_dict(config, classes, prefix, seed)
    return {re.sub(r"^(backbone\.)?norm\.", rf"\1norm{last}.", k): v for k, v in state.items()}


def torchvision_dict(config=SMALL, classes=CLASSES, prefix=True, seed=0):
    """The same of torchvision, which has no prefix."""
    state = official_dict(config, classes, prefix, seed)
    return {torchvision_name(name): value for name, value in state.items()}


def own_dict(config=SMALL, classes=CLASSES, prefix=True, seed=0):
    """The same of our own modules, which have no index buffers."""
    return parameters_of(official_dict(config, classes, prefix, seed))


FORMATS = {
    "official": official_dict,
    "mmaction2": mmaction2_dict,
    "torchvision": torchvision_dict,
    "own": own_dict,
}


def imagenet_dict(config=SMALL, window=3, classes=10, seed=0):
    """A state dict of the two-dimensional Swin, index buffers, masks and head included."""
    window = (window, window)
    entries = _backbone(config, config["patch_size"][1:], window)
    entries += _linear("head", entries[-1][1][0], classes)
    return _filled(entries, window, seed)


def is_buffer(name):
    return name.endswith(BUFFERS)


def parameters_of(state):
    return {name: value for name, value in state.items() if not is_buffer(name)}


def buffers_of(state):
    return sorted(filter(is_buffer, state))


def model_of(config=SMALL, classes=CLASSES, seed=7):
    """Our model with values that no file here holds."""
    backbone = SwinTransformer3D(**config)
    return randomize(backbone if classes is None else VideoSwin(backbone, classes), seed).eval()


def snapshot(model):
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def assert_holds(model, expected):
    """Every parameter is the expected value, converted to the dtype of the model."""
    parameters = dict(model.named_parameters())
    assert parameters.keys() == expected.keys()
    for name, parameter in parameters.items():
        assert torch.equal(parameter, expected[name].to(parameter.dtype)), name


def assert_same_dict(got, expected):
    """Equal to the bit, dtypes and the order of keys included."""
    assert list(got) == list(expected)
    for name, value in expected.items():
        assert got[name].dtype == value.dtype, name
        assert torch.equal(got[name], value), name


def check_sentence(message, source=None):
    """One sentence that says who refuses and which file."""
    assert message.startswith("load_weights: ")
    if source is not None:
        assert str(source) in message
        message = message.replace(str(source), "")
    assert "\n" not in message
    assert not re.search(r"\. [A-Z]", message), message


def refusal(model, weights, **options):
    """The sentence with which `weights` are refused, after which the model is as before."""
    before = snapshot(model)
    with pytest.raises(WeightsError) as caught:
        load_weights(model, weights, **options)
    message = str(caught.value)
    check_sentence(message, weights if isinstance(weights, str | Path) else None)
    assert_holds(model, before)
    return message
