"""Loading: everything a model needs from whatever weights there are, or nothing at all."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from model.weights.download import read
from model.weights.files import FORMAT, WeightsError, shown, write_file
from model.weights.fitting import Problems, check_values, fit_windows, inflate, suggest_fresh
from model.weights.formats import HEAD, PATCHES, recognise
from videoswin_kernels.geometry import Triple


@dataclass(frozen=True)
class Loaded:
    """What `load_weights` did.

    Attributes:
        format: "official", "mmaction2", "torchvision", "imagenet" (2-D) or "own".
        dropped: names in the file of what was left out: index buffers, masks, a head.
        fresh: names of the parameters that kept the values they had.
        resized: names of the bias tables that were interpolated.
    """

    format: str
    dropped: tuple[str, ...]
    fresh: tuple[str, ...]
    resized: tuple[str, ...]


def load_weights(
    model: nn.Module,
    weights: str | Path | Mapping[str, Any],
    *,
    fresh: Collection[str] = (),
    interpolate_time: bool = False,
) -> Loaded:
    """What was loaded into `model`: all its parameters, from weights of any known format.

    Known are: upstream's `.pth`, mmaction2 1.x, torchvision's `swin3d_*`, 2-D Swin of ImageNet
    (inflated as upstream does), our own. Values of another floating dtype are converted. Stored
    relative position indices are compared with those of the model's window, and left out.

    Args:
        model: a `VideoSwin`, or a `SwinTransformer3D`, for which a classifier's head is left out.
        weights: the path or URL of a file, or a state dict, or a container of one as in files.
        fresh: modules of `model` that keep their values, such as "cls_head" where there are other
            classes, or "norm0" of a backbone with `out_indices`. 2-D weights leave `cls_head`
            fresh in any case.
        interpolate_time: accept weights of a window with another depth, and interpolate their bias
            tables linearly over relative time.

    Raises:
        WeightsError: the weights cannot be had, read, or do not fit: one sentence that names every
            parameter missing, left over, of another shape, not floating point or not finite, and
            every index of another window. The model is as it was.
        TypeError, ValueError: another kind of model, or `fresh` names no module of it.

    Source: upstream `SwinTransformer3D.init_weights` and `inflate_weights`, which are lenient.
    """
    prefix, window_size = _check_model("load_weights", model)
    wanted = {
        # torch.compile puts its name into those of what it wraps.
        prefix + name.replace("_orig_mod.", ""): parameter
        for name, parameter in model.named_parameters()
    }
    kept = _check_fresh(fresh, prefix, wanted)
    if isinstance(weights, (str, Path)):
        source, content = shown(weights), read(weights)
    elif isinstance(weights, Mapping):
        source, content = "the mapping", weights
    else:
        raise TypeError(
            "load_weights: weights must be the path of a file or a mapping, got "
            f"{type(weights).__name__}"
        )
    found = recognise(content, f"load_weights: {source}")

    problems = Problems()
    if found.format == "imagenet":
        kept += (HEAD,)
        frames = wanted[PATCHES].shape[2]
        state, resized = inflate(found, window_size, frames, problems)
    else:
        state, resized = fit_windows(found, window_size, interpolate_time, problems)
    # A head means nothing to a bare backbone, and what is to stay fresh is taken from nowhere.
    unused = (*kept, HEAD) if prefix else kept
    left = [name for name in state if name.startswith(unused)]
    dropped = [*(found.names[name] for name in (*found.index, *left)), *found.unused]
    state = {name: value for name, value in state.items() if name not in left}

    missing = [name for name in wanted if name not in state and not name.startswith(kept)]
    problems.add("given twice", found.doubled)
    problems.add("missing", (name.removeprefix(prefix) for name in missing))
    problems.add("unexpected", (found.names[name] for name in state if name not in wanted))
    ready = check_values(found, state, wanted, problems)
    if problems:
        unfit = (name for name in state if name in wanted and name not in ready)
        suggest_fresh(
            [name.removeprefix(prefix) for name in missing],
            [name.removeprefix(prefix) for name in unfit],
            problems,
        )
        target = type(model).__name__
        raise WeightsError(f"load_weights: {source} does not fit this {target}: {problems}")
    # Weights that lie in the model's own memory, such as its blocks in another order, are all read
    # before the first is written.
    memory = {parameter.untyped_storage().data_ptr() for parameter in wanted.values()}
    for name, value in ready.items():
        if value.untyped_storage().data_ptr() in memory:
            ready[name] = value.clone()
    with torch.no_grad():
        for name, value in ready.items():
            wanted[name].copy_(value)
    mine = (name.removeprefix(prefix) for name in wanted if name.startswith(kept))
    resized = (name.removeprefix(prefix) for name in resized if name in ready)
    return Loaded(found.format, tuple(dropped), tuple(mine), tuple(resized))


def save_weights(model: nn.Module, path: str | Path) -> None:
    """Write the parameters of `model` and its window to `path`, atomically, in our own format.

    Args:
        model: a `VideoSwin` or `SwinTransformer3D`.
        path: ends in `.safetensors`, or in `.pt` or `.pth`.

    Raises:
        TypeError, ValueError: another kind of model, or another suffix.
        OSError: the file cannot be written.
    """
    _, window_size = _check_model("save_weights", model)
    content = {"format": FORMAT, "window_size": list(window_size), "model": model.state_dict()}
    write_file(path, content)


def _check_model(where: str, model: nn.Module) -> tuple[str, Triple]:
    """What to put before a parameter's name to have its full official one, and the window."""
    # Here, not above: the backbone's constructor loads weights, so its module imports this one.
    from model.video_swin import SwinTransformer3D, VideoSwin

    if not isinstance(model, (VideoSwin, SwinTransformer3D)):
        raise TypeError(
            f"{where}: model must be a VideoSwin or SwinTransformer3D, got "
            f"{type(model).__name__}; of a wrapped model, pass the one inside"
        )
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError(
            f"{where}: model must have memory for its parameters, got some on the meta "
            "device; call model.to_empty(device=...) first"
        )
    is_outside = not torch.is_inference_mode_enabled()
    if is_outside and any(parameter.is_inference() for parameter in model.parameters()):
        raise ValueError(
            f"{where}: model must not have parameters made under torch.inference_mode, got some; "
            "call it under inference_mode, too"
        )
    if isinstance(model, VideoSwin):
        return "", model.backbone.window_size
    return "backbone.", model.window_size


def _check_fresh(
    fresh: Collection[str], prefix: str, wanted: Mapping[str, Tensor]
) -> tuple[str, ...]:
    """Prefixes of full names that stay as they are."""
    if isinstance(fresh, str) or not isinstance(fresh, Collection):
        raise TypeError(f"load_weights: fresh must be a tuple of module names, got {fresh!r}")
    kept = tuple(f"{prefix}{name}." for name in fresh)
    for name, full in zip(fresh, kept, strict=True):
        if not any(parameter.startswith(full) for parameter in wanted):
            raise ValueError(f"load_weights: fresh must name modules of the model, got {name!r}")
    return kept
