"""What goes wrong between a log and MLflow is made good: nothing is lost, doubled or waited for."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

import pytest
from sink_helpers import CONFIG, begin, connect, history, no_server_from_outside, only_run  # noqa: F401

from conftest import Moco
from moco.settings.tracking import TrackingConfig
from moco.tracking.metric_log import MetricLog
from moco.tracking.mlflow_sink import MlflowSink
from moco.tracking.run import Run

pytestmark = [
    pytest.mark.slow,  # creating an MLflow database takes seconds
    pytest.mark.filterwarnings("default"),  # MLflow and SQLAlchemy deprecate things among themselves
]


@pytest.mark.fault("store")
@pytest.mark.parametrize("failing", [1, 2])
def test_what_a_server_did_not_take_is_sent_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    """The store refuses one request, the parameters' or the metrics', and works again at the next delivery."""
    from mlflow import MlflowClient

    log = begin(tmp_path / "run")
    log.write("metrics", step=1, metrics={"loss": 0.5})
    calls: list[int] = []
    log_batch = MlflowClient.log_batch

    def flaky(self: MlflowClient, *arguments: Any, **words: Any) -> Any:
        calls.append(1)
        if len(calls) == failing:
            raise ConnectionError("the server is gone")
        return log_batch(self, *arguments, **words)

    monkeypatch.setattr(MlflowClient, "log_batch", flaky)
    sink = MlflowSink(tmp_path / "run", CONFIG)
    with pytest.raises(ConnectionError):
        sink.replay()
    sink.replay()
    run = only_run()
    assert run.data.params == {"pretrain.lr": "0.06"}
    assert history(connect(), run.info.run_id, "loss") == [(1, 0.5)]


def test_what_is_written_during_a_delivery_comes_with_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient

    log = begin(tmp_path / "run")
    log.write("metrics", step=1, metrics={"loss": 0.5})
    log_batch = MlflowClient.log_batch

    def slow(self: MlflowClient, *arguments: Any, **words: Any) -> Any:
        if words.get("metrics") and words["metrics"][0].step == 1:
            log.write("metrics", step=2, metrics={"loss": 0.25})
            log.write("end", status="FINISHED")
        return log_batch(self, *arguments, **words)

    monkeypatch.setattr(MlflowClient, "log_batch", slow)
    for _ in range(2):
        MlflowSink(tmp_path / "run", CONFIG).replay()
    run = only_run()
    assert history(connect(), run.info.run_id, "loss") == [(1, 0.5), (2, 0.25)]
    assert run.info.status == "FINISHED"


def test_a_run_that_was_stopped_before_it_began_goes_on(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with (
        pytest.raises(KeyboardInterrupt),
        Run(folder, "train", TrackingConfig(uri="", experiment="e", registered_model="m"), print),
    ):
        raise KeyboardInterrupt
    log = MetricLog(folder / "metrics.jsonl")
    log.write("end", status="KILLED")  # as an earlier version wrote it
    log.close()
    MlflowSink(folder, CONFIG).replay()
    log = begin(folder)
    log.write("metrics", step=1, metrics={"loss": 0.5})
    log.close()
    for _ in range(2):
        MlflowSink(folder, CONFIG).replay()
    assert only_run().info.status == "RUNNING"
    assert history(connect(), only_run().info.run_id, "loss") == [(1, 0.5)]


@pytest.mark.fault("store")
def test_another_store_at_the_same_address_gets_everything(tmp_path: Path) -> None:
    log = begin(tmp_path / "run")
    log.write("metrics", step=1, metrics={"loss": 0.5})
    log.write("end", status="FINISHED")
    log.close()
    MlflowSink(tmp_path / "run", CONFIG).replay()
    with sqlite3.connect(tmp_path / "mlflow.db") as store:  # as if it were new
        for table in ("metrics", "latest_metrics", "params", "tags", "runs"):
            store.execute(f"DELETE FROM {table}")
        store.execute("UPDATE experiments SET creation_time = creation_time + 1")
    store.close()
    MlflowSink(tmp_path / "run", CONFIG).replay()
    assert history(connect(), only_run().info.run_id, "loss") == [(1, 0.5)]
    connect().delete_run(only_run().info.run_id)
    sink, more = MlflowSink(tmp_path / "run", CONFIG), MetricLog(tmp_path / "run/metrics.jsonl")
    for step in (2, 3):  # a process that goes on with it, and is not told of a problem
        more.write("metrics", step=step, metrics={"loss": 0.5})
        sink.replay()
    more.close()
    assert connect().search_runs([connect().get_experiment_by_name("experiment").experiment_id]) == [], "stays deleted"


def test_void_steps_that_were_not_sent_yet_are_not_sent(tmp_path: Path) -> None:
    log = begin(tmp_path / "run")
    for step in (1, 2, 3):
        log.write("metrics", step=step, metrics={"loss": 9.0})
    log.write("resume", step=1)
    for step in (2, 3, 4):
        log.write("metrics", step=step, metrics={"loss": float(step)})
    log.close()
    MlflowSink(tmp_path / "run", CONFIG).replay()
    assert history(connect(), only_run().info.run_id, "loss") == [(1, 9.0), (2, 2.0), (3, 3.0), (4, 4.0)]


def test_a_checkpoint_whose_request_failed_is_made_good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient

    log = begin(tmp_path / "run")
    log.write("checkpoint", step=7, path="checkpoint_001.pth", metrics={"loss": 0.5})
    log.close()
    finalize = MlflowClient.finalize_logged_model
    monkeypatch.setattr(MlflowClient, "finalize_logged_model", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        MlflowSink(tmp_path / "run", CONFIG).replay()
    monkeypatch.setattr(MlflowClient, "finalize_logged_model", finalize)
    for _ in range(2):
        MlflowSink(tmp_path / "run", CONFIG).replay()
    (model,) = connect().search_logged_models([connect().get_experiment_by_name("experiment").experiment_id])
    assert (model.name, str(model.status), model.tags["path"]) == ("checkpoint-step-7", "READY", "checkpoint_001.pth")
    assert [(metric.key, metric.value, metric.step) for metric in model.metrics] == [("checkpoint/loss", 0.5, 7)]


def test_a_log_that_became_shorter_and_grew_again_is_brought_there_whole(tmp_path: Path) -> None:
    """What was not on the disk when a machine crashed is gone from the log, but MLflow may have it."""
    log = begin(tmp_path / "run")
    log.write("metrics", step=1, metrics={"loss": 0.5})
    kept = log.path.stat().st_size
    for step in range(2, 40):
        log.write("metrics", step=step, metrics={"loss": 1.0 / step})
    log.close()
    MlflowSink(tmp_path / "run", CONFIG).replay()
    with log.path.open("r+b") as file:
        file.truncate(kept + 20)  # in the middle of a line
    again = MetricLog(log.path)
    again.write("start", stage="pretrain", name="a run", params={"pretrain.lr": 0.06}, tags={"slurm_job_id": "7"})
    again.write("resume", step=1)
    for step in range(2, 60):
        again.write("metrics", step=step, metrics={"loss": 1.0 / step, "knn_accuracy": step / 100})
    MlflowSink(tmp_path / "run", CONFIG).replay()
    assert only_run().info.status == "RUNNING" and only_run().data.tags["slurm_job_ids"] == "7"
    again.write("end", status="FAILED")
    again.close()
    for _ in range(2):
        MlflowSink(tmp_path / "run", CONFIG).replay()
    run = only_run()
    assert run.info.status == "FAILED"
    assert history(connect(), run.info.run_id, "loss") == [(1, 0.5)] + [(step, 1.0 / step) for step in range(2, 60)]
    assert history(connect(), run.info.run_id, "knn_accuracy") == [(step, step / 100) for step in range(2, 60)]


@pytest.mark.fault("store")
def test_a_file_that_the_store_refuses_delays_nothing_else_and_comes_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    log = begin(tmp_path / "run")
    for name in ("params.yaml", "confusion.png"):
        (tmp_path / "run" / name).write_text(name)
        log.write("artifact", path=name)
    log.write("metrics", step=1, metrics={"loss": 0.5})
    log.write("end", status="FINISHED")
    log.close()
    log_artifact, calls = MlflowClient.log_artifact, []

    def refuse(self: MlflowClient, *arguments: Any) -> None:
        calls.append(arguments)
        raise PermissionError("no rights on the bucket")

    monkeypatch.setattr(MlflowClient, "log_artifact", refuse)
    for _ in range(2):
        with pytest.raises(PermissionError):
            MlflowSink(tmp_path / "run", CONFIG).replay()
    assert [Path(path).name for _, path in calls] == ["params.yaml", "confusion.png"], "one try a replay, each in turn"
    run = only_run()
    assert run.info.status == "FINISHED" and history(connect(), run.info.run_id, "loss") == [(1, 0.5)]
    monkeypatch.setattr(MlflowClient, "log_artifact", log_artifact)
    MlflowSink(tmp_path / "run", CONFIG).replay()
    assert [file.path for file in connect().list_artifacts(run.info.run_id)] == ["confusion.png", "params.yaml"]


def test_a_pipeline_that_somebody_deleted_is_not_waited_for(tmp_path: Path) -> None:
    log = MetricLog(tmp_path / "run/metrics.jsonl")
    pipeline = {"key": "k", "name": "p", "params": {"pretrain.lr": 0.06}, "tags": {"data_digest": "d"}}
    log.write("start", stage="pretrain", name="a run", params={"pretrain.lr": 0.06}, tags={}, pipeline=pipeline)
    sink = MlflowSink(tmp_path / "run", CONFIG)
    sink.replay()
    experiment = connect().get_experiment_by_name("experiment").experiment_id
    (parent,) = connect().search_runs([experiment], "tags.stage = 'pipeline'")
    connect().delete_run(parent.info.run_id)
    log.write("metrics", step=1, metrics={"loss": 0.5})
    log.write("end", status="FINISHED")
    log.close()
    sink.replay()
    assert only_run().info.status == "FINISHED"


@pytest.mark.fault("store")
def test_an_upload_that_was_cut_off_leaves_no_second_model(
    moco: Moco, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    for stage in ("data", "pretrain", "train"):
        assert moco(stage).returncode == 0
    (folder,) = (project / "runs/train").iterdir()
    upload = MlflowClient.log_model_artifacts
    monkeypatch.setattr(MlflowClient, "log_model_artifacts", lambda *_: 1 / 0)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            MlflowSink(folder, CONFIG).replay()
    monkeypatch.setattr(MlflowClient, "log_model_artifacts", upload)
    MlflowSink(folder, CONFIG).replay()
    experiment = connect().get_experiment_by_name("experiment").experiment_id
    assert [str(model.status) for model in connect().search_logged_models([experiment])] == ["READY"]
    assert len(connect().search_model_versions("name = 'classifier'")) == 1


def test_a_store_that_the_environment_names_is_enough(
    moco: Moco, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """tracking.uri is empty, and the store lies in another folder than MLflow would look into by itself."""
    (project / "elsewhere").mkdir()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{project}/elsewhere/its.db")
    for stage in ("data", "pretrain", "train"):
        done = moco(stage)
        assert done.returncode == 0 and "warning" not in done.stderr, done.stderr
    assert "2 of 2 runs" in moco("sync").stdout
    assert not (project / "mlflow.db").exists()
