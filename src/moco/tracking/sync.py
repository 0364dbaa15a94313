"""Bringing finished and interrupted runs to MLflow after the fact."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from moco.errors import UserError, first_of
from moco.redaction import redact
from moco.settings.tracking import TrackingConfig
from moco.tracking.metric_log import NAME, close_abandoned, read_events
from moco.tracking.mlflow_sink import MlflowSink
from moco.tracking.pipeline_run import converge
from moco.tracking.sinks import other_sinks
from moco.tracking.store import NO_ANSWER, available, check_address, client, explain, sqlite_file, store_uri
from moco.tracking.store_file import refuse_other_schema, relocate


@dataclass
class FoundLogs:
    """logs: of runs, oldest first. unreadable: folders and logs that this user may not read, or that lead nowhere."""

    project: Path
    logs: list[Path] = field(default_factory=list)
    unreadable: list[Path] = field(default_factory=list)

    def describe(self) -> str:
        """Return which cannot be read, in one line with what to do; '' where all can."""
        if not self.unreadable:
            return ""
        names = [path.relative_to(self.project) for path in self.unreadable]
        return (
            f"{len(names)} run folder(s) cannot be read and are left out: {first_of(names)}; if they are another "
            "user's, ask for `chmod -R go+rX`"
        )


def _began(log: Path) -> float:
    """Return when a run began, in seconds since 1970; 0 where its log cannot be read, which is told later."""
    try:
        return float(next((event["time"] for event in read_events(log) if event["event"] == "start"), 0.0))
    except (UserError, OSError):
        return 0.0


def logs_of(project: Path) -> FoundLogs:
    """Find every metric log of the project and of its sweeps, oldest first."""
    found = FoundLogs(project)
    runs = [project / "runs"]
    for sweep in _folders(project / "sweeps", found):
        runs += [task / "runs" for task in _folders(sweep, found)]
    for place in runs:
        for stage in _folders(place, found):
            for folder in _folders(stage, found):
                _look(folder / NAME, found)
    found.logs.sort(key=_began)
    return found


def _folders(parent: Path, found: FoundLogs) -> list[Path]:
    """Return the folders in a folder; none where it is missing."""
    try:
        inner = sorted(parent.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError:
        found.unreadable.append(parent)
        return []
    found.unreadable += [path for path in inner if path.is_symlink() and not path.exists()]  # they lead nowhere
    return [path for path in inner if path.is_dir()]


def _look(log: Path, found: FoundLogs) -> None:
    try:
        if log.exists() and not log.is_file():  # a pipe would be waited for, for ever
            found.unreadable.append(log.parent)
            return
        with log.open("rb"):
            found.logs.append(log)
    except (FileNotFoundError, NotADirectoryError):  # not a run, or one that has not begun
        return
    except OSError:
        found.unreadable.append(log.parent)


def sync_all(
    project: Path, config: TrackingConfig, say: Callable[[str], None], runs: Sequence[Path] = (), again: bool = False
) -> None:
    """Replay metric logs, oldest first, so that the newest classifier is registered last.

    What MLflow has already is not sent again. Afterwards every pipeline's row has the values of each of its stages.

    runs: folders of some; otherwise all of the project and of its sweeps. again: also those that somebody deleted.
    Raises UserError where MLflow is missing, no store is set, or a run could not be read or brought there.
    """
    uri = _store_of(config, say)
    for folder in runs:
        if not (folder / NAME).is_file():
            raise UserError(f"{folder}: no run's folder, as it has no {NAME}; they are runs/STAGE/KEY", "E-SYNC-FOLDER")
    given = sorted((folder / NAME for folder in runs), key=_began)
    found = FoundLogs(project, given) if runs else logs_of(project)
    failed: list[str] = []
    deleted: list[Path] = []
    with _rare_garbage_collection():
        for log in found.logs:
            try:
                close_abandoned(log)
                sink = MlflowSink(log.parent, config)
                sink.replay(again)
                deleted += [log.parent] if sink.deleted else []
                for other in other_sinks(log.parent, config):
                    other.replay()
            except Exception as error:  # MLflow and its HTTP layers raise many kinds
                failed.append(_problem(error, log, uri))
    _converge(config, uri, failed)
    there = len(found.logs) - len(failed) - len(deleted)
    say(f"{there} of {len(found.logs)} runs are in {redact(uri)}")
    if deleted:
        say(
            f"{len(deleted)} were deleted there and stay so: {first_of(deleted)}; "
            "`moco sync --again RUN` brings one back"
        )
    if found.unreadable:
        failed.append(found.describe())
    if failed:
        raise UserError(f"{len(failed)} problem(s) in bringing runs to MLflow, first: {failed[0]}", "E-SYNC-FAILED")


@contextlib.contextmanager
def _rare_garbage_collection() -> Iterator[None]:
    """Look for cycles seldom while the context lasts.

    MLflow makes some objects for every value. To look through them again and again takes a quarter of the time
    (benchmarks/README.md).
    """
    before = gc.get_threshold()
    gc.set_threshold(200_000, 50, 50)
    try:
        yield
    finally:
        gc.set_threshold(*before)


def _store_of(config: TrackingConfig, say: Callable[[str], None]) -> str:
    """Return the store's address, once it can be used as it is; a store that was moved gets its new addresses."""
    if not available():
        raise UserError(
            "mlflow is not installed here; run this where it is, the logs are in runs/", "E-TRACKING-NO-MLFLOW"
        )
    uri = store_uri(config)
    if not uri:
        raise UserError("tracking.uri is empty; set it in params.yaml", "E-TRACKING-NO-STORE")
    check_address(uri, config.experiment)
    if (file := sqlite_file(uri)) and file.exists():
        refuse_other_schema(file)
        if former := relocate(file):
            say(f"{file} was moved or copied from {former[0].parent}: its artifacts' addresses now lead here")
    return uri


def _problem(error: Exception, log: Path, uri: str) -> str:
    """Return what is wrong with one run. Raises UserError where it is wrong with the store, so with all."""
    problem = explain(error, uri)
    if isinstance(error, UserError) and error.code.split("-")[1:2] == ["STORE"]:
        raise error
    if NO_ANSWER in problem:
        raise UserError(f"{problem}; nothing is lost, repeat `moco sync` then", "E-STORE-NO-ANSWER") from None
    return problem if str(log.parent) in problem else f"{log.parent}: {problem}"


def _converge(config: TrackingConfig, uri: str, failed: list[str]) -> None:
    try:
        connected = client(uri)
        found = connected.get_experiment_by_name(config.experiment)
        if found is not None and found.lifecycle_stage == "active":
            converge(connected, found.experiment_id)
    except Exception as error:  # MLflow and its HTTP layers raise many kinds
        failed.append(f"the pipelines' rows: {explain(error, uri)}")
