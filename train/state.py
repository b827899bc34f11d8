"""Model and optimiser as names and tensors, whole or in parts.

By the names of parameters: what one number of processes wrote, another reads.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)


def named_moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What `optimizer.state_dict` has, with the names of parameters in place of numbers."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {
        "state": {names[parameter]: dict(kept) for parameter, kept in optimizer.state.items()},
        "param_groups": [
            {**group, "params": [names[parameter] for parameter in group["params"]]}
            for group in optimizer.param_groups
        ],
    }


def set_named_moments(
    model: nn.Module, optimizer: torch.optim.Optimizer, moments: dict[str, Any]
) -> None:
    """Gives an optimiser the moments of `named_moments`; its groups stay as they are.

    Raises:
        KeyError: moments of a parameter that it does not have.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    own = [names[each] for group in optimizer.param_groups for each in group["params"]]
    numbers = {name: number for number, name in enumerate(own)}
    groups = optimizer.state_dict()["param_groups"]
    state = {numbers[name]: kept for name, kept in moments["state"].items()}
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def gathered(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """{"model", "optimizer"} of parameters in parts, whole, on the CPU of the first process.

    Every process has to call it.
    """
    _begin(model, optimizer)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights, moments = get_state_dict(model, optimizer, options=options)
    return {"model": weights, "optimizer": moments}


def scatter(model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Gives a model in parts, and its optimiser, a whole state that every process has read."""
    _begin(model, optimizer)
    betas = [group["betas"] for group in optimizer.param_groups]
    set_state_dict(
        model,
        optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
        options=StateDictOptions(full_state_dict=True),
    )
    # On its way through torch's functions a tuple becomes a list.
    for group, pair in zip(optimizer.param_groups, betas, strict=True):
        group["betas"] = pair


def write_parts(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Writes each process's part into `folder`; every process has to call it."""
    _begin(model, optimizer)
    weights, moments = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=folder)


def read_parts(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Gives both what processes, as many as there were, have written into `folder`."""
    _begin(model, optimizer)
    weights, moments = get_state_dict(model, optimizer)
    state = {"model": weights, "optimizer": moments}
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(
        model,
        optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
    )


def _begin(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Gives an optimiser that has taken no step the state it would begin its first with.

    torch's functions do so by a step without gradients, and count it.
    """
    if not optimizer.state:
        get_state_dict(model, optimizer)
        for kept in optimizer.state.values():
            kept["step"].zero_()
