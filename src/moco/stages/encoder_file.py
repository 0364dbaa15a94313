"""The encoder file: what `pretrain` hands to the stages after it."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from moco.errors import UserError
from moco.model.encoder import Architecture, body_weights
from moco.training.checkpoints import load_weights, save_weights


def save_encoder(path: Path, network: nn.Module, architecture: Architecture, digest: str) -> None:
    """All but the last layer, with what is needed to build it. digest: of the data it was trained on."""
    content = {"format": 1, "architecture": architecture.as_dict(), "data": digest}
    save_weights(path, {**content, "weights": body_weights(network.state_dict())})


def load_encoder(path: Path) -> tuple[Architecture, dict[str, Tensor], str]:
    """(architecture, weights without the last layer, digest of the data) of an encoder file."""
    content = load_weights(path, "run `moco pretrain` (or `dvc repro pretrain`) again")
    try:
        return Architecture(**content["architecture"]), content["weights"], content["data"]
    except (KeyError, TypeError):
        raise UserError(f"{path}: not an encoder file; run `moco pretrain` again") from None
