"""Section `eval`: scoring through submission.py and model_sub.pth."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from moco.settings.kinds import Count, Range, setting


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Scoring through submission.py and model_sub.pth."""

    batch_size: Count = setting(256, "images; the course's scorer uses 256")
    calibration_bins: Annotated[int, Range(2, 100)] = setting(
        15, "of the expected calibration error (arXiv 1706.04599)"
    )  # fmt: skip
    team_id: int = setting(0, "written into submission.py, with the next two")
    team_name: str = setting("moco-pipeline", "shown by the scorer")
    email_address: str = setting("nobody@example.org", "shown by the scorer")
