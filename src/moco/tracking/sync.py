"""Bringing finished and interrupted runs to MLflow after the fact."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from moco.config import TrackingConfig
from moco.errors import UserError
from moco.tracking.metric_log import NAME, close_abandoned, read_events
from moco.tracking.mlflow_sink import MlflowSink
from moco.tracking.store import NO_ANSWER, available, check_address, explain, store_uri, without_password


def _began(log: Path) -> float:
    return float(next(read_events(log), {"time": 0.0})["time"])


def logs_of(project: Path) -> list[Path]:
    """Every metric log of the project and of its sweeps, oldest first."""
    found = (log for place in ("", "sweeps/*/*/") for log in project.glob(f"{place}runs/*/*/{NAME}"))
    return sorted(found, key=_began)


def sync_all(project: Path, config: TrackingConfig, say: Callable[[str], None], runs: Sequence[Path] = ()) -> None:
    """Replays metric logs, oldest first, so that the newest classifier is registered last; what MLflow has already is
    not sent again. runs: folders of some; otherwise all of the project and of its sweeps.

    Raises UserError where MLflow is missing, no store is set, or a run could not be brought there.
    """
    if not available():
        raise UserError("mlflow is not installed here; run this where it is, the logs are in runs/")
    uri = store_uri(config)
    if not uri:
        raise UserError("tracking.uri is empty; set it in params.yaml")
    check_address(uri)
    for folder in runs:
        if not (folder / NAME).is_file():
            raise UserError(f"{folder}: no run's folder, as it has no {NAME}; they are runs/STAGE/KEY")
    logs = sorted((folder / NAME for folder in runs), key=_began) if runs else logs_of(project)
    failed = []
    for log in logs:
        try:
            close_abandoned(log)
            MlflowSink(log.parent, config).replay()
        except Exception as error:  # MLflow and its HTTP layers raise many kinds
            problem = explain(error, uri)
            failed.append(f"{log.parent}: {problem}")
            if NO_ANSWER in problem:
                raise UserError(f"{problem}; nothing is lost, repeat `moco sync` then") from None
    say(f"{len(logs) - len(failed)} of {len(logs)} runs are in {without_password(uri)}")
    if failed:
        raise UserError(f"{len(failed)} run(s) not synced, first {failed[0]}")
