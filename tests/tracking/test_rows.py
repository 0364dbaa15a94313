"""A pipeline's row comes to the same values whatever happened between its stages' runs and MLflow."""

# ruff: noqa: F811 - fixtures of the helpers
from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from sink_helpers import CONFIG, connect, empty_store, no_server_from_outside, store  # noqa: F401

from moco.tracking.metric_log import MetricLog
from moco.tracking.mlflow_sink import MlflowSink
from moco.tracking.sync import sync_all

pytestmark = [
    pytest.mark.slow,  # making an MLflow database takes seconds
    pytest.mark.filterwarnings("default"),  # MLflow and SQLAlchemy deprecate things among themselves
]
PRETRAIN = {"pretrain.lr": 0.06}


def stage_log(project: Path, stage: str, key: str, value: float, train_lr: float = 0.1) -> Path:
    """The log of a finished stage. Pipelines differ in train.lr, and share the pretraining."""
    params = {**PRETRAIN, "train.lr": train_lr}
    log = MetricLog(project / f"runs/{stage}/{key}/metrics.jsonl")
    log.write(
        "start", stage=stage, name=f"{stage}-{key}", params=PRETRAIN if stage == "pretrain" else params,
        tags={"data_digest": "d"},
        pipeline={"key": f"k{train_lr}", "name": f"p{train_lr}", "params": params, "tags": {"data_digest": "d"}},
    )  # fmt: skip
    log.write("metrics", step=1, metrics={"accuracy": value, "epoch": 1})
    log.write("end", status="FINISHED")
    log.close()
    return log.path.parent


def logs(project: Path) -> list[Path]:
    """Of two pipelines that share a pretraining, which ran twice; the second time counts."""
    return [
        stage_log(project, "pretrain", "a", 0.1), stage_log(project, "train", "b", 0.2),
        stage_log(project, "pretrain", "a-2", 0.3), stage_log(project, "train", "c", 0.4, train_lr=0.5),
    ]  # fmt: skip


WANTED = {
    "p0.1": {"pretrain.accuracy": 0.3, "train.accuracy": 0.2},
    "p0.5": {"pretrain.accuracy": 0.3, "train.accuracy": 0.4},
}


def rows() -> dict[str, dict[str, float]]:
    client = connect()
    experiment = client.get_experiment_by_name("experiment").experiment_id
    found = client.search_runs([experiment], "tags.stage = 'pipeline'")
    assert all(run.info.status == "FINISHED" for run in found)
    assert len({run.info.run_name for run in found}) == len(found)
    return {run.info.run_name: run.data.metrics for run in found}


@pytest.mark.fault("rows", 6)
@pytest.mark.parametrize("order", [order for order in itertools.permutations(range(4)) if order[0] == 3])
def test_rows_are_whole_in_whatever_order_stages_arrive(tmp_path: Path, store: Path, order: Any) -> None:
    """The order of an undisturbed run is 0, 1, 2, 3; here the last stage's run comes first."""
    folders = logs(tmp_path)
    for number in order:
        MlflowSink(folders[number], CONFIG).replay()
    assert rows() == WANTED
    sync_all(tmp_path, CONFIG, lambda _: None)
    assert rows() == WANTED


@pytest.mark.fault("rows")
def test_a_row_that_was_cut_off_while_it_was_made_is_filled_by_sync(
    tmp_path: Path,
    store: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The store is gone at each request in turn, at the end of a pipeline; afterwards `moco sync` is called once."""
    from mlflow import MlflowClient

    folders = logs(tmp_path)
    calls, failing = [0], [0]
    for name in ("log_batch", "create_run", "set_tag", "set_terminated", "update_run", "search_runs", "get_run"):
        original = getattr(MlflowClient, name)

        def flaky(self: Any, *arguments: Any, original: Any = original, **words: Any) -> Any:
            calls[0] += 1
            if calls[0] % 23 == failing[0]:
                raise ConnectionError("the server is gone")
            return original(self, *arguments, **words)

        monkeypatch.setattr(MlflowClient, name, flaky)
    for number in (3, 2, 1, 0):
        for failing[0] in (5, 11, 17):
            try:
                MlflowSink(folders[number], CONFIG).replay()
            except ConnectionError:
                continue
    failing[0] = -1
    sync_all(tmp_path, CONFIG, lambda _: None)
    assert rows() == WANTED


@pytest.mark.fault("rows")
def test_rows_of_a_store_that_an_earlier_version_left_without_values_are_filled(tmp_path: Path, store: Path) -> None:
    """As after an outage: the row was made before the pretraining's run, of another pipeline, was there."""
    import sqlite3

    for folder in logs(tmp_path):
        MlflowSink(folder, CONFIG).replay()
    with sqlite3.connect(store) as connection:
        for table in ("metrics", "latest_metrics"):
            connection.execute(f"DELETE FROM {table} WHERE key LIKE 'pretrain.%'")
    connection.close()
    assert rows() != WANTED
    sync_all(tmp_path, CONFIG, lambda _: None)
    assert rows() == WANTED


@pytest.mark.fault("rows")
def test_a_row_that_somebody_deleted_stays_deleted_and_the_others_are_whole(tmp_path: Path, store: Path) -> None:
    folders = logs(tmp_path)
    for folder in folders:
        MlflowSink(folder, CONFIG).replay()
    client = connect()
    experiment = client.get_experiment_by_name("experiment").experiment_id
    (row,) = client.search_runs([experiment], "attributes.run_name = 'p0.5'")
    client.delete_run(row.info.run_id)
    for folder in folders:
        (folder / "mlflow.json").unlink()  # all is looked at anew
    sync_all(tmp_path, CONFIG, lambda _: None)
    assert rows() == {"p0.1": WANTED["p0.1"]}
