"""What `accelerate` does to the modules as objects: classes, copies, pickles, words, refusals."""

import copy
import io
import pickle
import random
import re
import threading

import numpy as np
import pytest
import torch
from accelerate_suite import (
    FUSED,
    PADDED,
    SMALL,
    accelerated,
    assert_same,
    calls,
    clips,
    distance,
    listen,
    outcome,
    runs_here,
    small,
    tokens,
    types,
)
from torch import nn
from torchvision.models import resnet18, swin_transformer
from torchvision.models.swin_transformer import PatchMerging, SwinTransformerBlock
from torchvision.models.video.swin_transformer import ShiftedWindowAttention3d, SwinTransformer3d

from model import create
from videoswin_kernels import accelerate, explain, selection

pytestmark = runs_here

PARTS = (SwinTransformerBlock, ShiftedWindowAttention3d, PatchMerging)
X = clips((1, *PADDED[1:]))


def test_the_module_is_changed_in_place_and_holds_what_it_held():
    model = small(stochastic_depth_prob=0.2)
    model.features[0][1].register_forward_hook(print)
    before = {
        "types": types(model),
        "state": model.state_dict(keep_vars=True),
        "parameters": list(model.named_parameters()),
        "attributes": {name: dict(each.__dict__) for name, each in model.named_modules()},
        "versions": [parameter._version for parameter in model.parameters()],
    }
    values = {name: value.clone() for name, value in model.state_dict().items()}
    assert accelerate(model) is model
    after = model.state_dict(keep_vars=True)
    assert list(after) == list(before["state"])
    assert all(after[name] is value for name, value in before["state"].items())
    assert all(torch.equal(after[name], value) for name, value in values.items())
    assert [name for name, _ in model.named_parameters()] == [n for n, _ in before["parameters"]]
    assert [parameter._version for parameter in model.parameters()] == before["versions"]
    for name, kind in types(model).items():
        original = before["types"][name]
        if original in PARTS:
            assert kind is not original, name
            assert issubclass(kind, original), name
            assert kind.__name__ == original.__name__, name
        else:
            assert kind is original, name
        attributes = before["attributes"][name]
        assert {key: vars(model.get_submodule(name))[key] for key in attributes} == attributes, name


def test_a_part_alone_is_a_module_too():
    for part in (small().features[0][1], small().features[0][1].attn):
        kind, x = type(part), tokens(1, 3, 5, 4, 24, dtype=torch.float32)
        expected = part(x)
        assert accelerate(part) is part
        assert type(part) is not kind
        assert distance(part(x), expected) < 1e-5


def test_reference_brings_the_original_classes_back():
    model = small()
    kinds, expected = types(model), model(X)
    accelerate(model)
    assert types(model) != kinds
    assert accelerate(model, "reference") is model
    assert types(model) == kinds
    assert torch.equal(model(X), expected)
    assert types(accelerate(model, "reference")) == kinds
    assert calls(accelerate(model), X) == FUSED


def test_twice_is_once():
    model = accelerate(small())
    once, chains = types(model), [len(type(each).__mro__) for each in model.modules()]
    assert types(accelerate(model)) == once
    for kernels in ("auto", "cpu", "auto", "fused"):
        accelerate(model, kernels)
    assert [len(type(each).__mro__) for each in model.modules()] == chains
    assert types(model) == once
    assert calls(model, X) == FUSED


def test_another_word_takes_the_place_of_the_first():
    model = small()
    for kernels in ("auto", "cpu", "fused", "cuda", "triton", "cpu"):
        accelerate(model, kernels)
        words = {each.kernels for each in model.modules() if isinstance(each, PARTS)}
        assert words == {kernels}
    # A part may have another word than the rest.
    accelerate(model.features[0], "reference")
    assert calls(model, X) == {"window_attention": 2, "residual_norm": 2, "patch_merging": 1}
    for stage in (0, 2):
        kinds = {type(block) is SwinTransformerBlock for block in model.features[stage]}
        assert kinds == {stage == 0}


def test_a_deep_copy_is_accelerated_and_its_own():
    model = accelerate(small())
    twin = copy.deepcopy(model)
    assert types(twin) == types(model)
    assert torch.equal(twin(X), model(X))
    assert calls(twin, X) == FUSED
    with torch.no_grad():
        twin.features[0][0].norm2.weight.mul_(2)
    assert not torch.equal(twin(X), model(X))
    # Each can be brought back without the other.
    accelerate(twin, "reference")
    assert calls(model, X) == FUSED
    assert type(twin.features[1]) is PatchMerging
    # What appears twice, within itself too, is copied once.
    model.features[0][1].owners = [model.features[0][1]]
    part = copy.deepcopy(model.features[0][1])
    assert part.owners[0] is part
    assert calls(part, tokens(1, 3, 5, 4, 24, dtype=torch.float32)).total() == 2


class Copied(SwinTransformerBlock):
    """It copies itself."""

    def __deepcopy__(self, memo):
        made = type(self).__new__(type(self))
        made.__dict__ = copy.deepcopy(
            {**self.__dict__, "copies": self.__dict__.get("copies", 0) + 1}
        )
        return made


def test_a_class_that_copies_itself_goes_on_to():
    model = small()
    model.features[0][1].__class__ = Copied
    twin = copy.deepcopy(copy.deepcopy(accelerate(model)))
    assert twin.features[0][1].copies == 2
    assert calls(twin, X) == FUSED


class Locked(SwinTransformerBlock):
    """What cannot be copied it leaves out of its state, and makes anew."""

    def __getstate__(self):
        return {name: value for name, value in self.__dict__.items() if name != "lock"}

    def __setstate__(self, state):
        super().__setstate__(state)
        self.lock = threading.Lock()


def test_a_class_that_says_how_it_is_copied_is_copied_so():
    model = small()
    model.features[0][1].__class__ = Locked
    model.features[0][1].lock = threading.Lock()
    accelerate(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert isinstance(twin.features[0][1], Locked)
        assert twin.features[0][1].lock is not model.features[0][1].lock
    assert calls(copy.deepcopy(model), X) == FUSED


@pytest.mark.parametrize("protocol", [2, pickle.HIGHEST_PROTOCOL])
def test_pickled_it_is_of_the_original_classes(protocol):
    original = small()
    model = accelerated(original)
    model.features[0][1].mark = "kept"
    data = pickle.dumps(model, protocol)
    # Who reads it needs nothing of this project.
    assert b"videoswin" not in data
    loaded = pickle.loads(data)
    assert types(loaded) == types(original)
    assert loaded.features[0][1].mark == "kept"
    assert torch.equal(loaded(X), original(X))
    assert type(model.features[1]) is not PatchMerging
    assert calls(model, X) == FUSED
    assert calls(accelerate(loaded), X) == FUSED
    assert pickle.loads(pickle.dumps(original, protocol)).features[0][1].training is False


def test_saved_whole_it_is_of_the_original_classes():
    original = small()
    model = accelerated(original)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    assert types(loaded) == types(original)
    assert torch.equal(loaded(X), original(X))
    assert calls(accelerate(loaded), X) == FUSED
    part = pickle.loads(pickle.dumps(model.features[1]))
    assert type(part) is PatchMerging


def test_state_dicts_go_either_way():
    original, other = small(), accelerate(small(num_classes=5))
    assert other.load_state_dict(original.state_dict(), strict=True)
    assert original.load_state_dict(other.state_dict(), strict=True)
    assert list(other.state_dict()) == list(original.state_dict())


def test_nothing_random_is_drawn_and_no_mode_is_changed():
    model = small().train()
    model.features[0].eval()
    trained = {name: each.training for name, each in model.named_modules()}
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    accelerate(model)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.random.get_state()[1].tolist() == states[2]
    assert {name: each.training for name, each in model.named_modules()} == trained
    assert torch.is_grad_enabled()


def test_generators_of_other_devices_are_not_seeded(monkeypatch):
    """Seeding that of the CPU by torch.manual_seed would seed all."""
    model, seeded = small(), []
    for device in ("cuda", "xpu", "mps"):
        module = getattr(torch, device, None)
        for name in ("manual_seed", "manual_seed_all"):
            if hasattr(module, name):
                monkeypatch.setattr(
                    module, name, lambda *seed, device=device: seeded.append(device)
                )
    accelerate(model)
    assert seeded == []


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_any_gradient_mode_will_do(mode):
    original = small().double().train()
    model, x = accelerated(original, "reference"), X.double()
    with mode():
        accelerate(model)
    assert_same(outcome(model, x), outcome(original, x), 1e-11)


def test_a_model_without_memory_will_do():
    with torch.device("meta"):
        model = SwinTransformer3d(**SMALL)
    accelerate(model)
    assert model(X.to("meta")).shape == (1, 5)
    model.to_empty(device="cpu").load_state_dict(small().state_dict())
    assert distance(model.eval()(X), small()(X)) < 1e-5
    assert calls(model, X) == FUSED


def test_any_default_will_do():
    model = small()
    with torch.device("meta"):
        accelerate(model)
    assert not any(parameter.is_meta for parameter in model.parameters())
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        accelerate(model, "cpu")
    finally:
        torch.set_default_dtype(before)
    assert calls(model, X) == FUSED


def test_autocast_and_other_dtypes_will_do():
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        original = small().to(dtype)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model = accelerated(original)
        assert calls(model, X.to(dtype)) == FUSED
    frozen = small().requires_grad_(False)
    assert calls(accelerate(frozen), X) == FUSED


def test_what_cannot_be_copied_does_not_keep_a_model_from_it():
    """What users keep on modules: locks, and features of an earlier pass."""
    model, kept = small(), []
    model.features[0][1].lock = threading.Lock()
    model.features[0][1].attn.last = 2 * model.features[0][1].attn.qkv.weight
    model.features[1].register_forward_hook(lambda *values: kept.append(values[-1]))
    model.features[1].norm.last = 2 * model.features[1].norm.weight
    expected = model(X)
    accelerate(model)
    assert distance(model(X), expected) < 1e-5


def refusal(*arguments, kind=ValueError):
    """The one sentence of a refusal."""
    with pytest.raises(kind) as caught:
        accelerate(*arguments)
    message = str(caught.value)
    assert message.startswith("accelerate: ")
    assert "\n" not in message
    assert not re.search(r"\. [A-Z]", message), message
    return message


@pytest.mark.parametrize(
    "value", ["swin3d_t", None, torch.zeros(3), SwinTransformer3d, [nn.Tanh()]]
)
def test_what_is_no_module_is_refused(value):
    assert "nn.Module" in refusal(value, kind=TypeError)


@pytest.mark.parametrize("kernels", ["fast", "", None, 3, "original"])
def test_unknown_words_are_refused(kernels):
    model = small()
    kinds = types(model)
    assert refusal(model, kernels).startswith("accelerate: kernels must be one of auto, fused,")
    assert types(model) == kinds


def flat_swin():
    return swin_transformer.SwinTransformer([4, 4], 8, [2, 2], [1, 2], [7, 7])


def flat_swin_v2():
    parts = {"block": swin_transformer.SwinTransformerBlockV2}
    parts["downsample_layer"] = swin_transformer.PatchMergingV2
    return swin_transformer.SwinTransformer([4, 4], 8, [2, 2], [1, 2], [8, 8], **parts)


@pytest.mark.parametrize("build", [resnet18, flat_swin, flat_swin_v2, nn.Sequential, nn.Tanh])
def test_a_module_without_any_part_is_refused(build):
    model = build()
    kinds = types(model)
    assert type(model).__name__ in refusal(model)
    assert types(model) == kinds


def test_a_model_of_this_project_is_refused_with_the_word_it_takes_itself():
    model = create("swin_nano", num_classes=4)
    kinds = types(model)
    for module in (model, nn.Sequential(model)):
        assert "kernels=" in refusal(module)
    assert types(model) == kinds


@pytest.mark.filterwarnings("ignore")
def test_a_script_is_refused():
    model = small().features[0]
    script = torch.jit.trace(model, tokens(1, 2, 3, 3, 24, dtype=torch.float32))
    assert re.search("script", refusal(script, kind=(TypeError, ValueError)), re.IGNORECASE)


def test_explain_says_what_runs():
    model = small()
    with pytest.raises(ValueError, match="holds no module"):
        explain(model)
    accelerate(model)
    choices = explain(model)
    assert {each.operator: each.kernels for each in choices} == dict.fromkeys(FUSED, "cpu")
    assert all(isinstance(each, selection.Choice) and each.reason for each in choices)
    assert {each.operator for each in explain(accelerate(model, "cpu"))} == set(FUSED)
    assert all(each.reason == "asked for by name" for each in explain(model))
    with pytest.raises(ValueError, match="holds no module"):
        explain(accelerate(model, "reference"))


@pytest.mark.parametrize("kernels", ["cuda", "triton"])
def test_explain_knows_the_width_of_heads(kernels):
    """The operators that come before it have none."""
    with pytest.raises(selection.UnavailableError, match=r"a head width of 16, 32, 64 .* got 12;"):
        explain(accelerate(small(), kernels).features[0][0].attn)


def own_code(model):
    """{operator: reasons} of what `explain` says to keep its own code."""
    reasons = {}
    for each in explain(model):
        if each.kernels == "original":
            assert each.row is None
            reasons.setdefault(each.operator, []).append(each.reason)
    return reasons


@pytest.mark.parametrize(
    ("name", "operator"),
    [
        ("features.0.1.norm2", "residual_norm"),
        ("features.2.0.stochastic_depth", "residual_norm"),
        ("features.1.norm", "patch_merging"),
    ],
)
@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_explain_names_what_has_hooks(name, operator, kind):
    model = accelerate(small())
    assert own_code(model) == {}
    handle = listen(model.get_submodule(name), kind, [])
    assert own_code(model) == {operator: [f"{name} has hooks"]}
    assert {each.operator for each in explain(model) if each.kernels == "cpu"} >= {
        "window_attention"
    }
    handle.remove()
    assert own_code(model) == {}


def test_explain_names_what_keeps_its_own_code_for_other_reasons():
    model = accelerate(small(attention_dropout=0.3))
    assert own_code(model) == {}
    model.train()
    (reasons,) = own_code(model).values()
    assert len(reasons) == 4
    for name in ("0.0", "0.1", "2.0", "2.1"):
        assert sum(f"features.{name}.attn" in reason for reason in reasons) == 1
    model.eval()
    model.features[0][0].norm2 = nn.RMSNorm(24)
    model.features[1].norm = nn.LayerNorm(96, bias=False)
    reasons = own_code(model)
    assert "features.0.0.norm2" in reasons["residual_norm"][0]
    assert "features.1.norm" in reasons["patch_merging"][0]
    # Every reason ends a sentence, and says no more than one.
    assert not any(reason.endswith(".") for each in reasons.values() for reason in each)


class Own(SwinTransformerBlock):
    def forward(self, x):
        return 2 * super().forward(x)


def test_explain_names_what_was_not_accelerated():
    model = small()
    model.features[2][1].__class__ = Own
    # Another order of the rows of its table: what upstream would read from a checkpoint.
    model.features[0][1].attn.relative_position_index.copy_(
        model.features[0][1].attn.relative_position_index.flip(0)
    )
    expected = model(X)
    reasons = own_code(accelerate(model))
    assert distance(model(X), expected) < 1e-5
    assert [each.partition(" ")[0] for each in reasons["residual_norm"]] == ["features.2.1"]
    assert [each.partition(" ")[0] for each in reasons["window_attention"]] == ["features.0.1.attn"]
