"""Section `request`: which images of the pool somebody is asked to label."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from moco.settings.kinds import Count, CountOrZero, Range, Seed, setting


@dataclass(frozen=True, kw_only=True)
class RequestConfig:
    """Which images of the pool somebody is asked to label; the stage writes models/request/."""

    strategy: Literal[
        "maxherding", "uncertainty_herding", "typiclust", "kmedoids", "margin", "coreset", "loss", "random"
    ] = setting(
        "maxherding",
        "maxherding | typiclust | kmedoids | coreset | random | loss; with a classifier: uncertainty_herding | margin",
    )
    budget: CountOrZero = setting(120, "images; 0: none are asked for")
    dimensions: Count = setting(128, "principal components that features are reduced to first")
    bandwidth: Annotated[float, Range(1e-6, 1e6)] = setting(
        0.8, "of the kernel of both herdings, a distance between features of unit length (arXiv 2407.12212)"
    )
    loss_views: Annotated[int, Range(2)] = setting(
        3, "loss: views of an image, whose contrastive losses with each other are averaged"
    )
    answers: Literal["people", "generator"] = setting(
        "generator", "people: the column `label` is empty, for `moco label` | generator: the truth of drawn images"
    )
    seed: Seed = setting(0, "of the choice")
