"""Where the lines of a run's metric log go. To add one: a class with these members in a file beside this one, a line in
`sinks`, and its name in moco/settings/tracking.py."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from moco.settings.tracking import TrackingConfig
from moco.tracking.csv_sink import CsvSink
from moco.tracking.store import available, store_uri


class Sink(Protocol):
    """Brings what a run's log has to some place. It knows what is there already, so that it can be called again at
    any time, by another process, and after a crash."""

    def replay(self, again: bool = False) -> None:
        """Bring the place up to the end of the log. again: also what somebody deleted there.

        Raises whatever its library raises; the log stays, and the next call tries again."""

    def explain(self, error: BaseException) -> str:
        """Return one line for what went wrong there, with what to do."""


def active(config: TrackingConfig) -> list[str]:
    """Return the names of the sinks that a run has while it goes on: of those that are set, those that can work."""
    mlflow = bool(store_uri(config)) and not config.offline and available()
    return [name for name in config.sinks if name != "mlflow" or mlflow]


def sinks(folder: Path, config: TrackingConfig) -> list[Sink]:
    """Return those that a run in this folder has while it goes on."""
    found: list[Sink] = []
    if "mlflow" in active(config):
        from moco.tracking.mlflow_sink import MlflowSink

        found.append(MlflowSink(folder, config))
    return found + other_sinks(folder, config)


def other_sinks(folder: Path, config: TrackingConfig) -> list[Sink]:
    """Return those beside MLflow."""
    return [CsvSink(folder)] if "csv" in config.sinks else []
