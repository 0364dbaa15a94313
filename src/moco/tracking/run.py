"""A stage's run: writes the metric log and lets a thread carry it to MLflow."""

from __future__ import annotations

import threading
from pathlib import Path
from types import TracebackType
from typing import Any

from moco.config import TrackingConfig
from moco.errors import Interrupted, Say
from moco.tracking.metric_log import MetricLog, finite
from moco.tracking.mlflow_sink import MlflowSink, available

EVERY = 10.0  # seconds between two deliveries to MLflow
PATIENCE = 120.0  # seconds that the end of a run waits for the last delivery


class Run:
    """Context manager around a stage. MLflow never raises into it: a failure is one warning.

    folder: the run's own; continuing in the same folder continues the same MLflow run.
    """

    def __init__(self, folder: Path, stage: str, config: TrackingConfig, say: Say) -> None:
        self.folder, self.stage, self.say = folder, stage, say
        self.metric_log = MetricLog(folder / "metrics.jsonl")
        self.path = folder / "metrics.jsonl"
        self.ended = threading.Event()
        self.problem: str | None = None
        self.thread: threading.Thread | None = None
        if config.uri and available():
            self.sink = MlflowSink(folder, config)
            self.thread = threading.Thread(target=self._deliver, daemon=True)

    def start(self, name: str, params: dict[str, Any], tags: dict[str, str]) -> None:
        self.metric_log.write("start", format=1, stage=self.stage, name=name, params=params, tags=tags)
        if self.thread is not None:
            self.thread.start()

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Numbers that are not finite are left out."""
        self.metric_log.write("metrics", step=step, metrics=finite(metrics))

    def resume(self, step: int) -> None:
        """Metrics of steps after `step` are void: they are about to be made again."""
        self.metric_log.write("resume", step=step)

    def artifact(self, path: Path, folder: str | None = None) -> None:
        self.metric_log.write("artifact", path=str(path.absolute()), folder=folder)

    def model(self, files: list[Path], tags: dict[str, str]) -> None:
        """A trained classifier, to be registered."""
        self.metric_log.write("model", files=[str(path.absolute()) for path in files], tags=tags)

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        killed = isinstance(error, (Interrupted, KeyboardInterrupt))
        status = "FINISHED" if error is None else "KILLED" if killed else "FAILED"
        self.metric_log.write("end", status=status)
        self.metric_log.close()
        self.ended.set()
        if self.thread is not None and self.thread.is_alive():
            self.thread.join(PATIENCE)
            if self.thread.is_alive():
                self.problem = f"no answer within {PATIENCE:.0f} s"
        if self.problem is not None:
            self.say(
                f"warning: MLflow at {self.sink.uri} did not take everything ({self.problem}); "
                f"nothing is lost: it is in {self.path}, and `moco sync` brings it there"
            )

    def _deliver(self) -> None:
        last = False
        while not last:
            last = self.ended.wait(EVERY)
            try:
                self.sink.replay()
                self.problem = None
            except Exception as error:  # whatever a server does must not reach the training
                self.problem = (str(error).splitlines() or [type(error).__name__])[0][:200]
