"""Learning rates and momenta as functions of progress: 0 at the first step, 1 at the end of the run.

Progress, not epochs: the same schedule then fits a run of a number of epochs and one of a number of minutes.
"""

from __future__ import annotations

import math

REFERENCE_BATCH = 256  # images; learning rates are given for this batch (Goyal et al. 2017, arXiv 1706.02677)


def scaled_lr(lr: float, batch_size: int) -> float:
    """Return the learning rate by the linear scaling rule: 0.03 per 256 images is 0.06 at a batch of 512."""
    return lr * batch_size / REFERENCE_BATCH


def lr_factor(
    schedule: str, progress: float, warmup: float, milestones: tuple[float, ...], gamma: float = 0.1
) -> float:
    """Return the factor by which the peak learning rate is multiplied.

    warmup: fraction of the run with a linear rise from 0. `cosine` then falls to 0 (Loshchilov and Hutter 2017), `step`
    is multiplied by gamma at each milestone (fractions of the run), `constant` stays.
    """
    if progress < warmup:
        return progress / warmup
    if schedule == "cosine":
        rest = (min(progress, 1.0) - warmup) / max(1.0 - warmup, 1e-12)
        return 0.5 * (1 + math.cos(math.pi * rest))
    if schedule == "step":
        return float(gamma ** sum(progress >= milestone for milestone in milestones))
    return 1.0


def view_size(full: int, shares: tuple[float, ...], changes: tuple[float, ...], progress: float) -> int:
    """Return the side of the views in pixels under progressive resolution (Tan and Le 2021, arXiv 2104.00298).

    full: side of the images. shares: fractions of it, each in force until the next of `changes` (fractions of the run);
    there is one more of them than of these. Sides below the full one are multiples of 4, which halve well.
    """
    share = shares[sum(progress >= change for change in changes)]
    if share == 1:
        return full
    return min(full, max(4, 4 * math.floor(full * share / 4 + 0.5)))


def key_momentum(base: float, schedule: str, progress: float) -> float:
    """Return the momentum of the key encoder: constant, or rising to 1 by a cosine (BYOL, arXiv 2006.07733)."""
    if schedule == "cosine":
        return 1 - (1 - base) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    return base
