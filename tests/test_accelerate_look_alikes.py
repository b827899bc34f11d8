"""Modules that have the names of Video Swin, and compute something else: `accelerate` refuses them.

And it is all or nothing: where one part is refused, no other is changed.
"""

import re

import official_structures as structures
import pytest
import torch
import torch.nn.functional as F
from accelerate_suite import runs_here, small, types
from official_structures import TimmDropPath, mm, official
from test_accelerate_structures import backbone, block
from torch import nn

from videoswin_kernels import accelerate, explain

pytestmark = runs_here


def shifted_otherwise(run, self, x, mask=None):
    return run(self, x, None if mask is None else mask.flip(0))


def pads_before_the_norm(run, self, x, mask):
    grid = x.shape[1:4]
    pads = [-size % extent for size, extent in zip(grid, self.window_size, strict=True)]
    x = F.pad(x, (0, 0, 0, pads[2], 0, pads[1], 0, pads[0]))
    return run(self, x, mask)[:, : grid[0], : grid[1], : grid[2]]


def is_clamped(self, x):
    return x.shape[1] < len(self.relative_position_index)


LOOK_ALIKES = {
    "no mask": ("WindowAttention3D", "forward", lambda run, self, x, mask=None: run(self, x)),
    "another mask": ("WindowAttention3D", "forward", shifted_otherwise),
    "sharper": (
        "WindowAttention3D",
        "forward",
        lambda run, self, x, mask=None: 1.1 * run(self, x, mask),
    ),
    "another index where clamped": (
        "WindowAttention3D",
        "forward",
        lambda run, self, x, mask=None: run(self, x, mask) * (1.1 if is_clamped(self, x) else 1),
    ),
    "places exchanged": (
        "WindowAttention3D",
        "forward",
        lambda run, self, x, mask=None: run(self, x.flip(1), mask).flip(1),
    ),
    "pads are normalised": ("SwinTransformerBlock3D", "forward_part1", pads_before_the_norm),
    "norm behind": (
        "SwinTransformerBlock3D",
        "forward_part2",
        lambda run, self, x: self.norm2(self.drop_path(self.mlp(x))),
    ),
    "branches side by side": (
        "SwinTransformerBlock3D",
        "forward",
        lambda run, self, x, mask: x + self.forward_part1(x, mask) + self.forward_part2(x),
    ),
    "a branch scaled": (
        "SwinTransformerBlock3D",
        "forward",
        lambda run, self, x, mask: x + 0.9 * (run(self, x, mask) - x),
    ),
    "width before height": (
        "PatchMerging",
        "forward",
        lambda run, self, x: run(self, x.transpose(2, 3)).transpose(2, 3),
    ),
    "depth turned round": ("PatchMerging", "forward", lambda run, self, x: run(self, x).flip(1)),
    "odd sizes cut": (
        "PatchMerging",
        "forward",
        lambda run, self, x: run(self, x[:, :, : x.shape[2] // 2 * 2, : x.shape[3] // 2 * 2]),
    ),
    "odd heights cut": (
        "PatchMerging",
        "forward",
        lambda run, self, x: run(self, x[:, :, : max(1, x.shape[2] // 2 * 2)]),
    ),
    "half of it": (
        "PatchMerging",
        "forward",
        lambda run, self, x: 0.5 * run(self, x),
    ),
}


def dropped_once(run, self, x):
    return self.mlp(self.norm2(x))


def other_in_eval_mode(run, self, x):
    return (1 if self.training else 0.9) * run(self, x)


LOOK_ALIKES |= {
    "one branch undropped": ("SwinTransformerBlock3D", "forward_part2", dropped_once),
    "another in eval mode": ("SwinTransformerBlock3D", "forward_part2", other_in_eval_mode),
}


@pytest.mark.parametrize("twist", LOOK_ALIKES.values(), ids=LOOK_ALIKES)
@pytest.mark.parametrize("spelling", [{}, structures.MM], ids=["official", "mm"])
def test_a_structure_that_computes_something_else_is_refused(spelling, twist):
    """And then nothing is changed, also of what is beside it."""
    other = structures.family(**spelling)
    kind, method, twisted = twist
    run = getattr(getattr(other, kind), method)
    setattr(getattr(other, kind), method, lambda *x, **mask: twisted(run, *x, **mask))
    model = nn.ModuleList([small(), backbone(other, drop_path_rate=0.2), block(mm)[0]])
    kinds = types(model)
    with pytest.raises(ValueError, match=r"^accelerate: ") as caught:
        accelerate(model)
    message = str(caught.value)
    # The part whose arithmetic is another is named: attention as such, or by its block.
    named = (kind, "SwinTransformerBlock3D") if kind.startswith("Window") else (kind,)
    assert any(name in message for name in named), message
    assert not re.search(r"\. [A-Z]|\n", message), message
    assert types(model) == kinds


def test_it_is_asked_on_numbers_whatever_device_is_the_default():
    other = structures.family()
    other.PatchMerging.forward = lambda self, x, run=other.PatchMerging.forward: 0.5 * run(self, x)
    model = backbone(other)
    with torch.device("meta"), pytest.raises(ValueError, match="PatchMerging"):
        accelerate(model)


@pytest.mark.parametrize("place", [0, 1])
def test_every_class_of_attention_is_asked(place):
    """Also where blocks of one class hold several, under one name."""
    other = structures.family().WindowAttention3D
    run = other.forward
    other.forward = lambda self, x, mask=None: 1.1 * run(self, x, mask)
    model = backbone(official)
    model.layers[0].blocks[place].attn.__class__ = other
    kinds = types(model)
    with pytest.raises(
        ValueError, match=r"^accelerate: .*(SwinTransformerBlock|WindowAttention)3D"
    ):
        accelerate(model)
    assert types(model) == kinds


@pytest.mark.parametrize("place", [0, 1])
def test_every_class_of_stochastic_depth_is_asked(place):
    """One of the same name draws for each channel."""

    class DropPath(TimmDropPath):
        def forward(self, x):
            return x * torch.empty_like(x).bernoulli_(0.5) if self.training else x

    model = backbone(official, drop_path_rate=0.2)
    model.layers[1].blocks[place].drop_path.__class__ = DropPath
    kinds = types(model)
    with pytest.raises(ValueError, match=r"^accelerate: .*SwinTransformerBlock3D"):
        accelerate(model)
    assert types(model) == kinds


ODDITIES = {
    "no norm2": lambda block: delattr(block, "norm2"),
    "no softmax": lambda block: delattr(block.attn, "softmax"),
    "a window of one number": lambda block: setattr(block, "window_size", 7),
    "a window of two numbers": lambda block: setattr(block, "window_size", (3, 3)),
    "no shift": lambda block: setattr(block, "shift_size", None),
    "a table of more rows": lambda block: setattr(
        block.attn, "relative_position_bias_table", nn.Parameter(torch.zeros(999, 2))
    ),
    "an index of more rows": lambda block: setattr(
        block.attn, "relative_position_index", torch.zeros(99, 99, dtype=torch.int64)
    ),
    "no index": lambda block: delattr(block.attn, "relative_position_index"),
}


@pytest.mark.parametrize("oddity", ODDITIES.values(), ids=ODDITIES)
def test_what_has_another_structure_stays_what_it_is_and_is_named(oddity):
    model = nn.ModuleList([small(), block(official)[0]])
    oddity(model[1])
    kinds = types(model[1])
    accelerate(model)
    assert types(model[1]) == kinds
    kept = [each for each in explain(model) if each.kernels == "original"]
    assert {each.operator for each in kept} == {"window_attention", "residual_norm"}
    assert all(each.reason.startswith("1 has ") for each in kept)
    with pytest.raises(ValueError, match=r"^accelerate: .* SwinTransformerBlock3D has "):
        accelerate(model[1])


def test_a_word_cannot_be_changed_beside_a_look_alike():
    """All or nothing also where parts have a word already."""
    other = structures.family()
    run = other.PatchMerging.forward
    other.PatchMerging.forward = lambda self, x: 1.5 * run(self, x)
    model = nn.ModuleList([accelerate(small(), "auto"), backbone(other)])
    kinds = types(model)
    with pytest.raises(ValueError, match="PatchMerging"):
        accelerate(model, "cpu")
    assert types(model) == kinds
    assert {each.kernels for each in model[0].modules() if hasattr(each, "kernels")} == {"auto"}


def test_names_alone_are_no_structure():
    """Of 2-D Swin, of other projects: none of it is 3-D attention, and none is changed."""

    class PatchMerging(nn.Module):
        def __init__(self):
            super().__init__()
            self.reduction, self.norm = nn.Linear(32, 16, bias=False), nn.LayerNorm(32)

        def forward(self, x, height, width):
            return self.reduction(self.norm(x.reshape(len(x), height // 2 * width // 2, 32)))

    class SwinTransformerBlock(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm1, self.attn, self.mlp = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 8)
            self.norm2, self.drop_path = nn.LayerNorm(8), nn.Identity()

        def forward(self, x):
            return x + self.mlp(self.norm2(self.attn(self.norm1(x))))

    for parts in ([PatchMerging()], [SwinTransformerBlock()], [PatchMerging(), nn.Tanh()]):
        model = nn.Sequential(*parts)
        kinds = types(model)
        with pytest.raises(ValueError, match=r"^accelerate: "):
            accelerate(model)
        assert types(model) == kinds


def test_what_cannot_be_asked_stays_what_it_is_and_is_named():
    """Merging of 2-D models, as timm and upstream's 2-D repository have it, beside a 3-D one."""

    class PatchMerging(nn.Module):
        def __init__(self):
            super().__init__()
            self.reduction, self.norm = nn.Linear(32, 16, bias=False), nn.LayerNorm(32)

        def forward(self, x):
            if x.dim() != 4:
                raise RuntimeError("it takes a picture.\nAnd nothing else.")
            return self.reduction(self.norm(x.unflatten(1, (-1, 2)).flatten(2, 3).flatten(3)))

    model = nn.ModuleList([small(), PatchMerging()])
    kinds = types(model[1])
    accelerate(model)
    assert types(model[1]) == kinds
    reason = "1 cannot be asked what it computes (RuntimeError it takes a picture.)"
    assert [each.reason for each in explain(model) if each.kernels == "original"] == [reason]


def test_where_no_attention_can_be_asked_the_reason_is_said():
    other = structures.family()

    def forward(self, x, mask=None):
        return self.gate * x

    other.WindowAttention3D.forward = forward
    model = backbone(other)
    said = r"whose layers\.0\.blocks\.0 cannot be asked what it computes \(AttributeError .*'gate'"
    with pytest.raises(ValueError, match=said):
        accelerate(model)
