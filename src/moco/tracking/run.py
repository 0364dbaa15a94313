"""A stage's run: writes the metric log and lets a thread carry it to MLflow."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path
from types import TracebackType
from typing import Any

from moco.config import TrackingConfig
from moco.errors import Interrupted, Say, UserError
from moco.files import write_atomically
from moco.tracking.metric_log import FORMAT, MetricLog, finite
from moco.tracking.mlflow_sink import MlflowSink
from moco.tracking.store import available

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

    def start(self, params: dict[str, Any], tags: dict[str, str], step: int = 0) -> None:
        """step: that of the state from which the run goes on. Metrics of later steps, written by a process that
        was stopped, are void: they are about to be made again."""
        again = self.metric_log.continued
        name = f"{self.stage}-{self.folder.name}"
        self.metric_log.write("start", format=FORMAT, stage=self.stage, name=name, params=params, tags=tags)
        if again:
            self.metric_log.write("resume", step=step)
        if self.thread is not None:
            self.thread.start()

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Numbers that are not finite are left out."""
        self.metric_log.write("metrics", step=step, metrics=finite(metrics))

    def artifact(self, path: Path) -> None:
        """A file worth keeping with the run."""
        self.metric_log.write("artifact", path=self._keep(path, "artifacts"))

    def model(self, files: list[Path], tags: dict[str, str]) -> None:
        """A trained classifier, to be registered."""
        self.metric_log.write("model", files=[self._keep(path, "classifier") for path in files], tags=tags)

    def _keep(self, path: Path, folder: str) -> str:
        """Copies a file beside the log: at its own place the next run will overwrite it, perhaps before MLflow
        has it. Returns its path relative to the run's folder."""
        write_atomically(self.folder / folder / path.name, lambda temporary: shutil.copyfile(path, temporary))
        return f"{folder}/{path.name}"

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        killed = isinstance(error, (Interrupted, KeyboardInterrupt))
        status = "FINISHED" if error is None else "KILLED" if killed else "FAILED"
        try:
            try:
                self.metric_log.write("end", status=status)
            finally:
                self.metric_log.close()
        except UserError as problem:
            if error is None:
                raise
            self.say(f"warning: {problem}")  # what went wrong before is what the user must see
        finally:
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
