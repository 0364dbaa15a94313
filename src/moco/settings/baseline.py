"""Section `baseline`: what the labels give without pretraining, for comparison."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from moco.settings.kinds import Count, Positive, Range, setting
from moco.settings.supervised import SupervisedConfig


@dataclass(frozen=True, kw_only=True)
class BaselineConfig(SupervisedConfig):
    """Supervised training from scratch on the labels alone, with the same network."""

    epochs: Count = setting(320, "passes over the labelled images")
    minutes: Positive | None = setting(
        1.0, "wall-clock; the run ends at whichever of epochs and minutes comes first; null: epochs alone"
    )
    batch_size: Annotated[int, Range(2)] = setting(128, "images, at most: all batches of a pass are of equal size")
