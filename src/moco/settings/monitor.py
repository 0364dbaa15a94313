"""Section `monitor`: what is measured and checked on the way. No stage runs again for a change here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moco.settings.kinds import Count, PositiveFraction, setting


@dataclass(frozen=True, kw_only=True)
class MonitorConfig:
    """What is measured and checked on the way; `every`, `holdout` and `neighbours` are of pretraining."""

    every: Count = setting(4, "epochs between two measurements of kNN accuracy; also every ten minutes")
    holdout: PositiveFraction = setting(0.2, "fraction of train that kNN accuracy is measured on, by the rest of train")
    neighbours: Count = setting(10, "neighbours that vote; 200 in the literature, fewer where labels are few")
    suspicious_labels: Literal["refuse", "warn"] = setting(
        "refuse", "extra labels that agree with their images' neighbours hardly more than by chance: refuse | warn"
    )
    log_every: Count = setting(20, "steps between two lines of the metric log")
