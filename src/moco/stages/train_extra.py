"""Stage `train_extra`: stage `train` with extra labels, for images of the unlabelled pool."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from moco.config import Config
from moco.data.batches import gather
from moco.data.cache import DecodedSplit
from moco.data.extra_labels import ExtraLabels, read_extra_labels
from moco.errors import UserError
from moco.stages.train import open_inputs, train_classifier
from moco.stages.workspace import CLASSIFIER_EXTRA, say


def run(config: Config) -> None:
    """Raises UserError where the labels are missing or wrong (see moco.data.extra_labels), or encoder, data and
    settings do not fit each other."""
    if config.train_extra.labels is None:
        raise UserError("train_extra.labels: not set; it names a CSV file with the header image,label")
    inputs = open_inputs(config)
    path = Path(config.train_extra.labels)
    extra = read_extra_labels(path, config.data, inputs.manifest, inputs.splits, say)
    train, pool = inputs.splits["train"], inputs.splits["unlabeled"]
    assert train.labels is not None
    classes = len(inputs.manifest.classes)
    added, before = (np.bincount(labels, minlength=classes) for labels in (extra.labels, train.labels))
    say(
        f"train_extra: {len(extra.rows)} labels added to {len(train.labels)}: {added.min()} to {added.max()} a class, "
        f"with train's {(before + added).min()} to {(before + added).max()}"
    )
    inputs.splits["extra"] = DecodedSplit(gather(pool.images, extra.rows), extra.labels, pool.digests[extra.rows])

    settings = {"train_extra.labels": config.train_extra.labels, "train_extra.content": _digest(extra)}
    train_classifier(
        config, inputs, "train_extra", CLASSIFIER_EXTRA, settings, {"extra_labels": float(len(extra.rows))}
    )


def _digest(extra: ExtraLabels) -> str:
    """Of images and labels, whatever their order in the file."""
    return hashlib.sha256(extra.rows.astype("<i8").tobytes() + extra.labels.astype("<i8").tobytes()).hexdigest()
