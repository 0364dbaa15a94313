"""The run that stands for a pipeline, above those of its stages: one row with every parameter and every result.

Stages of the same settings and data belong to the same pipeline, wherever and in whatever order they ran.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moco.config import HOUSEKEEPING
from moco.tracking.metric_log import as_text, last_values, read_events
from moco.tracking.store import log_metrics, log_params

KEY_TAG = "moco.pipeline"
MADE_TAG = "moco.made"
PROGRESS = {"epoch", "lr", "key_momentum", "data_wait_share"}  # of a stage on its way: no results
PARENT_TAG = "mlflow.parentRunId"  # MLflow's own


def join(client: Any, experiment: str, run_id: str, pipeline: dict[str, Any], when: float) -> str:
    """Makes the run of a stage a child of its pipeline's, which is made where it is missing. pipeline: key, name,
    params, tags. Returns the parent's id."""
    found = _of_pipeline(client, experiment, pipeline["key"])
    if not found:
        made = client.create_run(
            experiment, run_name=pipeline["name"], start_time=int(when * 1000),
            tags={KEY_TAG: pipeline["key"], MADE_TAG: str(time.time_ns()), "stage": "pipeline", **pipeline["tags"]},
        )  # fmt: skip
        found = _of_pipeline(client, experiment, pipeline["key"]) or [made]
        if found[0].info.run_id != made.info.run_id:  # another stage, started at the same moment, was faster
            client.delete_run(made.info.run_id)
        _inherit(client, experiment, str(found[0].info.run_id), pipeline)
    parent = str(found[0].info.run_id)
    log_params(client, parent, pipeline["params"])
    client.set_tag(run_id, PARENT_TAG, parent)
    client.update_run(parent, status="RUNNING")
    return parent


def of_pipeline(params: Mapping[str, Any], pipeline: Mapping[str, Any]) -> bool:
    """Whether a stage of these parameters, those of its whole chain, is one of the pipeline's. A classifier that came
    from elsewhere has none but those of its evaluation. What is looked at or kept may differ."""
    asked = params.keys() & pipeline.keys() - HOUSEKEEPING
    return any(name.startswith("pretrain.") for name in params) and all(
        as_text(params[name]) == as_text(pipeline[name]) for name in asked
    )


def _inherit(client: Any, experiment: str, parent: str, pipeline: dict[str, Any]) -> None:
    """Results of stages that ran before, for another pipeline that has the same settings up to there."""
    from mlflow.entities import Metric

    before = client.search_runs(
        [experiment], f"tags.data_digest = '{pipeline['tags']['data_digest']}' AND attributes.status = 'FINISHED'"
    )
    for run in reversed(before):  # newest last
        stage = run.data.tags.get("stage", "pipeline")
        if stage != "pipeline" and of_pipeline(run.data.params, pipeline["params"]):
            values = [Metric(f"{stage}.{name}", value, run.info.end_time, 0) for name, value in _own(run).items()]
            log_metrics(client, parent, values)


def _own(run: Any) -> dict[str, float]:
    """A run's metrics without those of the machine and of its checkpoints."""
    return {
        name: value for name, value in run.data.metrics.items() if not name.startswith(("system/", "checkpoint/"))
        and name not in PROGRESS
    }  # fmt: skip


def _of_pipeline(client: Any, experiment: str, key: str) -> list[Any]:
    """In the order in which they were made, so that all processes agree on one of several."""
    found = client.search_runs([experiment], f"tags.`{KEY_TAG}` = '{key}'")
    return sorted(found, key=lambda run: (int(run.data.tags[MADE_TAG]), run.info.run_id))


def leave(client: Any, experiment: str, state: Any, log: Path, status: str, when: int) -> None:
    """A stage has ended: its last values go to the pipeline's run as STAGE.METRIC, and its status, unless another
    stage is still running."""
    from mlflow.entities import Metric

    stage = next(event["stage"] for event in read_events(log) if event["event"] == "start")
    values = last_values(log) if status == "FINISHED" else {}
    metrics = [Metric(f"{stage}.{name}", value, when, 0) for name, value in values.items() if name not in PROGRESS]
    log_metrics(client, state.parent, metrics)
    stages = client.search_runs([experiment], f"tags.`{PARENT_TAG}` = '{state.parent}'")
    if not any(run.info.status == "RUNNING" for run in stages):  # also where runs are brought here late
        last = max(stages, key=lambda run: run.info.end_time or 0)
        client.set_terminated(state.parent, last.info.status, last.info.end_time)
