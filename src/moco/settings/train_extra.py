"""Section `train_extra`: labels beside those of train."""

from __future__ import annotations

from dataclasses import dataclass

from moco.settings.kinds import setting


@dataclass(frozen=True, kw_only=True)
class TrainExtraConfig:
    """Labels beside those of train; all else is in section train."""

    labels: str | None = setting(
        "models/request/request.csv",
        "a reply to a request, another label file, or a folder of them (README: Extra labels); null: none, the stage "
        "hands on what train made",
    )
