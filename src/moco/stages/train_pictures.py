"""Pictures of a linear classifier's training, for the record alone: no output depends on them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor, nn

from moco.tracking import pictures
from moco.tracking.metric_log import metric_history
from moco.tracking.run import Run

if TYPE_CHECKING:
    from moco.stages.train import Inputs

QUERIES, NEIGHBOURS = 8, 8  # images drawn


def draw_curves(record: Run, path: Path) -> None:
    """Draw the curves of a linear classifier's training as a PNG."""
    pictures.draw_curves(metric_history(record.path), ("loss", "held_out_accuracy"))(path)


def draw_features(record: Run, inputs: Inputs, train_features: Tensor, val_features: Tensor) -> None:
    """What the features say of some validation images, and a map of more."""
    train, val, names = inputs.splits["train"], inputs.splits["val"], inputs.manifest.classes
    assert train.labels is not None and val.labels is not None
    known = nn.functional.normalize(train_features[: len(train.labels)], dim=1)
    near = (nn.functional.normalize(val_features[:QUERIES], dim=1) @ known.T).topk(min(NEIGHBOURS, len(known)), 1)
    actual, labels = ([names[label] for label in part] for part in (val.labels[:QUERIES], train.labels))

    def draw_neighbours(path: Path) -> None:
        sheet = pictures.neighbours(val.images[:QUERIES], actual, train.images, labels, near.indices.numpy())
        sheet.save(path, "png")

    def draw_map(path: Path) -> None:
        pictures.draw_map(val_features.numpy(), val.labels, names)(path)  # type: ignore[arg-type]

    record.picture("neighbours", draw_neighbours)
    record.picture("features", draw_map)
