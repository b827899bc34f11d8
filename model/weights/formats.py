"""The formats weights come in: told apart, brought to the official names, and brought back.

One table of renamed parts for each format. All functions are pure.

Sources: upstream's released checkpoints; mmaction2 1.x `SwinTransformer3D`; torchvision
`models/video/swin_transformer.py`; microsoft/Swin-Transformer's released checkpoints.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from model.weights.files import FORMAT, WeightsError, shown
from model.weights.windows import is_dense, is_index_of, window_in_metadata, windows_of
from videoswin_kernels.geometry import Triple, check_triple, relative_position_index, table_rows

TABLE, INDEX, MASK = "relative_position_bias_table", "relative_position_index", "attn_mask"
PATCHES, HEAD = "backbone.patch_embed.proj.weight", "cls_head.fc_cls."

# (part of an official name, part of theirs); stages beyond four do no harm.
_TORCHVISION = (
    *((f"layers.{stage}.blocks.", f"features.{2 * stage}.") for stage in range(8)),
    *((f"layers.{stage}.downsample.", f"features.{2 * stage + 1}.") for stage in range(8)),
    (".mlp.fc1.", ".mlp.0."),
    (".mlp.fc2.", ".mlp.3."),
    (HEAD, "head."),
)


@dataclass(frozen=True)
class Recognised:
    """Weights under their official names.

    Attributes:
        format: "official", "mmaction2", "torchvision", "imagenet" (2-D) or "own".
        state: official full name (`backbone.…`, `cls_head.fc_cls.…`) to value, in given order.
        names: official full name to the name it was given under.
        index: stored relative position indices, by the official name of the buffer.
        window_size: the window that one of our own files names; None where none is named.
        unused: what no 3-D model has a place for, masks and the 2-D head, by name as given.
        doubled: names, as given, of a second entry for the same parameter.
    """

    format: str
    state: dict[str, Any]
    names: dict[str, str]
    index: dict[str, Any]
    window_size: Triple | None
    unused: dict[str, Any]
    doubled: tuple[str, ...]


def recognise(weights: Mapping[str, Any], where: str) -> Recognised:
    """The weights of a state dict, or of a container with one, in whichever format they are.

    `where` begins the sentence of an error: operator and source, "load_weights: a.pth".

    Raises:
        WeightsError: no Video Swin weights in any format, or a window that is none.
    """
    is_ours = isinstance(weights.get("format"), str) and weights["format"] == FORMAT
    window_size = weights.get("window_size") if is_ours else None
    for name in ("state_dict", "model"):
        if isinstance(weights.get(name), Mapping):
            weights = weights[name]
            break
    window_size = window_in_metadata(weights) if window_size is None else window_size
    if window_size is not None:
        try:
            window_size = check_triple(where, "window_size", window_size, 1)
        except (TypeError, ValueError) as error:
            raise WeightsError(str(error)) from error
    # DistributedDataParallel and torch.compile wrap the model, and so its names.
    given = [(str(name), value) for name, value in weights.items()]
    plain = [name.replace("_orig_mod.", "").removeprefix("module.") for name, _ in given]
    if not any(TABLE in name for name in plain):
        got = ", ".join(map(shown, plain[:3])) or "nothing"
        raise WeightsError(
            f"{where} holds no Video Swin weights: expected names such as "
            f"backbone.layers.0.blocks.0.attn.{TABLE}, got {got}"
        )
    kind = _format_of(dict(zip(plain, weights.values(), strict=True)), is_ours, where)

    state: dict[str, Any] = {}
    names: dict[str, str] = {}
    index: dict[str, Any] = {}
    unused: dict[str, Any] = {}
    doubled = []
    last = max(_stages(plain), default=0)
    for (name, value), short in zip(given, plain, strict=True):
        full = _official_name(short, kind, last)
        if full in names:
            doubled.append(name)
        # torch.optim.swa_utils.AveragedModel counts in n_averaged.
        elif short == "n_averaged" or (
            kind == "imagenet" and (full.endswith(MASK) or short.startswith("head."))
        ):
            unused[name] = value
        elif full.endswith(INDEX):
            index[full], names[full] = value, name
        else:
            state[full], names[full] = value, name
    return Recognised(kind, state, names, index, window_size, unused, tuple(doubled))


def _format_of(weights: Mapping[str, Any], is_ours: bool, where: str) -> str:
    last = max(_stages(weights), default=0)
    if is_ours:
        return "own"
    foreign_2d = ("features.0.0.weight", "patch_embeddings.projection.weight")
    short = PATCHES.removeprefix("backbone.")
    is_2d = getattr(weights.get(short, weights.get(PATCHES)), "ndim", 5) == 4
    # timm counts a merging to the stage after it.
    is_timm = is_2d and any(name.startswith(f"layers.{last}.downsample.") for name in weights)
    if is_timm or any(name.endswith(foreign_2d) for name in weights):
        raise WeightsError(
            f"{where} holds 2-D weights under the names of torchvision, timm or Hugging Face; "
            "known are those of microsoft/Swin-Transformer"
        )
    if any(name.startswith("features.") for name in weights):
        return "torchvision"
    if is_2d or any(name.endswith(MASK) for name in weights):
        return "imagenet"
    if any(name.removeprefix("backbone.").startswith(f"norm{last}.") for name in weights):
        return "mmaction2"
    return "official" if any(name.endswith(INDEX) for name in weights) else "own"


def _stages(names: Iterable[str]) -> set[int]:
    found = (re.match(r"(?:backbone\.)?layers\.(\d+)\.", name) for name in names)
    return {int(match[1]) for match in found if match}


def _official_name(name: str, kind: str, last: int) -> str:
    if kind == "torchvision":
        for ours, theirs in _TORCHVISION:
            name = name.replace(theirs, ours)
    if not name.startswith(("backbone.", HEAD)):
        name = f"backbone.{name}"
    if kind == "mmaction2":
        name = name.replace(f"backbone.norm{last}.", "backbone.norm.")
    return name


def stored_windows(found: Recognised) -> list[Triple]:
    """The windows these weights can be of, by their own word or an index stored with them."""
    if found.window_size is not None:
        return [found.window_size]
    return next(filter(None, map(windows_of, found.index.values())), [])


def to_official(
    weights: nn.Module | Mapping[str, Any], window_size: Triple | None = None
) -> dict[str, Tensor]:
    """The flat state dict of upstream's recogniser: `backbone.…`, `cls_head.fc_cls.…`, indices.

    Args:
        weights: a `VideoSwin` or `SwinTransformer3D`, or weights in any 3-D format, or a container
            of them as files hold it.
        window_size: the configured window; needed where the weights do not tell it.

    Returns:
        A new dict in the order of upstream's, of new tensors. A bare backbone gives no head.

    Raises:
        WeightsError: no weights of a 3-D model.
        TypeError: neither a model nor a mapping.
        ValueError: another model; or the window is neither given nor stored, or not the stored one.
    """
    return _with_indices("to_official", weights, window_size)


def to_torchvision(
    weights: nn.Module | Mapping[str, Any], window_size: Triple | None = None
) -> dict[str, Tensor]:
    """The state dict of torchvision's `SwinTransformer3d`; everything else as `to_official`."""
    renamed = {}
    for name, value in _with_indices("to_torchvision", weights, window_size).items():
        name = name.removeprefix("backbone.")
        for ours, theirs in _TORCHVISION:
            name = name.replace(ours, theirs)
        renamed[name] = value
    return renamed


def _with_indices(
    where: str, weights: nn.Module | Mapping[str, Any], window_size: Triple | None
) -> dict[str, Tensor]:
    """The weights under official names, with the index of each bias table behind it."""
    if isinstance(weights, nn.Module):
        own_window = getattr(getattr(weights, "backbone", weights), "window_size", None)
        if own_window is None or window_size not in (None, own_window):
            raise ValueError(
                f"{where}: weights must be a VideoSwin or SwinTransformer3D, and window_size None "
                f"or its own, got {type(weights).__name__} and {window_size}"
            )
        window_size, weights = own_window, weights.state_dict()
    if not isinstance(weights, Mapping):
        raise TypeError(f"{where}: weights must be a model or a mapping, got {weights!r}")
    found = recognise(weights, f"{where}: the mapping")
    if found.format == "imagenet":
        raise WeightsError(f"{where}: weights must be 3-D, got 2-D ones; load them into a model")
    stored = stored_windows(found)
    if window_size is None:
        if not stored:
            raise ValueError(f"{where}: window_size must be given, as the weights do not tell it")
        window_size = stored[0]
    window_size = check_triple(where, "window_size", window_size, 1)
    if stored and window_size not in stored:
        raise ValueError(
            f"{where}: window_size must be the one the weights are of, {stored[0]}, "
            f"got {window_size}"
        )
    wrong = [n for n, value in found.state.items() if not is_dense(value)]
    if wrong or found.doubled:
        names = ", ".join([*(found.names[name] for name in wrong), *found.doubled])
        raise WeightsError(f"{where}: weights must be one tensor each, got otherwise {names}")
    wrong = [n for n, value in found.index.items() if not is_index_of(value, window_size)]
    rows = table_rows(window_size)
    wrong += [n for n, v in found.state.items() if n.endswith(TABLE) and v.shape[:1] != (rows,)]
    if wrong:
        names = ", ".join(found.names[name] for name in wrong)
        raise WeightsError(f"{where}: window_size {window_size} is not that of {names}")
    index = torch.from_numpy(relative_position_index(window_size))
    result = {}
    for name, value in found.state.items():
        result[name] = value.detach().clone()
        if name.endswith(TABLE):
            result[name.replace(TABLE, INDEX)] = index.clone()
    return result
