"""The optimizer of pretraining and of supervised training."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

FUSED = ("cpu", "cuda")  # devices whose update is one pass


def make_sgd(
    parameters: Iterable[nn.Parameter] | list[dict[str, Any]], device: torch.device, precision: torch.dtype, *,
    lr: float, momentum: float, weight_decay: float, nesterov: bool = False,
) -> torch.optim.SGD:  # fmt: skip
    """Return SGD that updates in one pass over the memory, where the device has that.

    The parameters are on the device already.
    """
    optimizer = torch.optim.SGD(
        parameters, lr=lr, momentum=momentum, weight_decay=weight_decay, nesterov=nesterov,
        fused=device.type in FUSED,
    )  # fmt: skip
    if momentum and precision is torch.float16:
        # The loss is scaled, and a step that overflows is left out. If that is the first one, the fused update has
        # given out memory for the momentum and written nothing into it. From zeros the first step is the same.
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def load_sgd(optimizer: torch.optim.SGD, state: dict[str, Any], device: torch.device) -> None:
    """Restore the optimizer's state, also one of another device or of before the update was fused.

    Such a state itself says whether its update was fused.
    """
    optimizer.load_state_dict(state)
    for group in optimizer.param_groups:
        group["fused"] = device.type in FUSED


def training_state(optimizer: torch.optim.SGD, scaler: torch.amp.GradScaler) -> dict[str, Any]:
    """Return the states of optimizer and loss scale, for a checkpoint."""
    return {"optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}


def load_training_state(
    optimizer: torch.optim.SGD, scaler: torch.amp.GradScaler, state: dict[str, Any], device: torch.device
) -> None:
    """Restore what `training_state` returned, also on another device."""
    load_sgd(optimizer, state["optimizer"], device)
    if state["scaler"]:  # empty where the state is from a device that needed no scaling
        scaler.load_state_dict(state["scaler"])
