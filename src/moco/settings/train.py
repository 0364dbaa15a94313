"""Section `train`: the linear classifier on frozen features."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moco.settings.kinds import Count, NotNegative, Positive, PositiveFraction, Seed, setting
from moco.settings.optimization import OptimizationConfig


@dataclass(frozen=True, kw_only=True)
class TrainConfig(OptimizationConfig):
    """The linear classifier on frozen features. `pretrain.precision` holds for its random views."""

    solver: Literal["lbfgs", "sgd"] = setting(
        "lbfgs", "lbfgs: to the optimum; of the optimizer's keys uses weight_decay | sgd: for `epochs`, as MoCo",
        before="sgd",
    )  # fmt: skip
    epochs: Count = setting(100, "sgd: passes over the cached features; with extra labels fewer, for as many steps")
    batch_size: Count = setting(256, "sgd: images")
    lr: Positive = setting(0.1, "sgd: per 256 images; MoCo's 30 belongs to feature_scaling: none")
    weight_decay: NotNegative = setting(0.01, "of both solvers, on standardized features; 0 in the original")
    features: Literal["last", "pyramid"] = setting(
        "last",
        "small_resnet: last: the last stage's | pyramid: also those between, for some hundred labels a class",
        before="last",
    )
    feature_scaling: Literal["standardize", "none"] = setting(
        "standardize", "standardize | none; folded into the layer, so that the weights stay plain"
    )
    views: Count = setting(4, "feature sets: the images as they are, and all others in random crops and flips")
    holdout: PositiveFraction = setting(
        0.2,
        "fraction of train, at least one image a class, for accuracy and sgd's choice of epoch; val is for the report",
    )
    refit: bool = setting(True, "then fit again on all of train; sgd: for as many epochs as were best")
    seed: Seed = setting(0, "of weights, order and held-out images")
