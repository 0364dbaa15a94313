"""A real `mlflow server` on a real PostgreSQL, and servers that fail: nothing is lost, doubled or delayed."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from conftest import Moco, assert_one_line_error, write_params
from moco.tracking import run as run_module
from moco.tracking.metric_log import metric_history
from server_helpers import MlflowServer, answering, history, postgres, runs

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("default"),  # MLflow and its libraries deprecate things among themselves
]


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MlflowServer]:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with postgres() as store:
        found = MlflowServer(store, tmp_path / "artifacts")
        try:
            yield found
        finally:
            found.kill()


def logged(project: Path, stage: str) -> list[dict[str, dict[str, float]]]:
    (log,) = (project / "runs" / stage).glob("*/metrics.jsonl")
    return metric_history(log)


@pytest.mark.fault("store")
@pytest.mark.long
def test_a_server_killed_in_the_midst_of_a_run_gets_every_step_once(
    moco: Moco, project: Path, server: MlflowServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_params(project, tracking__uri=server.uri, pretrain__epochs=300, monitor__every=100,
                 checkpoint__every=100)  # fmt: skip
    server.start()
    assert moco("data").returncode == 0
    training = subprocess.Popen(
        [sys.executable, "-m", "moco.cli", "pretrain"], cwd=project, stderr=subprocess.PIPE, text=True
    )
    client = server.client()
    deadline = time.monotonic() + 120
    while not (found := runs(client, "pretrain")) or "loss" not in found[0].data.metrics:
        assert time.monotonic() < deadline and training.poll() is None
        time.sleep(0.3)
    server.kill()
    assert training.poll() is None, "killed in the midst of it"
    _, said = training.communicate(timeout=240)
    assert training.returncode == 0, said
    assert f"warning: MLflow at {server.uri} does not have everything yet" in said
    write_params(project, tracking__uri=server.uri)
    for stage in ("train", "eval"):
        assert moco(stage).returncode == 0, "without its server a pipeline goes on"

    server.start()
    assert moco("sync").returncode == 0
    (run,) = runs(client, "pretrain")
    assert run.info.status == "FINISHED"
    expected = logged(project, "pretrain")
    for metric in ("loss", "images_per_second", "knn_accuracy"):
        ours = [(line["step"], line["metrics"][metric]) for line in expected if metric in line["metrics"]]
        assert len(ours) >= 3 and history(client, run, metric) == ours
    monkeypatch.setattr(run_module, "PATIENCE", 120.0)
    done = moco("baseline")
    assert done.returncode == 0 and "warning" not in done.stderr, "the server has all, and says so in its own words"
    assert [run.info.status for run in runs(client, "baseline")] == ["FINISHED"]
    before = [(r.info.run_id, r.info.end_time) for stage in ("pretrain", "train", "eval") for r in runs(client, stage)]
    versions = len(client.search_model_versions("name = 'moco-classifier'"))
    assert len(before) == 3 and versions == 1
    assert moco("sync").returncode == 0
    again = [(r.info.run_id, r.info.end_time) for stage in ("pretrain", "train", "eval") for r in runs(client, stage)]
    assert again == before and len(client.search_model_versions("name = 'moco-classifier'")) == versions
    for state in (project / "runs").glob("*/*/mlflow.json"):  # as on a machine that never saw them
        state.unlink()
    assert moco("sync").returncode == 0
    (run,) = runs(client, "pretrain")
    ours = [(line["step"], line["metrics"]["loss"]) for line in expected if "loss" in line["metrics"]]
    assert history(client, run, "loss") == ours
    assert len(client.search_model_versions("name = 'moco-classifier'")) == versions


@pytest.mark.fault("store")
@pytest.mark.parametrize(("status", "delay"), [(500, 0.0), pytest.param(200, 30.0, marks=pytest.mark.long)])
def test_a_server_that_fails_or_is_late_delays_nothing(
    moco: Moco, project: Path, monkeypatch: pytest.MonkeyPatch, status: int, delay: float
) -> None:
    monkeypatch.setattr(run_module, "PATIENCE", 6.0)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert moco("data").returncode == 0
    assert moco("pretrain").returncode == 0
    with answering(status, delay) as uri:
        write_params(project, tracking__uri=uri, pretrain__seed=1)
        began = time.monotonic()
        done = moco("pretrain")
        assert done.returncode == 0 and time.monotonic() - began < 6 + 15
        assert "does not have everything yet" in done.stderr
    write_params(project, tracking__uri="sqlite:///mlflow.db")
    assert moco("sync").returncode == 0
    from mlflow import MlflowClient

    found = runs(MlflowClient(tracking_uri=f"sqlite:///{project}/mlflow.db"), "pretrain")
    assert [run.info.status for run in found] == ["FINISHED", "FINISHED"]


def test_what_a_server_refuses_is_one_line(moco: Moco, project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for stage in ("data", "pretrain"):
        assert moco(stage).returncode == 0
    for status, words in ((401, "MLFLOW_TRACKING_USERNAME"), (403, "does not permit"), (404, "no MLflow server")):
        with answering(status) as uri:
            secret = uri.replace("//", "//user:secret@")
            write_params(project, tracking__uri=secret)
            done = moco("sync")
            assert_one_line_error(done, words, uri)
            assert "secret" not in done.stderr + done.stdout
            assert_one_line_error(moco("origin"), words)
    for uri in ("http://127.0.0.1:9", "http://no-such-host.invalid:5000"):
        write_params(project, tracking__uri=uri)
        began = time.monotonic()
        assert_one_line_error(moco("sync"), f"{uri} does not answer")
        assert time.monotonic() - began < 30, "and not after minutes"
