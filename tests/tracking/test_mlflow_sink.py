"""MLflow, on a real SQLite store, gets every number once and the classifier as a registered version."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from sink_helpers import CONFIG, begin, connect, history, no_server_from_outside, only_run  # noqa: F401

from conftest import Moco, assert_one_line_error, write_params
from moco.tracking.metric_log import MetricLog, metric_history
from moco.tracking.mlflow_sink import MlflowSink

pytestmark = [
    pytest.mark.slow,  # creating an MLflow database takes seconds
    pytest.mark.filterwarnings("default"),  # MLflow and SQLAlchemy deprecate things among themselves
]


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


@pytest.mark.fault("other-code")
def test_a_run_that_other_code_went_on_with_names_both_commits(tmp_path: Path) -> None:
    log = MetricLog(tmp_path / "run/metrics.jsonl")
    for commit, dirty in (("c1", "false"), ("c1", "false"), ("c2", "true")):
        log.write("start", stage="pretrain", name="a run", params={}, tags={"git_commit": commit, "git_dirty": dirty})
    log.close()
    MlflowSink(tmp_path / "run", CONFIG).replay()
    assert only_run().data.tags["git_commits"] == "c1 c2-dirty" and only_run().data.tags["git_commit"] == "c1"


def test_samples_of_the_machine_and_jobs_of_the_cluster_arrive(tmp_path: Path) -> None:
    log = MetricLog(tmp_path / "run/metrics.jsonl")
    for job in ("7", "7", "9"):  # put back into the queue, and submitted again
        log.write("start", stage="pretrain", name="a run", params={}, tags={"slurm_job_id": job})
        log.write("system", metrics={"system/cpu_utilization_percentage": 50.0})
    log.close()
    MlflowSink(tmp_path / "run", CONFIG).replay()
    assert only_run().data.tags["slurm_job_ids"] == "7 9"
    assert only_run().data.metrics["system/cpu_utilization_percentage"] == 50.0
