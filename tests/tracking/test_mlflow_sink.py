"""MLflow, on a real SQLite store, gets every number once and the classifier as a registered version."""

from __future__ import annotations

import json
import shutil
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from conftest import Moco, assert_one_line_error, write_params
from moco.config import TrackingConfig
from moco.tracking.metric_log import MetricLog, metric_history
from moco.tracking.mlflow_sink import MlflowSink
from moco.tracking.run import Run
from moco.tracking.store import store_uri

pytestmark = [
    pytest.mark.slow,  # creating an MLflow database takes seconds
    pytest.mark.filterwarnings("default"),  # MLflow and SQLAlchemy deprecate things among themselves
]

CONFIG = TrackingConfig("sqlite:///mlflow.db", False, "experiment", "classifier")


@pytest.fixture(autouse=True)
def no_server_from_outside(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)


def connect() -> Any:
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=store_uri(CONFIG))


def history(client: Any, run: str, metric: str) -> list[tuple[int, float]]:
    return sorted((point.step, point.value) for point in client.get_metric_history(run, metric))


def test_replays_are_idempotent_and_continue(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    log = MetricLog(folder / "metrics.jsonl")
    log.write("start", stage="pretrain", name="a run", params={"pretrain.lr": 0.06}, tags={"host": "here"})
    for step in range(1, 700):
        log.write("metrics", step=step, metrics={"loss": 1.0 / step})
    MlflowSink(folder, CONFIG).replay()
    MlflowSink(folder, CONFIG).replay()
    log.write("resume", step=650)
    for step in range(651, 701):
        log.write("metrics", step=step, metrics={"loss": 1.0 / step})
    log.write("end", status="FINISHED")
    log.close()
    MlflowSink(folder, CONFIG).replay()
    client = connect()
    (run,) = client.search_runs([client.get_experiment_by_name("experiment").experiment_id])
    assert history(client, run.info.run_id, "loss") == [(step, 1.0 / step) for step in range(1, 701)]
    assert run.data.params == {"pretrain.lr": "0.06"}
    assert run.data.tags["stage"] == "pretrain" and run.data.tags["host"] == "here"
    assert run.info.status == "FINISHED"


def begin(folder: Path) -> MetricLog:
    log = MetricLog(folder / "metrics.jsonl")
    log.write("start", stage="pretrain", name="a run", params={"pretrain.lr": 0.06}, tags={})
    return log


def only_run() -> Any:
    client = connect()
    (run,) = client.search_runs([client.get_experiment_by_name("experiment").experiment_id])
    return run


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


def test_late_delivery_registers_each_runs_own_weights_the_newest_last(moco: Moco, project: Path) -> None:
    for stage in ("data", "pretrain"):
        assert moco(stage).returncode == 0
    weights = []
    for lr in (0.1, 0.2, 0.3):
        write_params(project, train__lr=lr)
        assert moco("train").returncode == 0
        weights.append((project / "models/classifier/model_sub.pth").read_bytes())
        if lr == 0.2:  # that of a sweep's task
            (project / "sweeps/lr/1").mkdir(parents=True)
            shutil.move(project / "runs/train", project / "sweeps/lr/1/runs/train")
    write_params(project, tracking__uri="sqlite:///mlflow.db")
    assert moco("sync").returncode == 0
    client = connect()
    versions = sorted(client.search_model_versions("name='moco-classifier'"), key=lambda version: int(version.version))
    lr = [client.get_run(version.run_id).data.params["train.lr"] for version in versions]
    assert lr == ["0.1", "0.2", "0.3"]
    for version, expected in zip(versions, weights, strict=True):
        path = client.download_artifacts(version.run_id, "classifier/model_sub.pth", str(project))
        assert Path(path).read_bytes() == expected
    assert client.get_model_version_by_alias("moco-classifier", "candidate").version == versions[-1].version


def test_the_pipeline_is_tracked_from_end_to_end(moco: Moco, project: Path) -> None:
    write_params(project, tracking__uri="sqlite:///mlflow.db")
    for stage in ("data", "pretrain", "train", "eval"):
        assert moco(stage).returncode == 0
    client = connect()
    runs = client.search_runs([client.get_experiment_by_name("moco-pipeline").experiment_id])
    by_stage = {run.data.tags["stage"]: run for run in runs}
    assert set(by_stage) == {"pretrain", "train", "eval", "pipeline"}
    digest = json.loads((project / "models/manifest.json").read_text())["digest"]
    for run in runs:
        (used,) = run.inputs.dataset_inputs
        assert digest.startswith(used.dataset.digest) and digest in used.dataset.profile
    score = by_stage["eval"].data
    for name in ("data.source", "pretrain.temperature", "train.lr", "eval.batch_size"):
        assert name in score.params, "the whole chain of parameters stands beside the accuracy"
    assert {"val_accuracy", "knn_accuracy", "held_out_accuracy"} <= set(score.metrics)
    (log,) = (project / "runs/pretrain").glob("*/metrics.jsonl")
    ours = [(line["step"], line["metrics"]["loss"]) for line in metric_history(log) if "loss" in line["metrics"]]
    assert history(client, by_stage["pretrain"].info.run_id, "loss") == ours
    version = client.get_model_version_by_alias("moco-classifier", "candidate")
    assert version.run_id == by_stage["train"].info.run_id
    files = {file.path for file in client.list_artifacts(version.run_id, "classifier")}
    assert files == {"classifier/model_sub.pth", "classifier/submission.py"}
    assert any(file.path == "confusion.png" for file in client.list_artifacts(by_stage["eval"].info.run_id))


def test_a_dead_server_costs_a_warning_and_sync_brings_the_rest(moco: Moco, project: Path) -> None:
    write_params(project, tracking__uri="http://127.0.0.1:9")  # nobody listens on the discard port
    assert moco("data").returncode == 0
    done = moco("pretrain")
    assert done.returncode == 0, done.stderr
    assert "warning: MLflow at http://127.0.0.1:9" in done.stderr and "moco sync" in done.stderr
    assert_one_line_error(moco("sync"), "http://127.0.0.1:9 does not answer")
    write_params(project, tracking__uri="sqlite:///mlflow.db")
    for _ in range(2):
        assert moco("sync").returncode == 0
    client = connect()
    (run,) = client.search_runs(
        [client.get_experiment_by_name("moco-pipeline").experiment_id], "tags.stage = 'pretrain'"
    )
    assert [step for step, _ in history(client, run.info.run_id, "loss")] == list(range(1, 11))
    state = json.loads(next((project / "runs/pretrain").glob("*/mlflow.json")).read_text())
    assert state["run_id"] == run.info.run_id


def test_without_a_store_the_metric_log_is_enough(moco: Moco, project: Path) -> None:
    for stage in ("data", "pretrain"):
        assert moco(stage).returncode == 0
    assert not (project / "mlflow.db").exists()
    assert_one_line_error(moco("sync"), "tracking.uri is empty")


def test_a_run_that_was_stopped_before_it_began_goes_on(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt), Run(folder, "train", TrackingConfig("", False, "e", "m"), print):
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


def test_another_store_at_the_same_address_gets_everything(tmp_path: Path) -> None:
    log = begin(tmp_path / "run")
    log.write("metrics", step=1, metrics={"loss": 0.5})
    log.write("end", status="FINISHED")
    log.close()
    MlflowSink(tmp_path / "run", CONFIG).replay()
    with sqlite3.connect(tmp_path / "mlflow.db") as store:  # as if it were new
        for table in ("metrics", "latest_metrics", "params", "tags", "runs"):
            store.execute(f"DELETE FROM {table}")
    store.close()
    MlflowSink(tmp_path / "run", CONFIG).replay()
    assert history(connect(), only_run().info.run_id, "loss") == [(1, 0.5)]
    connect().delete_run(only_run().info.run_id)
    MlflowSink(tmp_path / "run", CONFIG).replay()
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
    assert len(calls) == 2, "one try a replay: each may take minutes to fail"
    run = only_run()
    assert run.info.status == "FINISHED" and history(connect(), run.info.run_id, "loss") == [(1, 0.5)]
    monkeypatch.setattr(MlflowClient, "log_artifact", log_artifact)
    MlflowSink(tmp_path / "run", CONFIG).replay()
    assert [file.path for file in connect().list_artifacts(run.info.run_id)] == ["confusion.png", "params.yaml"]


def test_a_pipeline_that_somebody_deleted_is_not_waited_for(tmp_path: Path) -> None:
    log = MetricLog(tmp_path / "run/metrics.jsonl")
    pipeline = {"key": "k", "name": "p", "params": {"pretrain.lr": 0.06}, "tags": {"data_digest": "d"}}
    log.write("start", stage="pretrain", name="a run", params={"pretrain.lr": 0.06}, tags={}, pipeline=pipeline)
    MlflowSink(tmp_path / "run", CONFIG).replay()
    experiment = connect().get_experiment_by_name("experiment").experiment_id
    (parent,) = connect().search_runs([experiment], "tags.stage = 'pipeline'")
    connect().delete_run(parent.info.run_id)
    log.write("metrics", step=1, metrics={"loss": 0.5})
    log.write("end", status="FINISHED")
    log.close()
    MlflowSink(tmp_path / "run", CONFIG).replay()
    assert only_run().info.status == "FINISHED"


def test_samples_of_the_machine_and_jobs_of_the_cluster_arrive(tmp_path: Path) -> None:
    log = MetricLog(tmp_path / "run/metrics.jsonl")
    for job in ("7", "7", "9"):  # put back into the queue, and submitted again
        log.write("start", stage="pretrain", name="a run", params={}, tags={"slurm_job_id": job})
        log.write("system", metrics={"system/cpu_utilization_percentage": 50.0})
    log.close()
    MlflowSink(tmp_path / "run", CONFIG).replay()
    assert only_run().data.tags["slurm_job_ids"] == "7 9"
    assert only_run().data.metrics["system/cpu_utilization_percentage"] == 50.0
