"""Bringing finished and interrupted runs to MLflow after the fact."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from moco.config import TrackingConfig
from moco.errors import UserError
from moco.tracking.metric_log import read_events
from moco.tracking.mlflow_sink import MlflowSink
from moco.tracking.store import available, store_uri


def _began(log: Path) -> float:
    return float(next(read_events(log), {"time": 0.0})["time"])


def sync_all(project: Path, config: TrackingConfig, say: Callable[[str], None]) -> None:
    """Replays every metric log of the project and of its sweeps; what MLflow has already is not sent again.

    Raises UserError where MLflow is missing, no store is set, or a run could not be brought there.
    """
    if not available():
        raise UserError("mlflow is not installed here; run this where it is, the logs are in runs/")
    if not config.uri:
        raise UserError("tracking.uri is empty; set it in params.yaml")
    failed = []
    found = (log for place in ("", "sweeps/*/*/") for log in project.glob(f"{place}runs/*/*/metrics.jsonl"))
    logs = sorted(found, key=_began)  # so that the newest classifier is registered last
    for log in logs:
        sink = MlflowSink(log.parent, config)
        try:
            sink.replay()
        except Exception as error:  # MLflow and its HTTP layers raise many kinds
            reason = (str(error).splitlines() or [type(error).__name__])[0][:150]
            failed.append(f"{log.parent}: {reason}")
    say(f"{len(logs) - len(failed)} of {len(logs)} runs are in {store_uri(config)}")
    if failed:
        raise UserError(f"{len(failed)} run(s) not synced, first {failed[0]}")
