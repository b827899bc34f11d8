"""What is refused in weights that can be read: every problem is named, in one sentence."""

import pytest
import torch
from weights_suite import (
    FORMATS,
    SMALL,
    assert_holds,
    buffers_of,
    imagenet_dict,
    mmaction2_dict,
    model_of,
    official_dict,
    own_dict,
    parameters_of,
    position_index,
    refusal,
)

from model import load_weights

TABLE = "backbone.layers.0.blocks.1.attn.relative_position_bias_table"


@pytest.mark.parametrize("as_file", [True, False])
@pytest.mark.parametrize("form", FORMATS)
def test_every_difference_of_keys_and_shapes_is_named_in_one_sentence(form, as_file, tmp_path):
    state = FORMATS[form]()
    ours = list(own_dict())
    theirs = list(parameters_of(state))
    gone, wrong = range(4, 20, 3), range(5, 20, 3)
    extras = [f"backbone.head_of_something.{i}.weight" for i in range(30)]
    shapes = []
    for i in wrong:
        value = state[theirs[i]]
        state[theirs[i]] = torch.cat([value, value[:1]])
        shapes.append((list(value.shape), list(state[theirs[i]].shape)))
    for i in gone:
        del state[theirs[i]]
    state.update({name: torch.zeros(2) for name in extras})
    weights = state
    if as_file:
        weights = tmp_path / "weights.pth"
        torch.save(state, weights)
    message = refusal(model_of(), weights)
    assert [ours[i] for i in gone if ours[i] not in message] == []
    assert [name for name in extras if name not in message] == []
    for i, pair in zip(wrong, shapes, strict=True):
        assert ours[i] in message or theirs[i] in message
        assert all(str(shape) in message for shape in pair)


def test_every_kind_of_problem_is_in_the_one_sentence():
    state = official_dict()
    index, *_ = buffers_of(state)
    state["module.cls_head.fc_cls.bias"] = state["cls_head.fc_cls.bias"]
    state[TABLE] = state[TABLE].clone()
    state[TABLE][3] = torch.inf
    state["backbone.norm.weight"] = torch.ones(32, dtype=torch.int32)
    state["backbone.norm.bias"] = [0.0] * 32
    state["backbone.patch_embed.proj.bias"] = torch.zeros(17)
    state["backbone.rest"] = torch.zeros(1)
    state[index] = state[index].T
    del state["backbone.patch_embed.norm.bias"]
    message = refusal(model_of(), state)
    named = [
        "cls_head.fc_cls.bias", TABLE, "backbone.norm.weight", "backbone.norm.bias",
        "backbone.patch_embed.proj.bias", "backbone.rest", index, "backbone.patch_embed.norm.bias",
    ]  # fmt: skip
    assert [name for name in named if name not in message] == []


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        ("module.backbone.norm.weight", "backbone.norm.weight"),
        ("backbone.norm1.weight", "backbone.norm.weight"),
        ("norm.weight", "backbone.norm.weight"),
        ("patch_embed.proj.bias", "backbone.patch_embed.proj.bias"),
        ("head.bias", "cls_head.fc_cls.bias"),
        ("features.0.1.mlp.0.bias", "backbone.layers.0.blocks.1.mlp.fc1.bias"),
    ],
)
def test_two_spellings_of_one_parameter_are_refused(spelling, name):
    for state in (official_dict(), own_dict()):
        message = refusal(model_of(), {**state, spelling: state[name].clone()})
        assert spelling in message


def test_a_final_norm_of_the_wrong_stage_is_refused():
    state = mmaction2_dict()
    for part in ("weight", "bias"):
        state[f"backbone.norm3.{part}"] = state.pop(f"backbone.norm1.{part}")
    message = refusal(model_of(), state)
    assert "backbone.norm3.weight" in message
    assert "backbone.norm.weight" in message


@pytest.mark.parametrize(
    "weights",
    [{}, {"state_dict": {}}, {"model": {}}, {"meta": {}}, {"state_dict": 5}, {0: torch.ones(1)}],
    ids=str,
)
def test_a_mapping_without_weights_is_refused(weights):
    refusal(model_of(), weights)


def test_models_of_another_size_are_refused():
    wider = {**SMALL, "embed_dim": 32}
    deeper = {**SMALL, "depths": (2, 2)}
    longer = {**SMALL, "depths": (2, 1, 1), "num_heads": (1, 2, 4)}
    for config in (wider, deeper, longer):
        for make in (*FORMATS.values(), lambda config: imagenet_dict(config)):
            refusal(model_of(), make(config))
            refusal(model_of(config), make(SMALL))


@pytest.mark.parametrize("rows", [50, 74, 76, 0, 25 * 6])
def test_a_table_of_no_window_is_refused(rows):
    for state in (official_dict(), own_dict()):
        for options in ({}, {"interpolate_time": True}):
            message = refusal(model_of(), {**state, TABLE: torch.ones(rows, 1)}, **options)
            assert TABLE in message
            assert str([rows, 1]) in message


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.float32])
def test_an_index_buffer_of_another_dtype_is_refused_or_holds_the_same(dtype):
    state = official_dict()
    name, *_ = buffers_of(state)
    wrong = position_index(SMALL["window_size"]).roll(1).to(dtype)
    assert name in refusal(model_of(), {**state, name: wrong})


@pytest.mark.parametrize("name", ["backbone.norm.weight", TABLE.replace("bias_table", "index")])
@pytest.mark.parametrize(
    "unusual",
    [
        lambda value: value.to_sparse(),
        lambda value: value.to("meta"),
        lambda value: torch.quantize_per_tensor(value.float(), 0.1, 0, torch.qint8),
        lambda value: torch.nested.nested_tensor([value[:3], value[3:]]),
        lambda value: value.numpy(),
    ],
    ids=["sparse", "meta", "quantized", "nested", "numpy"],
)
@pytest.mark.filterwarnings("ignore")
def test_tensors_without_plain_values_are_refused(unusual, name):
    state = official_dict()
    state[name] = unusual(state[name])
    assert name in refusal(model_of(), state)


def test_views_load_exactly():
    state = official_dict()
    names = ["backbone.norm.weight", "backbone.norm.bias", "cls_head.fc_cls.weight"]
    state[names[0]] = torch.rand(1).expand(32)
    state[names[1]] = torch.randn(64)[::2]
    state[names[2]] = torch.nn.Parameter(torch.randn(32, 5)).T
    net = model_of()
    load_weights(net, state)
    assert_holds(net, parameters_of(state))
