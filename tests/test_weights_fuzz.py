"""Corrupted weights are refused in one sentence that touches nothing, or they load exactly."""

import random
from collections import Counter

import pytest
import torch
from model_suite import randomize, torchvision_name
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from weights_suite import (
    assert_holds,
    buffers_of,
    check_sentence,
    is_buffer,
    model_of,
    official_dict,
    own_dict,
    parameters_of,
    snapshot,
    torchvision_dict,
)

from model import load_weights
from model.weights import WeightsError, save_weights

# Corruptions: each takes a state dict and a source of chance, changes the dict, and returns
# whether loading must raise (True), must not (False) or may (None).


def a_parameter(state, chance):
    return chance.choice(list(parameters_of(state)))


def renamed(state, chance):
    name = chance.choice(list(state))
    place = chance.randrange(len(name))
    letter = chance.choice([c for c in "abcxyz019._" if c != name[place]])
    state[name[:place] + letter + name[place + 1 :]] = state.pop(name)
    return True


def missing(state, chance):
    name = chance.choice(list(state))
    del state[name]
    return None if is_buffer(name) else True


def extra(state, chance):
    name = a_parameter(state, chance)
    added = chance.choice([f"{name}.more", f"ema.{name}", name.replace("0", "8", 1) + "_", "step"])
    state[added] = state[name].clone()
    return True


def misshaped(state, chance):
    name = a_parameter(state, chance)
    value = state[name]
    wrong = [value[None], value[:-1], value.new_zeros(()), value.new_zeros(0), value[..., None]]
    state[name] = chance.choice(wrong + ([value.flatten()] if value.dim() > 1 else [])).clone()
    return True


def integer(state, chance):
    name = a_parameter(state, chance)
    state[name] = (100 * state[name]).to(torch.int64)
    return True


def boolean(state, chance):
    name = a_parameter(state, chance)
    state[name] = state[name] > 0
    return True


def complex_numbers(state, chance):
    name = a_parameter(state, chance)
    state[name] = state[name].to(torch.complex64)
    return True


def half(state, chance):
    name = a_parameter(state, chance)
    state[name] = state[name].half()
    return False


def double(state, chance):
    name = a_parameter(state, chance)
    # Bits that float32 does not have, so that the conversion rounds.
    state[name] = state[name].double() * 1.000000123
    return False


def not_finite(state, chance):
    name = a_parameter(state, chance)
    state[name] = state[name].clone()
    place = chance.randrange(state[name].numel())
    state[name].view(-1)[place] = chance.choice([float("nan"), float("inf"), float("-inf")])
    return True


def other_index(state, chance):
    name = chance.choice(buffers_of(state))
    index = state[name].clone()
    single = index.clone()
    single.view(-1)[chance.randrange(single.numel())] += 1
    choices = [single, index.T, index.roll(1, 0), index.flip(0), index[:9, :9], index + 1]
    state[name] = chance.choice(choices).contiguous()
    return True


def no_tensor(state, chance):
    name = chance.choice(list(state))
    entry = [1.5, None, "text", [0.0, 1.0], {"weight": state[name]}, b"bytes"]
    state[name] = chance.choice(entry)
    return True


def twice(state, chance):
    name = a_parameter(state, chance)
    added = f"{chance.choice(['module.', '_orig_mod.'])}{name}"
    state[added] = state[name].clone() if chance.random() < 0.5 else torch.zeros_like(state[name])
    return True


def truncated(path, chance):
    whole = path.read_bytes()
    path.write_bytes(whole[: chance.randrange(len(whole))])
    return True


KINDS = [
    renamed, missing, extra, misshaped, integer, boolean, complex_numbers, half, double,
    not_finite, other_index, no_tensor, twice, truncated,
]  # fmt: skip
# Our own files have no index buffers, and safetensors has no way to hold what is no tensor; complex
# numbers it has learnt late.
NOT_IN_OWN = {other_index, no_tensor, complex_numbers}


def write_official(state, path):
    torch.save({"meta": {"epoch": 30}, "state_dict": state}, path)


def write_torchvision(state, path):
    torch.save(state, path, _use_new_zipfile_serialization=False)


def write_own(state, path):
    """One of our files with other tensors: what else the file says stays."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file(state, path, metadata)


def file_of(form, folder):
    """(state, path, write, the file's name of each of our parameters) of a valid file."""
    if form == "official":
        return official_dict(), folder / "official.pth", write_official, str
    if form == "torchvision":
        return torchvision_dict(), folder / "torchvision.pth", write_torchvision, torchvision_name
    path = folder / "own.safetensors"
    source = model_of()
    source.load_state_dict(own_dict())
    save_weights(source, path)
    # Cloned: what is loaded are pages of the very file that is written over.
    state = {name: value.clone() for name, value in load_file(path).items()}
    return state, path, write_own, str


def attempt(form, kind, seed, net, folder):
    """Whether one corruption was refused; asserts that it was handled as it must be."""
    chance = random.Random(seed)
    randomize(net, seed)
    before = snapshot(net)
    state, path, write, spelling = file_of(form, folder)
    must_raise = None if kind is truncated else kind(state, chance)
    write(state, path)
    if kind is truncated:
        must_raise = truncated(path, chance)
    refused = ""
    try:
        load_weights(net, path)
    except WeightsError as error:
        refused = str(error)
        check_sentence(refused, path)
    assert must_raise is None or must_raise is bool(refused), refused
    values = before if refused else {name: state[spelling(name)] for name in before}
    assert_holds(net, values)
    return bool(refused)


def test_200_corruptions_of_files_raise_or_load_exactly(tmp_path):
    net = model_of()
    forms = ["official", "torchvision", "own"]
    outcomes, wrong = Counter(), []
    for seed in range(200):
        form, kind = forms[seed % 3], KINDS[seed // 3 % len(KINDS)]
        if form == "own" and kind in NOT_IN_OWN:
            form = "official"
        try:
            raised = attempt(form, kind, seed, net, tmp_path)
            outcomes[form, kind, raised] += 1
        except Exception as error:
            wrong.append(f"{seed} {form} {kind.__name__}: {type(error).__name__}: {error}"[:300])
    assert not wrong, "\n".join([f"{len(wrong)} of 200", *wrong])
    assert outcomes.total() == 200
    for form in forms:
        kinds = {kind for key, kind, _ in outcomes if key == form}
        assert kinds == set(KINDS) - (NOT_IN_OWN if form == "own" else set())
        assert {raised for key, _, raised in outcomes if key == form} == {True, False}


@pytest.mark.parametrize("form", ["official", "torchvision", "own"])
def test_what_is_not_corrupted_loads(form, tmp_path):
    state, path, write, _ = file_of(form, tmp_path)
    write(state, path)
    net = model_of()
    assert load_weights(net, path).format == form
    assert_holds(net, own_dict())
