"""`accelerate`: the models that people already have, on these kernels, in place.

    from videoswin_kernels import accelerate
    accelerate(model)

What is found, by class name and structure, becomes what `_structures` makes of it. That a name and
a structure mean what they do in the original is not taken on trust: a small stand-in of each class
is asked on random numbers, and has to answer as ours does, before anything is changed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from math import prod
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn.utils.parametrize import is_parametrized

from videoswin_kernels._stand_ins import DIFFERS, classes_of, verdict
from videoswin_kernels._structures import (
    ATTENTION_NEEDS,
    PARTS,
    Attention,
    Block,
    Block3D,
    Part,
    Use,
    has_other_order,
    is_ours,
    known_class,
    subclass,
)
from videoswin_kernels.geometry import table_rows
from videoswin_kernels.selection import check_word, takes_word

M = TypeVar("M", bound=nn.Module)


class Found(NamedTuple):
    """A module of a known class, `base`, and why it stays as it is, None if it need not."""

    path: str
    module: nn.Module
    becomes: type[Part]
    base: type[nn.Module]
    why_not: str | None


def accelerate(module: M, kernels: str = "fused") -> M:
    """`module` itself, its 3-D Swin blocks running on the operators of this package.

    Found are the parts of torchvision's `SwinTransformer3d` and those of the official repository
    and of mmaction2 1.x, anywhere in `module`. Each gets a subclass of its class: parameters,
    buffers, state dict, hooks, `isinstance` and class names stay, a deep copy is accelerated, and
    what is pickled is the original, which comes back as such. A second call changes nothing, or the
    word.

    Modules that are called stay modules, so that hooks fire and replaced ones work. The residual of
    a block and the norm behind it, and the merging and its norm, are one operator only where that
    norm is an `nn.LayerNorm` and neither it nor the stochastic depth carries hooks; each forward
    looks anew. With dropout of attention weights, a block's own attention trains. `explain(module)`
    names what keeps its own code, and why.

    Stochastic depth draws the same numbers as before. Dropout behind the projection of
    torchvision's attention draws others: it no longer draws for padded places.

    Args:
        module: a model, or a part of one.
        kernels: which implementation runs (`videoswin_kernels.selection`); "reference" gives every
            part its original class back.

    Returns:
        `module`, the same object.

    Raises:
        TypeError: no nn.Module.
        ValueError: an unknown `kernels`; nothing is found; TorchScript; a part that has the names
            of a known class and computes something else, whose class cannot be derived from, or
            that was wrapped after it was accelerated. Nothing is changed then.
        RuntimeError: at the first forward, if the kernels asked for cannot run.
    """
    where = "accelerate"
    if not isinstance(module, nn.Module):
        raise TypeError(f"{where}: module must be an nn.Module, got {type(module).__name__}")
    check_word(where, kernels)
    if any(isinstance(each, torch.jit.ScriptModule) for each in module.modules()):
        raise ValueError(
            f"{where}: module must not be TorchScript, got {type(module).__name__}; accelerate the "
            "model that it was made of, and use torch.compile or torch.export"
        )
    found = list(_find(module))
    ours = [each for each in found if isinstance(each.module, Part)]
    others = [each for each in found if not isinstance(each.module, Part)]
    if kernels != "reference":
        others = list(_asked(others))
        for each in others:
            if each.why_not == DIFFERS:
                raise ValueError(
                    f"{where}: {each.path or 'module'} has the names of the {each.base.__name__} "
                    f"that is known, but {DIFFERS}; build it on the operators instead"
                )
    usable = [each for each in others if each.why_not is None]
    if not any(each.becomes in (Attention, Block3D) for each in [*ours, *usable]):
        raise ValueError(f"{where}: {_why_nothing(module, [*ours, *others])}")
    changes = []
    for each in [*ours, *usable]:
        now = type(each.module)
        if isinstance(each.module, Part):
            if each.module.kernels == kernels:
                continue
            if not is_ours(now):
                raise ValueError(
                    f"{where}: {each.path or 'module'} must be as it was accelerated, got it "
                    f"wrapped into {now.__name__} since; accelerate before wrapping, or undo that "
                    "first"
                )
            now = now.original
        changes.append(
            (each.module, now if kernels == "reference" else subclass(each.becomes, now, kernels))
        )
    for part, becomes in changes:
        part.__class__ = becomes
    return module


def uses_of(module: nn.Module) -> Iterator[tuple[str, str, Use]]:
    """(path, word, use) of each operator in an accelerated module; none where nothing is."""
    found = list(_find(module))
    if not any(isinstance(each.module, Part) for each in found):
        return
    for each in _asked(found):
        if isinstance(each.module, Part) and each.why_not is None:
            for use in each.module.uses():
                yield each.path, each.module.kernels, use
        else:
            reason = each.why_not or "was not there when the rest was accelerated"
            for operator in each.becomes.operators:
                yield each.path, "original", Use(operator, why_not=reason)


def _find(module: nn.Module) -> Iterator[Found]:
    for path, part in module.named_modules():
        for becomes in PARTS:
            base = known_class(part, becomes.found_as)
            if base is None:
                continue
            why_not = _own_method(part, becomes, base)
            # What is ours looks at its structure anew in each forward.
            if why_not is None and not isinstance(part, Part):
                why_not = _other_structure(part, becomes)
            yield Found(path, part, becomes, base, why_not)


def _asked(found: Iterable[Found]) -> Iterator[Found]:
    """The same; where nothing speaks against a part, what a stand-in of its classes answers."""
    verdicts: dict[tuple[type, ...], str | None] = {}
    for each in found:
        if each.why_not is None and not isinstance(each.module, Part):
            classes = (each.base, *classes_of(each.module))
            if classes not in verdicts:
                verdicts[classes] = verdict(each.module, each.becomes, each.base)
            each = each._replace(why_not=verdicts[classes])
        yield each


def _own_method(part: nn.Module, becomes: type[Part], base: type[nn.Module]) -> str | None:
    """What a subclass, or the object, does its own way and would not do as ours, if anything."""
    derived = type(part).__mro__[: type(part).__mro__.index(base)]
    own = [part.__dict__, *(vars(each) for each in derived if not is_ours(each))]
    changed = [name for name in becomes.methods if any(name in each for each in own)]
    # Who says how it is pickled may name its class.
    own.append(vars(base))
    changed += [
        name for name in ("__reduce__", "__reduce_ex__") if any(name in each for each in own)
    ]
    return f"has a {changed[0]} of its own" if changed else None


def _other_structure(part: nn.Module, becomes: type[Part]) -> str | None:
    """What a module of a known name has otherwise than the class of that name, if anything."""
    # To undo it torch takes the first base of the class, which would be ours.
    if is_parametrized(part):
        return "is parametrised; accelerate before that"
    lacking = [name for name in becomes.needs if not hasattr(part, name)]
    if not lacking and becomes is Block3D:
        lacking = [f"attn.{name}" for name in ATTENTION_NEEDS if not hasattr(part.attn, name)]
    if lacking:
        return f"has no {lacking[0]}"
    # torchvision's 2-D Swin has blocks of the same class.
    if becomes is Block and known_class(part.attn, Attention.found_as) is None:
        return f"has no {Attention.found_as}"
    if becomes is Attention:
        return _other_window(part, part)
    return _other_window(part, part.attn) if becomes is Block3D else None


def _other_window(part: nn.Module, attention: nn.Module) -> str | None:
    """How the window of `part` is not that of the table and the index of its attention, if so."""
    window, shift = (getattr(part, name, None) for name in ("window_size", "shift_size"))
    for name, triple, least in (("window_size", window, 1), ("shift_size", shift, 0)):
        is_triple = isinstance(triple, (list, tuple)) and len(triple) == 3
        if not is_triple or not all(isinstance(each, int) and each >= least for each in triple):
            return f"has no {name} of three integers"
    table = getattr(attention, "relative_position_bias_table", None)
    index = getattr(attention, "relative_position_index", None)
    shape = (table_rows(window), attention.num_heads)
    if not isinstance(table, Tensor) or tuple(table.shape) != shape:
        return f"has no relative_position_bias_table {list(shape)}"
    shape = [prod(window)] * 2
    if not isinstance(index, Tensor) or list(index.shape) != shape:
        return f"has no relative_position_index {shape}"
    if has_other_order(index, window):
        return "has a relative_position_index of another order, or not loaded yet"
    return None


def _why_nothing(module: nn.Module, found: list[Found]) -> str:
    """The end of the sentence that refuses a module without an attention that could be fused."""
    name = type(module).__name__
    wanted = "module must hold 3-D Swin blocks of torchvision, of upstream or of mmaction2 1.x"
    if isinstance(module, GraphModule):
        return f"{wanted}, got {name}, which has none any more; accelerate before tracing"
    if any(map(takes_word, module.modules())):
        return f"{wanted}, got {name}, which takes kernels= itself, where it is made"
    kept = [each for each in found if each.why_not is not None]
    if kept:
        return (
            f"{wanted}, got {name}, whose {kept[0].path or kept[0].base.__name__} {kept[0].why_not}"
        )
    return f"{wanted}, got {name} without any"
