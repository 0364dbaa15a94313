"""Feeds metric logs into MLflow.

A replay starts where the last one ended: the run's id, the place in the log and the last step of each metric are kept
in mlflow.json beside the log. Where that file is of another store, or lost, the run is found by the log's identity,
which it carries as a tag, and what it has already is asked from the store: repeating a replay, from any machine,
changes nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from moco.errors import present
from moco.files import write_text
from moco.redaction import redact
from moco.settings.tracking import TrackingConfig
from moco.tracking import pipeline_run, registry, store, uploads
from moco.tracking.metric_log import NAME, finite, identity, read_from
from moco.tracking.store_file import refuse_other_schema, relocate

STATE = "mlflow.json"
LOG_TAG = "moco.log"
JOBS_TAG, COMMITS_TAG = "slurm_job_ids", "git_commits"  # of all processes that worked on the run
MARKED = 200  # bytes
BUSY = 60.0  # seconds to wait for another process that replays the same log


@dataclass
class SinkState:
    """What MLflow has. offset: bytes of the log that were replayed. last_step: by metric. began: seconds since 1970.
    parent: the pipeline's run. mark: of the bytes before the offset, which tells whether the log is still the one that
    was replayed. owed: places of files and models that the store would not take. store: tells this store from another
    at the same address."""

    uri: str
    run_id: str | None = None
    offset: int = 0
    last_step: dict[str, int] = field(default_factory=dict)
    began: float = 0.0
    parent: str | None = None
    mark: str = ""
    owed: list[int] = field(default_factory=list)
    store: str = ""


class MlflowSink:
    """Replays the log of one run."""

    def __init__(self, folder: Path, config: TrackingConfig) -> None:
        self.folder, self.config = folder, config
        self.log = folder / NAME
        self.uri = store.store_uri(config)
        self.shown_uri = redact(self.uri)  # as it is remembered
        self.state = SinkState(self.shown_uri)
        self.client: Any = None
        self.again = self.deleted = False
        self.problem: Exception | None = None  # with a file or model; numbers and states do not wait for those

    def explain(self, error: BaseException) -> str:
        """Return one line for what MLflow says, with what to do."""
        return store.explain(error, self.uri)

    def _load(self) -> SinkState:
        try:
            state = SinkState(**json.loads((self.folder / STATE).read_text()))
        except (OSError, ValueError, TypeError):
            return SinkState(self.shown_uri)
        # After a crash of the machine a log may be shorter than what was read of it, and then grow again.
        same = state.uri == self.shown_uri and state.mark == self._mark(state.offset)
        return state if same else SinkState(self.shown_uri)

    def _mark(self, offset: int) -> str:
        with self.log.open("rb") as file:
            file.seek(max(0, offset - MARKED))
            before = file.read(min(offset, MARKED))
        return hashlib.sha256(before).hexdigest()[:16] if len(before) == min(offset, MARKED) else "shorter"

    def replay(self, again: bool = False) -> None:
        """Bring MLflow up to the end of the log; can be called again. `deleted` then tells whether somebody deleted the
        run there, so that it stays as it is; again: brings it back.

        Raises whatever MLflow raises, and TimeoutError where another process is at it. A file or model that the store
        refuses is raised last and tried again next."""
        if (path := store.sqlite_file(self.uri)) and path.exists():
            refuse_other_schema(path)
            relocate(path)
        if self.client is None:
            self.client = store.client(self.uri)
        self.again = again
        try:
            with FileLock(self.folder / "mlflow.lock", timeout=BUSY):
                self.state = self._load()
                self.deleted = not self._is_wanted()
                if not self.deleted:
                    self._replay()
        except Timeout:
            raise TimeoutError("another process is bringing this run there") from None

    def _is_wanted(self) -> bool:
        """Return whether the run is to be brought there.

        It is not where somebody deleted it, for good or not, unless `again`. Another store, or an empty one, may answer
        at the same address: then everything begins anew.
        """
        run = self._found(self.state.run_id) if self.state.run_id else None
        if self.state.run_id and (run is None or run.data.tags.get(LOG_TAG) != identity(self.log)):
            if not self.again and run is None and self.state.store and self.state.store == store.identity(self.client):
                return False
            self.state, run = SinkState(self.shown_uri), None
        if run is None:
            run = self._adopt()
        if run is not None and run.info.lifecycle_stage != "active":
            if not self.again:
                return False
            self.client.restore_run(run.info.run_id)
        if self.state.parent and not self._is_active(self.state.parent):
            self.state.parent = None
        self.state.store = store.identity(self.client)
        return True

    def _found(self, run_id: str) -> Any:
        """Return the run, deleted or not; None where the store never had it, or has it no more."""
        from mlflow.exceptions import MlflowException

        try:
            return self.client.get_run(run_id)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None

    def _is_active(self, run_id: str) -> bool:
        run = self._found(run_id)
        return run is not None and run.info.lifecycle_stage == "active"

    @property
    def run_id(self) -> str:
        """Return the id of the run in MLflow."""
        return present(self.state.run_id, "a run in MLflow")

    def _replay(self) -> None:
        pending: list[Any] = []
        steps: dict[str, int] = {}  # last step of each metric in `pending`
        reached = self.state.offset
        self._pay()
        resumed = [(after, e["step"]) for e, after in read_from(self.log, reached) if e["event"] == "resume"]
        for event, after in read_from(self.log, reached):
            if self.state.run_id is None and event["event"] != "start":
                continue
            if event["event"] == "metrics" and any(after < place and event["step"] > step for place, step in resumed):
                pass  # void, and not sent yet
            elif event["event"] in ("metrics", "system"):
                if len(pending) + len(event["metrics"]) > store.BATCH:  # so that no request is nearly empty
                    self._send(pending, steps, reached)
                pending.extend(self._metrics(event, steps))
            else:
                self._send(pending, steps, reached)
                self._handle(event, reached)
                self._remember(after)
            reached = after
        self._send(pending, steps, reached)
        if self.problem is not None:
            # The one that failed goes to the end, so that it does not stand before the others each time.
            self.state.owed = [*self.state.owed[1:], self.state.owed[0]]
            self._remember(self.state.offset)
            raise self.problem

    def _handle(self, event: dict[str, Any], place: int) -> None:
        handlers: dict[str, Callable[[dict[str, Any]], None]] = {"start": self._start, "end": self._end}
        files = ("artifact", "checkpoint", "model")
        if event["event"] in files and self.problem is None:
            try:
                self._upload(event)
            except Exception as error:  # MLflow and what stores files raise many kinds
                self.problem = error
        if event["event"] in files and self.problem is not None:  # also what comes after: each may take minutes to fail
            self.state.owed.append(place)
        elif handler := handlers.get(event["event"]):
            handler(event)

    def _pay(self) -> None:
        """Try again what the store did not take before."""
        self.problem, owed, self.state.owed = None, self.state.owed, []
        for place in owed:
            self._handle(next(read_from(self.log, place))[0], place)
        if owed:
            self._remember(self.state.offset)

    def _send(self, pending: list[Any], steps: dict[str, int], offset: int) -> None:
        """Send and empty `pending`. The state records only what MLflow has taken."""
        if pending:
            store.log_metrics(self.client, self.run_id, pending)
            self.state.last_step.update(steps)
            self._remember(offset)
        pending.clear()
        steps.clear()

    def _remember(self, offset: int) -> None:
        self.state.offset, self.state.mark = offset, self._mark(offset)
        write_text(self.folder / STATE, json.dumps(asdict(self.state)))

    def _start(self, event: dict[str, Any]) -> None:
        from mlflow.entities import RunTag

        if self.state.run_id is not None and self.state.offset > 0:  # another process goes on with the run
            self._continued(event)
            return
        self.state.began = event["time"]
        if self.state.run_id is None:
            self._create(event)
        store.log_params(self.client, self.run_id, event["params"])
        tags = {**event["tags"], "stage": event["stage"], **_one_of_many(event["tags"])}
        self.client.log_batch(self.run_id, tags=[RunTag(name, str(value)) for name, value in tags.items()])
        dataset = [uploads.dataset(event["dataset"])] if event.get("dataset") else []
        if dataset:
            self.client.log_inputs(self.run_id, datasets=dataset)
        pipeline = event.get("pipeline")
        if pipeline and pipeline_run.of_pipeline(event["params"], pipeline["params"]) and not self._left_pipeline():
            self.state.parent = pipeline_run.join(self.client, self._experiment(), self.run_id, pipeline, event["time"])
            self.client.log_inputs(self.state.parent, datasets=dataset)

    def _create(self, event: dict[str, Any]) -> None:
        run = self.client.create_run(
            self._experiment(), run_name=event["name"], start_time=int(event["time"] * 1000),
            tags={LOG_TAG: identity(self.log)},
        )  # fmt: skip
        self.state.run_id = run.info.run_id
        self._remember(0)
        for other in self._known():  # of a request that was answered too late, and made again
            if other.info.run_id != self.state.run_id and other.info.lifecycle_stage == "active":
                self.client.delete_run(other.info.run_id)

    def _known(self) -> list[Any]:
        """Return the runs of this log that the store has, deleted ones last."""
        from mlflow.entities import ViewType

        found = self.client.get_experiment_by_name(self.config.experiment)
        if found is None:
            return []
        runs = store.search(
            self.client, found.experiment_id, f"tags.`{LOG_TAG}` = '{identity(self.log)}'", ViewType.ALL
        )
        return sorted(runs, key=lambda run: run.info.lifecycle_stage != "active")

    def _adopt(self) -> Any:
        """Take up the run of this log that the store has from another machine, or from before the state was lost, and
        return it; None where there is none."""
        run = next(iter(self._known()), None)
        if run is not None:
            self.state.run_id = run.info.run_id
            self.state.last_step = {metric.key: metric.step for metric in run.data.to_proto().metrics}
        return run

    def _left_pipeline(self) -> bool:
        """Return whether the run was part of a pipeline whose row somebody deleted."""
        parent = self.client.get_run(self.run_id).data.tags.get(pipeline_run.PARENT_TAG)
        return bool(parent) and not self.again and not self._is_active(parent)

    def _continued(self, event: dict[str, Any]) -> None:
        self.client.update_run(self.run_id, status="RUNNING")
        before = self.client.get_run(self.run_id).data.tags
        for tag, value in _one_of_many(event["tags"]).items():
            known = (before.get(tag) or _one_of_many(before).get(tag, "")).split()
            if value not in known:
                self.client.set_tag(self.run_id, tag, " ".join([*known, value]))
        if self.state.parent:
            self.client.update_run(self.state.parent, status="RUNNING")

    def _experiment(self) -> str:
        return store.experiment(self.client, self.uri, self.config.experiment)

    def _metrics(self, event: dict[str, Any], steps: dict[str, int]) -> list[Any]:
        """Return the event's metrics as MLflow takes them.

        The step of a measurement of the machine is its second of the run.
        """
        from mlflow.entities import Metric

        step = int(event["step"] if event["event"] == "metrics" else event["time"] - self.state.began)
        fresh = []
        for name, value in finite(event["metrics"]).items():
            if step > steps.get(name, self.state.last_step.get(name, -1)):  # else sent before a resume
                steps[name] = step
                fresh.append(Metric(name, value, int(event["time"] * 1000), step))
        return fresh

    def _upload(self, event: dict[str, Any]) -> None:
        if event["event"] == "artifact":
            uploads.send_artifact(self.client, self.run_id, self.folder, event)
        elif event["event"] == "checkpoint":
            registry.log_checkpoint(self.client, self._experiment(), self.run_id, event)
        else:
            name = self.config.registered_model
            uploads.send_model(self.client, self._experiment(), self.run_id, self.folder, name, event, self.again)

    def _end(self, event: dict[str, Any]) -> None:
        self.client.set_terminated(self.run_id, event["status"], int(event["time"] * 1000))
        if self.state.parent:
            pipeline_run.leave(self.client, self._experiment(), self.state.parent)


def _one_of_many(tags: dict[str, str]) -> dict[str, str]:
    """Return what the tags of one process add to those that list all processes of the run."""
    commit = tags.get("git_commit", "") + ("-dirty" if tags.get("git_dirty") == "true" else "")
    found = {JOBS_TAG: tags.get("slurm_job_id", ""), COMMITS_TAG: commit if "git_commit" in tags else ""}
    return {tag: value for tag, value in found.items() if value}
