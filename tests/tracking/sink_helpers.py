"""A SQLite store in the current folder, logs, and what MLflow has of them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from moco.settings.tracking import TrackingConfig
from moco.tracking.metric_log import MetricLog
from moco.tracking.store import create, store_uri

CONFIG = TrackingConfig(uri="sqlite:///mlflow.db", experiment="experiment", registered_model="classifier")


@pytest.fixture(autouse=True)
def no_server_from_outside(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)


def connect() -> Any:
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=store_uri(CONFIG))


def history(client: Any, run: str, metric: str) -> list[tuple[int, float]]:
    return sorted((point.step, point.value) for point in client.get_metric_history(run, metric))


def begin(folder: Path) -> MetricLog:
    log = MetricLog(folder / "metrics.jsonl")
    log.write("start", stage="pretrain", name="a run", params={"pretrain.lr": 0.06}, tags={})
    return log


def only_run() -> Any:
    client = connect()
    (run,) = client.search_runs([client.get_experiment_by_name("experiment").experiment_id])
    return run


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty SQLite store of MLflow's, to be copied: its tables take seconds to make."""
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    create(f"sqlite:///{path}")
    return path


@pytest.fixture
def store(empty_store: Path, tmp_path: Path) -> Path:
    """A SQLite store in the test's folder."""
    return Path(shutil.copy(empty_store, tmp_path / "mlflow.db"))
