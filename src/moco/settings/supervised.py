"""What sections `baseline` and `finetune` share: training of all weights on the labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from moco.settings.kinds import Count, Fraction, Positive, PositiveFraction, Range, Seed, setting
from moco.settings.optimization import OptimizationConfig


@dataclass(frozen=True, kw_only=True)
class SupervisedConfig(OptimizationConfig):
    """Training of all weights on the labels, by SGD with Nesterov's momentum."""

    epochs: Count = setting(120, "passes over the labelled images")
    minutes: Positive | None = setting(
        None, "wall-clock; the run ends at whichever of epochs and minutes comes first; null: epochs alone"
    )
    batch_size: Annotated[int, Range(2)] = setting(128, "images")
    warmup: Fraction = setting(0.05, "fraction of the run in which lr rises from 0")
    crop_scale: tuple[PositiveFraction, PositiveFraction] = setting(
        (0.5, 1.0), "random crops and flips: smallest and largest fraction of the area"
    )
    seed: Seed = setting(0, "of weights, order and crops")
