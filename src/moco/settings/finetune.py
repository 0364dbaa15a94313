"""Section `finetune`: training of all weights from the linear classifier."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from moco.settings.kinds import (
    Count,
    CountOrZero,
    Fraction,
    NotNegative,
    Positive,
    PositiveFraction,
    Range,
    Seed,
    setting,
)  # fmt: skip
from moco.settings.supervised import SupervisedConfig


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(SupervisedConfig):
    """All weights, from the linear classifier. `pretrain.precision` holds here too."""

    classifier: Literal["classifier", "classifier_extra"] = setting(
        "classifier",
        "whose labels it trains on: classifier (train) | classifier_extra (train_extra: extra labels too)",
        before="classifier",
    )
    start: Literal["classifier", "encoder"] = setting(
        "classifier", "classifier: that one's model_sub.pth | encoder: the last layer begins anew", before="classifier"
    )
    epochs: Count = setting(120, "passes over the labelled images, in whole batches: the rest sits out each time")
    batch_size: Annotated[int, Range(2)] = setting(32, "images")
    lr: Positive = setting(0.8, "per 256 images, for the demo's easy images; photographs: 0.02 to 0.1 (README)")
    layer_decay: PositiveFraction = setting(
        1.0, "learning rate of a stage as a fraction of the next stage's (arXiv 1801.06146, section 3.2)", before=1.0
    )
    label_smoothing: Fraction = setting(
        0.0, "fraction of the target that is spread over all classes (arXiv 1512.00567)", before=0.0)  # fmt: skip
    mixup: NotNegative = setting(0.0, "alpha of the mixture of two images (arXiv 1710.09412); 0: none", before=0.0)
    batch_norm: Literal["batch", "frozen"] = setting(
        "batch",
        "batch: statistics of the batch, running ones move | frozen: those that pretraining left",
        before="batch",
    )
    pool: CountOrZero = setting(
        3, "images of the pool for each labelled one of a batch (FixMatch, arXiv 2001.07685); 0: none", before=0
    )
    confidence: Fraction = setting(
        0.8, "probability from which a prediction becomes the label of an image of the pool; 0.95 for photographs with "
        "few labels", before=0.8)  # fmt: skip
    holdout: PositiveFraction = setting(0.2, "fraction of train on which the epoch is chosen; val is only reported")
    seed: Seed = setting(0, "of order, crops and held-out images")
