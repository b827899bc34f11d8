"""Small stand-ins of classes that are known by name, to be asked whether they mean what they say.

A stand-in has a class's own methods and the plain attributes of one of its objects, but few
channels, a small window, and plain submodules; no hook and no parameter of the object is touched.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode

from videoswin_kernels._structures import (
    Attention,
    Block,
    Block3D,
    Merging,
    Part,
    known_class,
    rate_of,
    subclass,
)
from videoswin_kernels.geometry import WindowGeometry, relative_position_index, table_rows

# The window, shift, heads and channels of a stand-in; grids that are shifted and padded, and that
# clamp depth and width.
_WINDOW, _SHIFT, _HEADS, _CHANNELS = (2, 3, 3), (1, 1, 1), 2, 8
_GRIDS = ((3, 4, 5), (1, 5, 2))
DIFFERS = "computes something else"


def classes_of(part: nn.Module) -> tuple[type, ...]:
    """The classes of which `part` is made, as far as its own code relies on them."""
    names = ("attn", "stochastic_depth", "drop_path")
    return tuple(type(getattr(part, name)) for name in names if hasattr(part, name))


def verdict(part: nn.Module, becomes: type[Part], base: type[nn.Module]) -> str | None:
    """Why `part` is not what its names say: `DIFFERS`, or that it cannot be asked; None if it is.

    A stand-in of it answers before and after, in training and not, whatever the caller has set.
    """
    draws = _OwnDraws()
    with (
        unset_fake_temporarily(),
        torch.device("cpu"),
        torch.no_grad(),
        torch.autocast("cpu", enabled=False),
        draws,
    ):
        try:
            stand_in = _stand_in(part, becomes, base).double()
            for parameter in stand_in.parameters():
                parameter.normal_()
            for grid in _GRIDS:
                inputs = [torch.randn(3, *grid, _CHANNELS, dtype=torch.float64)]
                if becomes is Block3D:
                    inputs.append(_mask(grid))
                for is_training in (True, False):
                    stand_in.train(is_training)
                    answers = []
                    for kind in (base, subclass(becomes, base, "reference")):
                        stand_in.__class__ = kind
                        draws.generator.manual_seed(1)
                        answers.append(stand_in(*inputs))
                    torch.testing.assert_close(*answers)
        except AssertionError:
            return DIFFERS
        except Exception as error:
            said = " ".join([type(error).__name__, *str(error).splitlines()[:1]])
            return f"cannot be asked what it computes ({said})"
    return None


class _OwnDraws(TorchDispatchMode):
    """Random operators of this thread draw from `generator`, and leave that of the caller alone."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator("cpu").manual_seed(0)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if torch.Tag.nondeterministic_seeded in func.tags:
            # Some operators take a generator; of others an overload does.
            if not _takes_generator(func):
                func = getattr(func.overloadpacket, "generator", func)
            if _takes_generator(func):
                kwargs["generator"] = self.generator
        return func(*args, **kwargs)


def _takes_generator(func: Any) -> bool:
    return any(argument.name == "generator" for argument in func._schema.arguments)


def _mask(grid: tuple[int, int, int]) -> Tensor:
    """What upstream hands its blocks: [M, N, N], 0 or -100."""
    geometry = WindowGeometry.build(grid, _WINDOW, _SHIFT)
    region = torch.from_numpy(geometry.region.copy()).view(geometry.num_windows, -1)
    return (region[:, :, None] != region[:, None, :]) * torch.tensor(-100.0, dtype=torch.float64)


def _empty(module: nn.Module, base: type[nn.Module]) -> nn.Module:
    """A `base` with the plain attributes of `module`, and no parameters, modules or hooks."""
    made = base.__new__(base)
    made.__dict__.update(module.__dict__)
    nn.Module.__init__(made)
    return made


def _stand_in(part: nn.Module, becomes: type[Part], base: type[nn.Module]) -> nn.Module:
    """A small module of a known class, whose submodules are plain ones."""
    made = _empty(part, base)
    if becomes is Merging:
        made.norm = nn.LayerNorm(4 * _CHANNELS)
        made.reduction = nn.Linear(4 * _CHANNELS, 2 * _CHANNELS, bias=False)
        return made
    if becomes in (Attention, Block3D):
        made.window_size = type(part.window_size)(_WINDOW)
        made.shift_size = type(part.shift_size)(_SHIFT)
    if becomes is Attention:
        made.attention_dropout = made.dropout = 0.0
        return _fill_attention(made)
    made.norm1, made.norm2 = nn.LayerNorm(_CHANNELS), nn.LayerNorm(_CHANNELS)
    made.mlp = nn.Linear(_CHANNELS, _CHANNELS)
    name = "stochastic_depth" if becomes is Block else "drop_path"
    drop_path = getattr(part, name)
    setattr(made, name, nn.Identity())
    rate = rate_of(drop_path)
    # Another one is called, whatever it does.
    if rate is not None:
        setattr(made, name, _empty(drop_path, type(drop_path)))
        setattr(getattr(made, name), rate, 0.5)
    if becomes is Block:
        made.attn = nn.Linear(_CHANNELS, _CHANNELS)
        return made
    for checkpointing in {"use_checkpoint", "with_cp"} & set(made.__dict__):
        setattr(made, checkpointing, False)
    attn = _empty(part.attn, known_class(part.attn, "WindowAttention3D") or type(part.attn))
    attn.window_size, attn.scale = type(part.window_size)(_WINDOW), 0.3
    attn.attn_drop, attn.proj_drop, attn.softmax = nn.Dropout(0), nn.Dropout(0), nn.Softmax(-1)
    made.attn = _fill_attention(attn)
    return made


def _fill_attention(made: nn.Module) -> nn.Module:
    """Give an attention its heads, Linears, table and index."""
    made.num_heads = _HEADS
    made.qkv = nn.Linear(_CHANNELS, 3 * _CHANNELS)
    made.proj = nn.Linear(_CHANNELS, _CHANNELS)
    rows = table_rows(_WINDOW)
    made.relative_position_bias_table = nn.Parameter(torch.zeros(rows, _HEADS))
    index = torch.from_numpy(relative_position_index(_WINDOW))
    made.register_buffer("relative_position_index", index)
    return made
