"""The files of a classifier: model_best_EPOCH_ACC.pth, model_sub.pth and submission.py in one folder."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from moco.data.manifest import Manifest
from moco.encoders.architecture import Architecture
from moco.errors import UserError
from moco.exchange.submission import render
from moco.files import sha256, working_folder, write_text
from moco.layout import PRODUCED_BY
from moco.runs.joins import image_facts
from moco.settings.eval import EvalConfig
from moco.weights import load_weights, save_weights

WEIGHTS = "model_sub.pth"
SUBMISSION = "submission.py"


@dataclass(frozen=True)
class Classifier:
    """A classifier as training has made it, to be written.

    weights: state dict of the whole network. epoch: the one that the weights are from; accuracy: its fraction of
    correct held-out images; optimizer: its state then. settings: those of all stages up to here, by dotted name.
    made_from: see moco.tracking.digests. results: accuracies by name. learned: the images, see moco.runs.joins.
    """

    architecture: Architecture
    weights: dict[str, Tensor]
    epoch: int
    accuracy: float
    optimizer: dict[str, Any]
    settings: dict[str, Any]
    made_from: dict[str, Any] = field(default_factory=dict)
    results: dict[str, float] = field(default_factory=dict)
    learned: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TrainedClassifier:
    """What a later stage takes from the folder of a classifier.

    weights: those of model_sub.pth. settings: as text. digest: sha256 of model_sub.pth. made_from: see
    moco.tracking.digests; images: see moco.runs.joins; both are {} in files of earlier versions.
    """

    architecture: Architecture
    weights: dict[str, Tensor]
    epoch: int
    classes: list[str]
    settings: dict[str, str]
    digest: str
    made_from: dict[str, Any] = field(default_factory=dict)
    images: dict[str, Any] = field(default_factory=dict)


def write_classifier(
    folder: Path, found: Classifier, manifest: Manifest, config: EvalConfig, more: dict[str, Any] | None = None
) -> list[Path]:
    """Write all three files or none, and return the paths of the two that are handed in.

    more: other files of tensors, by name.
    """
    state = {name: value.detach().cpu().contiguous() for name, value in found.weights.items()}
    best: dict[str, Any] = {
        "format": 1,
        "epoch": found.epoch,
        "held_out_accuracy": found.accuracy,
        "architecture": found.architecture.as_dict(),
        "settings": {name: str(value) for name, value in found.settings.items()},
        "classes": manifest.classes,
        "images": image_facts(manifest),
        "made_from": found.made_from,
        "results": found.results,
        "learned": found.learned,
        "weights": state,
        "optimizer": found.optimizer,
    }
    place = folder.resolve()  # behind a link to another disk, say
    place.parent.mkdir(parents=True, exist_ok=True)
    with working_folder(place.parent, f".{folder.name}-") as work:
        save_weights(work / f"model_best_{found.epoch}_{100 * found.accuracy:.2f}.pth", best)
        save_weights(work / WEIGHTS, state)
        for name, content in (more or {}).items():
            save_weights(work / name, content)
        write_text(work / SUBMISSION, render(found.architecture, manifest, config))
        if place.exists():
            shutil.rmtree(place)
        place.mkdir()
        for path in work.iterdir():
            path.replace(place / path.name)
    return [folder / WEIGHTS, folder / SUBMISSION]


def read_classifier(folder: Path) -> TrainedClassifier:
    """Return the classifier in a folder. Raises UserError where a file is missing, damaged or something else."""
    maker = PRODUCED_BY.get(folder, "train")
    hint = f"run `moco {maker}` (or `dvc repro {maker}`) first"
    weights = load_weights(folder / WEIGHTS, hint)
    paths = sorted(folder.glob("model_best_*.pth"))
    if len(paths) != 1:
        raise UserError(f"{folder}: {len(paths)} files model_best_*.pth, one is expected; {hint}")
    best = load_weights(paths[0], hint)
    try:
        architecture = Architecture(**best["architecture"])
        return TrainedClassifier(
            architecture, weights, best["epoch"], best["classes"], best["settings"], sha256(folder / WEIGHTS),
            best.get("made_from", {}), best.get("images", {}),
        )  # fmt: skip
    except (KeyError, TypeError):
        raise UserError(f"{paths[0]}: not a file of `moco {maker}`; {hint}") from None
