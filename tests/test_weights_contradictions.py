"""Weights that say one thing and hold another, or share what they must not: never half believed."""

import argparse
import copy
import threading

import pytest
import torch
from safetensors.torch import save_file
from weights_suite import (
    SMALL,
    assert_holds,
    imagenet_dict,
    model_of,
    official_dict,
    own_dict,
    parameters_of,
    position_index,
    refusal,
    snapshot,
    torchvision_dict,
)

from model.weights import (
    WeightsError,
    load_weights,
    save_weights,
    to_official,
    to_torchvision,
)
from model.weights.__main__ import main
from model.weights.files import FORMAT
from model.weights.windows import windows_of

TURNED = dict(SMALL, window_size=(3, 2, 3))  # tables and indices of the same shapes as SMALL's
DEEPER = dict(SMALL, window_size=(4, 3, 3))
TABLE = "backbone.layers.0.blocks.0.attn.relative_position_bias_table"
INDEX = TABLE.replace("bias_table", "index")


def test_a_safetensors_file_whose_length_looks_like_a_pickle_is_read_with_its_window(tmp_path):
    """A pickle begins with 0x80; so does the length of one header in 32."""
    path = tmp_path / "own.safetensors"
    state = own_dict(TURNED)
    for padding in range(256):
        metadata = {"format": FORMAT, "window_size": "[3, 2, 3]", "padding": "x" * padding}
        save_file(state, path, metadata)
        if path.read_bytes()[0] == 0x80:
            break
    else:
        pytest.fail("no header of such a length")
    assert "windows of 3x2x3 where the model has 2x3x3" in refusal(model_of(), path)
    net = model_of(TURNED)
    load_weights(net, path)
    assert_holds(net, state)


@pytest.mark.trap(24)
@pytest.mark.parametrize("kind", ["state_dict", "file", "container"])
def test_a_plain_state_dict_of_ours_knows_its_window(kind, tmp_path):
    state = model_of(TURNED).state_dict()
    weights = {"state_dict": state, "container": {"state_dict": state}}.get(kind)
    if kind == "file":
        weights = tmp_path / "plain.pth"
        torch.save(state, weights)
    assert "windows of 3x2x3 where the model has 2x3x3" in refusal(model_of(), weights)
    if kind == "state_dict":
        with pytest.raises(RuntimeError, match=r"is of window \(3, 2, 3\), not of the model's"):
            model_of().load_state_dict(state)
    assert to_official(state)[INDEX].equal(position_index((3, 2, 3)))


def deep_indices(state):
    """Indices of another depth than that of the tables beside them."""
    for name in [name for name in state if name.endswith("index")]:
        state[name] = position_index((3, 3, 3))


def deep_word(state):
    """The same of the word that one of our files gives."""
    for name in [name for name in state if name.endswith("index")]:
        del state[name]


def one_short_table(state):
    state[TABLE] = state[TABLE][: 1 * 5 * 5]


@pytest.mark.parametrize("contradict", [deep_indices, deep_word, one_short_table])
def test_time_is_not_interpolated_where_the_weights_contradict_themselves(contradict):
    state = official_dict()
    contradict(state)
    weights = state
    if contradict is deep_word:
        weights = {"format": FORMAT, "window_size": [3, 3, 3], "model": state}
    for config in (DEEPER, SMALL):
        said = refusal(model_of(config), weights, interpolate_time=True)
        assert TABLE in said


def test_a_word_and_an_index_must_agree():
    weights = {"format": FORMAT, "window_size": [3, 2, 3], "model": official_dict()}
    assert "no index of their window in" in refusal(model_of(TURNED), weights)
    assert "windows of 3x2x3" in refusal(model_of(), weights)


@pytest.mark.parametrize("window", [7, "(2, 3, 3)", [2, 3], None])
def test_what_others_call_window_size_means_nothing(window, tmp_path):
    net = model_of()
    load_weights(net, {"model": official_dict(), "window_size": window})
    assert_holds(net, own_dict())
    path = tmp_path / "theirs.safetensors"
    save_file(own_dict(seed=1), path, {"format": "pt", "window_size": str(window)})
    load_weights(net, path)
    assert_holds(net, own_dict(seed=1))


@pytest.mark.parametrize("convert", [to_official, to_torchvision])
def test_nothing_is_converted_with_the_window_of_another_model(convert):
    net = model_of(TURNED)
    with pytest.raises(ValueError, match="window_size None or its own"):
        convert(net, (2, 3, 3))
    with pytest.raises(WeightsError, match=r"window_size \(2, 2, 2\) is not that of backbone"):
        convert(parameters_of(official_dict()), (2, 2, 2))
    for other in (torch.nn.Linear(2, 2), 5):
        with pytest.raises((TypeError, ValueError), match=f"{convert.__name__}: weights must be"):
            convert(other)


def test_the_command_converts_with_no_window_but_the_tables_own(tmp_path, capsys):
    path, output = tmp_path / "plain.pth", tmp_path / "new.pth"
    torch.save(own_dict(), path)
    words = [str(path), "--to", "official", "--output", str(output), "--window"]
    assert main([*words, "9", "9", "9"]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert not output.exists()
    assert main([*words, "2", "3", "3"]) == 0


def test_blocks_of_the_models_own_in_another_order_are_exchanged():
    net = model_of()
    state = dict(net.state_dict())
    first, second = "backbone.layers.0.blocks.0.", "backbone.layers.0.blocks.1."
    expected = snapshot(net)
    for name in [name for name in state if name.startswith(first)]:
        other = name.replace(first, second)
        state[name], state[other] = state[other], state[name]
        expected[name], expected[other] = expected[other], expected[name]
    load_weights(net, state)
    assert_holds(net, expected)


def test_a_model_made_under_inference_mode_is_loaded_there_alone():
    with torch.inference_mode():
        net = model_of()
    before = {name: value.clone() for name, value in net.named_parameters()}
    with pytest.raises(ValueError, match="parameters made under torch"):
        load_weights(net, official_dict())
    assert_holds(net, before)
    with torch.inference_mode():
        load_weights(net, official_dict())
    assert_holds(net, own_dict())


@pytest.mark.parametrize("make", [official_dict, imagenet_dict, torchvision_dict])
def test_a_compiled_part_changes_nothing(make):
    net, plain = model_of(), model_of()
    net.backbone = torch.compile(net.backbone)
    assert load_weights(net, make()) == load_weights(plain, make())
    expected = snapshot(plain)
    assert_holds(
        net, {n.replace("backbone.", "backbone._orig_mod."): expected[n] for n in expected}
    )


def timm_2d():
    """As timm counts since 0.9: a merging belongs to the stage after it."""
    state = imagenet_dict()
    return {
        name.replace("layers.0.downsample", "layers.1.downsample"): state[name] for name in state
    }


def torchvision_2d():
    state = {name.removeprefix("backbone."): value for name, value in torchvision_dict().items()}
    state["features.0.0.weight"] = state.pop("patch_embed.proj.weight")[:, :, 0]
    return state


def hugging_face_2d():
    patches = imagenet_dict()["patch_embed.proj.weight"]
    table = "swin.encoder.layers.0.blocks.0.attention.self.relative_position_bias_table"
    return {
        "swin.embeddings.patch_embeddings.projection.weight": patches,
        table: torch.randn(25, 1),
    }


@pytest.mark.parametrize("make", [timm_2d, torchvision_2d, hugging_face_2d])
def test_weights_of_images_by_other_programs_are_named(make):
    said = refusal(model_of(), make())
    assert "2-D weights under the names of torchvision, timm or Hugging Face" in said
    assert len(said) < 250


def test_nothing_is_advised_where_nothing_helps():
    state = {name: value for name, value in official_dict(DEEPER).items() if "blocks.1" not in name}
    said = refusal(model_of(classes=9), state)
    assert "missing backbone.layers.0.blocks.1" in said
    assert "interpolate_time" not in said
    assert "fresh" not in said


def test_an_average_of_models_loads():
    averaged = torch.optim.swa_utils.AveragedModel(model_of(seed=3))
    net = model_of()
    assert load_weights(net, averaged.state_dict()).dropped == ("n_averaged",)
    assert_holds(net, snapshot(averaged.module))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float16, torch.float64])
def test_narrow_weights_of_images_are_widened_before_the_arithmetic(dtype):
    state = {
        name: value.to(dtype) if value.is_floating_point() else value
        for name, value in imagenet_dict(window=4).items()
    }
    wide = {
        name: value.float() if dtype.itemsize < 4 and value.is_floating_point() else value
        for name, value in state.items()
    }
    nets = model_of(), model_of()
    for net, weights in zip(nets, (state, wide), strict=True):
        load_weights(net, weights)
    assert_holds(nets[0], snapshot(nets[1]))


@pytest.mark.parametrize("size", [(10**9, 0), (0, 10**9), (60_000, 60_000)])
def test_an_index_that_claims_any_size_costs_nothing(size):
    vast = torch.zeros(1, dtype=torch.int64).expand(size) if all(size) else torch.empty(size)
    assert windows_of(vast) == []
    assert INDEX in refusal(model_of(), {**official_dict(), INDEX: vast})


def test_a_table_that_claims_any_size_costs_nothing():
    vast = torch.zeros(1).expand(25, 10**10)
    name = TABLE.removeprefix("backbone.")
    assert TABLE.removeprefix("backbone.") in refusal(model_of(), {**imagenet_dict(), name: vast})


def test_names_that_would_break_the_line_are_quoted():
    said = refusal(model_of(), {**official_dict(), "a\nb\x1b[31m": torch.zeros(1)})
    assert r"'a\nb\x1b[31m'" in said


def test_threads_load_at_once(tmp_path):
    """What torch may read is one list for the whole process."""
    path = tmp_path / "epoch.pth"
    torch.save({"state_dict": official_dict(), "args": argparse.Namespace(lr=1)}, path)
    failures = []

    def load_often():
        net = model_of()
        try:
            for _ in range(10):
                load_weights(net, path)
        except WeightsError as error:
            failures.append(error)

    threads = [threading.Thread(target=load_often) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_a_copied_model_still_knows_its_window(tmp_path):
    net = copy.deepcopy(model_of(TURNED))
    save_weights(net, tmp_path / "copy.pt")
    assert "windows of 3x2x3" in refusal(model_of(), tmp_path / "copy.pt")
    assert "windows of 3x2x3" in refusal(model_of(), net.state_dict())


@pytest.mark.parametrize("fresh", ["cls_head", None, 3, (name for name in ("cls_head",))])
def test_fresh_is_a_collection_of_names(fresh):
    with pytest.raises(TypeError, match="fresh must be a tuple of module names"):
        load_weights(model_of(), official_dict(), fresh=fresh)


@pytest.mark.parametrize("path", ["a\0b", "", "https//model.pth"])
def test_a_path_that_no_file_has_is_refused(path):
    with pytest.raises(WeightsError, match="load_weights: cannot read") as caught:
        load_weights(model_of(), path)
    assert str(caught.value).isprintable()


def test_a_table_that_stays_fresh_is_not_said_to_be_resized():
    net = model_of(DEEPER)
    before = net.backbone.layers[0].blocks[0].attn.relative_position_bias_table.clone()
    fresh = ("backbone.layers.0",)
    loaded = load_weights(net, official_dict(), fresh=fresh, interpolate_time=True)
    assert loaded.resized == (TABLE.replace("layers.0", "layers.1"),)
    assert net.backbone.layers[0].blocks[0].attn.relative_position_bias_table.equal(before)


@pytest.mark.parametrize("convert", [to_official, to_torchvision])
def test_a_refusal_names_the_function_that_was_called(convert):
    for weights in ({"weight": torch.zeros(1)}, torchvision_2d()):
        with pytest.raises(WeightsError, match=f"^{convert.__name__}: the mapping holds "):
            convert(weights)
