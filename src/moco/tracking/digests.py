"""What a stage's results were made from: digests that join them, and which images each accuracy counts as right.

It stands in reports/STAGE/provenance.json beside metrics.json, and in a classifier's model_best_*.pth. Times are in
the former alone: files of weights are the same to the bit wherever the same training runs.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from moco.data.manifest import Manifest
from moco.files import write_text
from moco.layout import REPORTS
from moco.settings.kinds import flatten
from moco.settings.train import TrainConfig
from moco.training.significance import pack

NAME = "provenance.json"
# Of the metrics of `pretrain`, those that every classifier made of its encoder carries along.
OF_THE_ENCODER = ("images_seen", "minutes", "loss", "knn_accuracy")
THESE, BEFORE_REFIT = "these weights", "the fit without the held-out images; these weights were then fitted on all"


def write_provenance(report: Path, manifest: Manifest, **found: Any) -> Path:
    """Write provenance.json into a stage's folder of reports and return its path.

    found: `encoder` and `weights`, sha256 of files; `start`, that of the classifier that was trained further;
    `train_settings`, see there; `trained_on`, the data that a scored classifier was made from; `learned_in_val`, how
    many images of val it learned from, where that is known; `pretraining`, see
    `pretraining_of`; `correct`, rows of booleans by the metric whose images they are; `images`, of
    other accuracies the number alone.
    """
    correct = {name: pack(row) for name, row in found.pop("correct", {}).items()}
    content = {"format": 1, "data": manifest.digest, **found, **({"correct": correct} if correct else {})}
    write_text(report / NAME, json.dumps(content, indent=2, sort_keys=True) + "\n")
    return report / NAME


def train_settings(section: TrainConfig) -> str:
    """Return a digest of section `train`, by which the rows of a report tell that they were fitted alike."""
    content = json.dumps(flatten(section, "train"), sort_keys=True, default=str)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def read_json(path: Path) -> dict[str, Any]:
    """Return what a file of reports holds; {} where it is missing or no JSON object."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def pretraining_of(encoder: str) -> dict[str, float]:
    """Return what the pretraining of the encoder with this sha256 took and reached, by the names of OF_THE_ENCODER; {}
    where reports/pretrain is of another encoder."""
    report = REPORTS / "pretrain"
    if read_json(report / NAME).get("encoder") != encoder:
        return {}
    metrics = read_json(report / "metrics.json")
    return {name: metrics[name] for name in OF_THE_ENCODER if name in metrics}


def encoder_provenance(encoder: str, manifest: Manifest) -> dict[str, Any]:
    """Return what a classifier made of the encoder with this sha256 carries: both digests, and `pretraining`."""
    return {"data": manifest.digest, "encoder": encoder, "pretraining": pretraining_of(encoder)}


def held_out_record(
    digests: np.ndarray, labels: np.ndarray, classes: list[str], correct: np.ndarray, judged: str
) -> dict[str, str]:
    """Return which held-out images a classifier has right, for the registry: comparable where `digest` is the same.

    digests: M x 16 uint8, of the images' content; labels: M int64; correct: M booleans; judged: THESE or BEFORE_REFIT.
    Neither their order nor where the images came from plays a part.
    """
    rows = [bytes(digest) + int(label).to_bytes(8, "little") for digest, label in zip(digests, labels, strict=True)]
    order = sorted(range(len(rows)), key=rows.__getitem__)
    content = json.dumps(classes).encode() + b"".join(rows[i] for i in order)
    return {"digest": hashlib.sha256(content).hexdigest(), "correct": pack(correct[order]), "judged": judged}
