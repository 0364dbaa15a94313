"""Feeds metric logs into MLflow.

A replay starts where the last one ended: the run's id, the place in the log and the last step of each metric
are kept in mlflow.json beside the log, so that repeating a replay changes nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from moco.config import TrackingConfig
from moco.files import write_text
from moco.tracking import store
from moco.tracking.metric_log import finite, read_events

BATCH = 500  # metrics a request; MLflow allows 1,000
STATE = "mlflow.json"
ALIAS = "candidate"


@dataclass
class SinkState:
    """What MLflow has. events: lines of the log that were replayed. last_step: by metric."""

    uri: str
    run_id: str | None = None
    events: int = 0
    last_step: dict[str, int] = field(default_factory=dict)


class MlflowSink:
    """Replays the log of one run."""

    def __init__(self, folder: Path, config: TrackingConfig) -> None:
        self.folder, self.config = folder, config
        self.uri = store.store_uri(config)
        self.state = self._load()
        self.client: Any = None

    def _load(self) -> SinkState:
        try:
            state = SinkState(**json.loads((self.folder / STATE).read_text()))
        except (OSError, ValueError, TypeError):
            return SinkState(self.uri)
        return state if state.uri == self.uri else SinkState(self.uri)

    def _connect(self) -> Any:
        if self.client is None:
            self.client = store.client(self.uri)
        return self.client

    def replay(self) -> None:
        """Brings MLflow up to the end of the log. Raises whatever MLflow raises; can be called again."""
        self._connect()
        pending: list[Any] = []
        steps: dict[str, int] = {}  # last step of each metric in `pending`
        reached = self.state.events
        handlers: dict[str, Callable[[dict[str, Any]], None]] = {
            "start": self._start, "artifact": self._artifact, "model": self._model, "end": self._end,
        }  # fmt: skip
        for number, event in enumerate(read_events(self.folder / "metrics.jsonl")):
            if number < self.state.events:
                continue
            if event["event"] == "metrics":
                pending.extend(self._metrics(event, steps))
            else:
                self._send(pending, steps, number)
                if handler := handlers.get(event["event"]):
                    handler(event)
                self._remember(number + 1)
            reached = number + 1
            if len(pending) >= BATCH:
                self._send(pending, steps, reached)
        self._send(pending, steps, reached)

    def _send(self, pending: list[Any], steps: dict[str, int], events: int) -> None:
        """Sends and empties `pending`. What MLflow has is remembered only when it has taken it."""
        if pending:
            self.client.log_batch(self.state.run_id, metrics=pending)
            self.state.last_step.update(steps)
            self._remember(events)
        pending.clear()
        steps.clear()

    def _remember(self, events: int) -> None:
        self.state.events = events
        write_text(self.folder / STATE, json.dumps(asdict(self.state)))

    def _start(self, event: dict[str, Any]) -> None:
        from mlflow.entities import Param, RunTag

        if self.state.events > 0:  # another process goes on with the run
            self.client.update_run(self.state.run_id, status="RUNNING")
            return
        if self.state.run_id is None:
            began = int(event["time"] * 1000)
            run = self.client.create_run(self._experiment(), run_name=event["name"], start_time=began)
            self.state.run_id = run.info.run_id
            self._remember(0)
        tags = {**event["tags"], "stage": event["stage"]}
        self.client.log_batch(
            self.state.run_id,
            params=[Param(name, str(value)) for name, value in event["params"].items()],
            tags=[RunTag(name, str(value)) for name, value in tags.items()],
        )

    def _experiment(self) -> str:
        from mlflow.exceptions import MlflowException

        found = self.client.get_experiment_by_name(self.config.experiment)
        if found is None:
            place = store.artifact_location(self.uri)
            try:
                return str(self.client.create_experiment(self.config.experiment, artifact_location=place))
            except MlflowException:  # another job was faster
                found = self.client.get_experiment_by_name(self.config.experiment)
        return str(found.experiment_id)

    def _metrics(self, event: dict[str, Any], steps: dict[str, int]) -> list[Any]:
        from mlflow.entities import Metric

        step, fresh = int(event["step"]), []
        for name, value in finite(event["metrics"]).items():
            if step > steps.get(name, self.state.last_step.get(name, -1)):  # else sent before a resume
                steps[name] = step
                fresh.append(Metric(name, value, int(event["time"] * 1000), step))
        return fresh

    def _artifact(self, event: dict[str, Any]) -> None:
        if (self.folder / event["path"]).exists():
            self.client.log_artifact(self.state.run_id, str(self.folder / event["path"]))

    def _model(self, event: dict[str, Any]) -> None:
        """Uploads the two files that make a classifier, and registers them as a version."""
        from mlflow.exceptions import MlflowException

        for path in event["files"]:
            self.client.log_artifact(self.state.run_id, str(self.folder / path), "classifier")
        name = self.config.registered_model
        try:
            self.client.create_registered_model(name)
        except MlflowException as error:
            if "exist" not in str(error).lower():
                raise
        source = f"{self.client.get_run(self.state.run_id).info.artifact_uri}/classifier"
        version = self.client.create_model_version(name, source, self.state.run_id, tags=event["tags"])
        self.client.set_registered_model_alias(name, ALIAS, version.version)

    def _end(self, event: dict[str, Any]) -> None:
        self.client.set_terminated(self.state.run_id, event["status"], int(event["time"] * 1000))
