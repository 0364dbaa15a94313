"""Section `checkpoint`: states that a run can be continued from. No stage runs again for a change here."""

from __future__ import annotations

from dataclasses import dataclass

from moco.settings.kinds import Count, CountOrZero, setting


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """States of `pretrain` and `finetune` that a run can be continued from."""

    every: Count = setting(5, "epochs between two checkpoints; also every ten minutes, at the end and on a signal")
    keep: Count = setting(2, "the newest so many checkpoints stay")
    max_rollbacks: CountOrZero = setting(
        0, "pretrain: when it diverges or its features collapse, go back to the last checkpoint with half the lr, "
        "up to so many times; 0: stop",
    )  # fmt: skip
