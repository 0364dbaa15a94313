"""The run that stands for a pipeline, above those of its stages: one row with every parameter and every result.

Stages of the same settings and data belong to the same pipeline, wherever and in whatever order they ran. A row is made
of what the store has of the stages, so that it comes to the same values in whatever order they arrive.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import Any

from moco.tracking.metric_log import as_text
from moco.tracking.store import log_metrics, log_params, search

KEY_TAG = "moco.pipeline"
MADE_TAG = "moco.made"
PROGRESS = {"epoch", "lr", "key_momentum", "data_wait_share"}  # of a stage on its way: no results
PARENT_TAG = "mlflow.parentRunId"  # MLflow's own


def join(client: Any, experiment: str, run_id: str, pipeline: dict[str, Any], when: float) -> str:
    """Make the run of a stage a child of its pipeline's, which is made where it is missing.

    pipeline: key, name, params, tags. when: seconds since 1970. Returns the parent's id.
    """
    found = _of_pipeline(client, experiment, pipeline["key"])
    if not found:
        made = client.create_run(
            experiment, run_name=pipeline["name"], start_time=int(when * 1000),
            tags={KEY_TAG: pipeline["key"], MADE_TAG: str(time.time_ns()), "stage": "pipeline", **pipeline["tags"]},
        )  # fmt: skip
        found = _of_pipeline(client, experiment, pipeline["key"]) or [made]
        if found[0].info.run_id != made.info.run_id:  # another stage, started at the same moment, was faster
            client.delete_run(made.info.run_id)
    parent = str(found[0].info.run_id)
    log_params(client, parent, pipeline["params"])
    client.set_tag(run_id, PARENT_TAG, parent)
    client.update_run(parent, status="RUNNING")
    _fill(client, [client.get_run(parent)], _finished(client, experiment, pipeline["tags"].get("data_digest")))
    return parent


def of_pipeline(params: Mapping[str, Any], pipeline: Mapping[str, Any]) -> bool:
    """Return whether a stage of these parameters, those of its whole chain, is one of the pipeline's.

    A classifier that came from elsewhere has only the parameters of its evaluation.
    """
    asked = params.keys() & pipeline.keys()
    return any(name.startswith("pretrain.") for name in params) and all(
        as_text(params[name]) == as_text(pipeline[name]) for name in asked
    )


def leave(client: Any, experiment: str, parent: str) -> None:
    """Bring a stage's end to its pipeline's row, and its last values to all rows that it belongs to."""
    row = client.get_run(parent)
    converge(client, experiment, row.data.tags.get("data_digest"), [row])


def converge(client: Any, experiment: str, digest: str | None = None, ended: Iterable[Any] | None = None) -> None:
    """Give every pipeline's row the values of each of its stages, as STAGE.METRIC, and its status.

    digest: of the data, where only rows of these count. ended: rows whose status may have changed, else all.
    Repeated, it changes nothing.
    """
    rows = search(client, experiment, f"tags.stage = 'pipeline'{_of_data(digest)}")
    _fill(client, rows, _finished(client, experiment, digest))
    for row in rows if ended is None else ended:
        _end(client, experiment, row)


def _of_data(digest: str | None) -> str:
    return f" AND tags.data_digest = '{digest}'" if digest and "'" not in digest else ""


def _finished(client: Any, experiment: str, digest: str | None) -> list[Any]:
    """Return the finished runs of stages, the first that ended first."""
    found = search(client, experiment, f"attributes.status = 'FINISHED'{_of_data(digest)}")
    stages = [run for run in found if run.data.tags.get("stage", "pipeline") != "pipeline"]
    return sorted(stages, key=lambda run: run.info.end_time or 0)


def _fill(client: Any, rows: Iterable[Any], stages: list[Any]) -> None:
    """Log what rows lack. The store keeps the value with the latest time, that of the run which ended last."""
    from mlflow.entities import Metric

    for row in rows:
        known = {metric.key: (metric.timestamp, metric.value) for metric in row.data.to_proto().metrics}
        wanted: dict[str, tuple[int, float]] = {}
        for run in stages:
            same_data = run.data.tags.get("data_digest") == row.data.tags.get("data_digest")
            if same_data and of_pipeline(run.data.params, row.data.params):
                when = int(run.info.end_time or 0)
                wanted |= {f"{run.data.tags['stage']}.{name}": (when, value) for name, value in _own(run).items()}
        missing = {name: found for name, found in wanted.items() if known.get(name, (-1, 0.0)) < found}
        log_metrics(client, row.info.run_id, [Metric(name, value, when, 0) for name, (when, value) in missing.items()])


def _own(run: Any) -> dict[str, float]:
    """Return a run's metrics without those of the machine and of its checkpoints."""
    return {
        name: value for name, value in run.data.metrics.items() if not name.startswith(("system/", "checkpoint/"))
        and name not in PROGRESS
    }  # fmt: skip


def _of_pipeline(client: Any, experiment: str, key: str) -> list[Any]:
    """Return the runs in the order in which they were made, so that all processes agree on one of several."""
    found = search(client, experiment, f"tags.`{KEY_TAG}` = '{key}'")
    return sorted(found, key=lambda run: (int(run.data.tags.get(MADE_TAG, 0)), run.info.run_id))


def _end(client: Any, experiment: str, row: Any) -> None:
    """Give a row the status and the end of the stage that ended last, unless one is still running."""
    stages = search(client, experiment, f"tags.`{PARENT_TAG}` = '{row.info.run_id}'")
    if not stages or any(run.info.status == "RUNNING" for run in stages):
        return
    last = max(stages, key=lambda run: run.info.end_time or 0)
    if (row.info.status, row.info.end_time) != (last.info.status, last.info.end_time):
        client.set_terminated(row.info.run_id, last.info.status, last.info.end_time)
