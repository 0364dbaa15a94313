"""The encoder file: what `pretrain` hands to the stages after it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from moco.data.manifest import Manifest
from moco.encoders.architecture import Architecture
from moco.encoders.encoder import body_weights
from moco.errors import UserError
from moco.files import sha256
from moco.runs.joins import image_facts
from moco.weights import load_weights, save_weights


class EncoderFile(NamedTuple):
    """The content of an encoder file.

    weights: without the last layer. digest: of the data that they were trained on. settings: those of that training and
    of its data, by dotted name, as text. projection: weights of the layers that the contrastive loss acted on (`fc.…`);
    empty in files of before they were kept. sha256: of the file. images: see moco.runs.joins; {} in earlier files.
    """

    architecture: Architecture
    weights: dict[str, Tensor]
    digest: str
    settings: dict[str, str]
    projection: dict[str, Tensor]
    sha256: str
    images: dict[str, Any]


def save_encoder(
    path: Path, network: nn.Module, architecture: Architecture, manifest: Manifest, settings: dict[str, Any]
) -> None:
    """Write the body and, apart from it, the projection, with what is needed to build both."""
    texts = {name: str(value) for name, value in settings.items()}
    state = network.state_dict()
    projection = {name: value.detach().cpu().clone() for name, value in state.items() if name.startswith("fc.")}
    content = {"format": 2, "architecture": architecture.as_dict(), "data": manifest.digest, "settings": texts}
    content["images"] = image_facts(manifest)
    save_weights(path, {**content, "weights": body_weights(state), "projection": projection})


def load_encoder(path: Path) -> EncoderFile:
    """Return the content of an encoder file. Raises UserError where it is missing, damaged or something else."""
    content = load_weights(path, "run `moco pretrain` (or `dvc repro pretrain`) again")
    try:
        architecture = Architecture(**content["architecture"])
        return EncoderFile(
            architecture, content["weights"], content["data"], content["settings"], content.get("projection", {}),
            sha256(path), content.get("images", {}),
        )  # fmt: skip
    except (KeyError, TypeError):
        raise UserError(f"{path}: not an encoder file; run `moco pretrain` again") from None
