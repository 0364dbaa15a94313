"""Settings of SGD with momentum and of its schedule, which four sections share."""

from __future__ import annotations

from dataclasses import dataclass

from moco.settings.kinds import Fraction, NotNegative, Positive, Schedule, setting


@dataclass(frozen=True, kw_only=True)
class OptimizationConfig:
    """SGD with momentum.

    Learning rates are given per 256 images and multiplied by batch_size / 256 (linear scaling rule, arXiv 1706.02677).
    Schedules follow the progress of the run, whether its length is given in epochs or in minutes.
    """

    lr: Positive = setting(0.1, "learning rate per 256 images")
    sgd_momentum: Fraction = setting(0.9, "momentum of SGD (arXiv 1911.05722, section 4.1)")
    weight_decay: NotNegative = setting(0.0005, "L2 penalty; 1e-4 for sets like ImageNet")
    schedule: Schedule = setting("cosine", "cosine | step (times 0.1 at each milestone) | constant")
    warmup: Fraction = setting(0.0, "fraction of the run in which lr rises from 0")
    milestones: tuple[Fraction, ...] = setting((0.6, 0.8), "step: fractions of the run")
