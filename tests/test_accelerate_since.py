"""What users do to a model after `accelerate`, and around it: attach, parametrise, load, trace."""

import copy
import copyreg
import gc
import threading
import weakref

import pytest
import torch
from accelerate_suite import (
    FUSED,
    PADDED,
    SIZES,
    accelerated,
    calls,
    clips,
    distance,
    runs_here,
    small,
    types,
)
from official_structures import family, official
from test_accelerate_structures import backbone, block
from torch import nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensor, FakeTensorMode
from torch.nn.utils import parametrize
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.models.swin_transformer import SwinTransformerBlock

from videoswin_kernels import accelerate, explain

pytestmark = runs_here

X = clips((1, *PADDED[1:]))


def kept(model):
    """Operators of which some part keeps its own code, and the reasons."""
    return [(each.operator, each.reason) for each in explain(model) if each.kernels == "original"]


def another_index(attention):
    """Of another order: what a checkpoint of another origin might hold."""
    return attention.relative_position_index.flip(0).contiguous()


SINCE = {
    "a forward": lambda model: setattr(model.features[0][0].attn, "forward", torch.neg),
    "another module": lambda model: setattr(model.features[0][0], "attn", nn.Identity()),
    "another index": lambda model: setattr(
        model.features[0][0].attn,
        "relative_position_index",
        another_index(model.features[0][0].attn),
    ),
    "no norm": lambda model: delattr(model.features[0][0], "norm2"),
    "a forward of each": lambda model: [
        setattr(each, "forward", torch.neg) for each in model.modules() if hasattr(each, "qkv")
    ],
}


@pytest.mark.parametrize("since", SINCE.values(), ids=SINCE)
def test_what_was_attached_since_does_not_keep_a_part_from_going_back(since):
    model = small()
    since(model)
    kinds = types(model)
    for word in ("reference", "auto"):
        model = accelerate(small())
        since(model)
        accelerate(model, word)
        words = {each.kernels for each in model.modules() if hasattr(each, "kernels")}
        assert words == ({"auto"} if word == "auto" else set())
        if word != "reference":
            accelerate(model, "reference")
        assert types(model) == kinds


def test_explain_names_a_forward_that_was_attached_since():
    model = accelerate(small())
    part = model.features[0][1]
    part.attn.forward = torch.neg
    assert kept(model) == [("window_attention", "features.0.1.attn has a forward of its own")]
    part.forward = torch.neg
    assert ("residual_norm", "features.0.1 has a forward of its own") in kept(model)


def test_explain_of_upstream_s_block_whose_attention_was_exchanged():
    model = accelerate(block(official)[0])
    model.attn = nn.Identity()
    assert ("window_attention", "attn is a Identity, not WindowAttention3D") in kept(model)


def test_explain_does_not_ask_a_stranger_s_attributes():
    """Operators and words are names that others use, too."""
    model = accelerate(small())
    model.operator, model.head.operator, model.head.kernels = sum, "conv", 3
    model.norm.operator, model.norm.kernels = "window_attention", "fast"
    assert {each.operator for each in explain(model)} == set(FUSED)
    with pytest.raises(ValueError, match=r"^accelerate: .*, got Linear without any"):
        accelerate(model.head)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("make", [small, lambda: block(official)[0]], ids=["torchvision", "theirs"])
def test_an_index_of_another_order_is_not_loaded_in_silence(make, assign):
    model = make()
    accelerate(model)
    state = model.state_dict()
    model.load_state_dict(state, assign=assign)
    name = next(name for name in state if name.endswith("relative_position_index"))
    state[name] = state[name].flip(0)
    with pytest.raises(RuntimeError, match=rf"{name} must be that of the window"):
        model.load_state_dict(state, assign=assign)
    # Before, it counts: the part keeps its own code.
    model = make()
    model.load_state_dict(state, assign=assign)
    if isinstance(model, SwinTransformerBlock) or hasattr(model, "attn"):
        with pytest.raises(ValueError, match="of another order"):
            accelerate(model)
    else:
        assert "of another order" in str(kept(accelerate(model)))


class Twice(nn.Module):
    def forward(self, table):
        return 2 * table


TABLE = "relative_position_bias_table"


def test_a_table_parametrised_since():
    original, model = small(), accelerate(small())
    for each in (original, model):
        parametrize.register_parametrization(each.features[0][1].attn, TABLE, Twice())
    expected = original(X)
    averaged = torch.optim.swa_utils.AveragedModel(model)
    for twin in (model, copy.deepcopy(model), averaged):
        assert distance(twin(X), expected) < 1e-5
        assert calls(twin, X) == FUSED
    parametrize.remove_parametrizations(model.features[0][1].attn, TABLE)
    assert distance(model(X), expected) < 1e-5
    assert type(accelerate(model, "reference").features[0][1]) is SwinTransformerBlock


def test_a_table_parametrised_before_keeps_its_part():
    model = small()
    parametrize.register_parametrization(model.features[0][1].attn, TABLE, Twice())
    expected = model(X)
    accelerate(model)
    reason = "features.0.1.attn is parametrised; accelerate before that"
    assert kept(model) == [("window_attention", reason)]
    parametrize.remove_parametrizations(model.features[0][1].attn, TABLE)
    assert distance(model(X), expected) < 1e-5
    assert calls(accelerate(model), X) == FUSED


def test_beside_threads_that_draw():
    """Neither are innocent models refused, nor do the numbers of others repeat."""
    model, drawn, is_done = small(stochastic_depth_prob=0.2), [], threading.Event()

    def draw():
        while not is_done.is_set():
            drawn.append(torch.randn(64))

    thread = threading.Thread(target=draw)
    thread.start()
    try:
        for _ in range(5):
            accelerate(copy.deepcopy(model))
    finally:
        is_done.set()
        thread.join()
    assert len({tuple(each.tolist()) for each in drawn}) == len(drawn) > 5


def test_fake_tensors():
    """A model that has no numbers yet, and one whose numbers must not be looked at."""
    model, mode = small(), FakeTensorMode(allow_non_fake_inputs=True)
    with FakeCopyMode(mode):
        made = copy.deepcopy(model)
    with mode:
        assert accelerate(made)(torch.empty(PADDED)).shape == (2, 5)
        accelerate(model)
    assert all(isinstance(each, FakeTensor) for each in made.parameters())
    assert distance(model(X), small()(X)) < 1e-5
    assert calls(model, X) == FUSED


def test_a_class_lives_no_longer_than_its_modules():
    class Own(SwinTransformerBlock):
        pass

    model = small()
    model.features[0][1].__class__ = Own
    accelerate(model)
    assert calls(model, X) == FUSED
    reference = weakref.ref(Own)
    del model, Own
    gc.collect()
    assert reference() is None


def test_attributes_of_a_class_are_its_own():
    classes = family()
    classes.SwinTransformerBlock3D.original = classes.SwinTransformerBlock3D.kernels = "mine"
    model = backbone(classes)
    kinds = types(model)
    accelerate(model)
    assert {each.operator for each in explain(model) if each.kernels == "cpu"} == set(FUSED)
    assert types(accelerate(model, "reference")) == kinds


class Reduced(SwinTransformerBlock):
    """Says itself how it is pickled, with its own class."""

    def __reduce__(self):
        return copyreg.__newobj__, (Reduced,), self.__getstate__()


def test_a_class_that_says_how_it_is_pickled_keeps_its_code():
    model = small()
    model.features[0][1].__class__ = Reduced
    accelerate(model)
    assert kept(model) == [("residual_norm", "features.0.1 has a __reduce__ of its own")]
    twin = copy.deepcopy(model)
    assert type(twin.features[0][1]) is Reduced
    assert distance(twin(X), model(X)) == 0


def test_a_class_that_cannot_be_derived_from_is_named():
    class Strict(SwinTransformerBlock):
        def __init_subclass__(cls, *, colour):
            super().__init_subclass__()

    model = small()
    model.features[0][1].__class__ = Strict
    kinds = types(model)
    with pytest.raises(
        ValueError, match=r"^accelerate: Strict must be .*'colour'.*__init_subclass"
    ):
        accelerate(model)
    assert types(model) == kinds


@pytest.mark.filterwarnings("ignore:The nodes obtained by tracing")
@pytest.mark.parametrize("is_training", [True, False])
def test_features_by_tracing_run_on_the_operators(is_training):
    """torch.fx: torchvision's way to the features of a stage."""
    original = small(stochastic_depth_prob=0.3)
    names = {"features.0": "first", "features.1": "merged", "head": "logits"}
    traced = create_feature_extractor(accelerated(original), names).train(is_training)
    expected = create_feature_extractor(original, names).train(is_training)
    for size in SIZES.values():
        outputs = []
        for model in (traced, expected):
            torch.manual_seed(0)
            outputs.append(model(clips(size)))
        for name, value in outputs[1].items():
            assert distance(outputs[0][name], value) < 1e-5, name
    assert calls(traced, X) == FUSED
    with pytest.raises(ValueError, match=r"^accelerate: .* accelerate before tracing"):
        accelerate(traced)


def test_tracing_with_a_replaced_qkv_asks_it_of_padded_places():
    model = accelerate(small())
    for module in model.modules():
        if hasattr(module, "qkv"):
            module.qkv = nn.Sequential(module.qkv, nn.Tanh())
    traced = torch.fx.symbolic_trace(model)
    for size in SIZES.values():
        assert distance(traced(clips(size)), model(clips(size))) < 1e-5
    assert calls(traced, X) == FUSED
