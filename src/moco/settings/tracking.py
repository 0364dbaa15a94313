"""Section `tracking`: MLflow. No stage runs again for a change here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moco.settings.kinds import ModelName, setting


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """MLflow."""

    uri: str = setting("sqlite:///mlflow.db", 'MLflow store: a file, or http://host:port; "": the metric log alone')
    sinks: tuple[Literal["mlflow", "csv"], ...] = setting(
        ("mlflow",), "where runs go: mlflow | csv (a table metrics.csv in each run's folder), or both"
    )
    offline: bool = setting(False, "true: runs write their metric logs alone, and `moco sync` brings them to the store")
    experiment: str = setting("moco-pipeline", "MLflow experiment that all runs go to")
    registered_model: ModelName = setting(
        "moco-classifier",
        "every classifier becomes a version of it: the newest is `candidate`, the best on held-out images `champion`",
    )
    pictures: bool = setting(True, "views, neighbours, curves and so on go with each run; false: seconds less a stage")
