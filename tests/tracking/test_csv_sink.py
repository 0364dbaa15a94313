"""The table of a run's metrics, through the same seam as MLflow."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from conftest import Moco, write_params
from moco.settings.tracking import TrackingConfig
from moco.tracking.csv_sink import CsvSink
from moco.tracking.metric_log import MetricLog, metric_history
from moco.tracking.sinks import sinks


def table(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_run_leaves_its_table(moco: Moco, project: Path) -> None:
    write_params(project, tracking__sinks=["csv"])
    assert moco("data").returncode == 0 and moco("pretrain").returncode == 0
    (run,) = (project / "runs/pretrain").iterdir()
    logged = {(line["step"], name): value for line in metric_history(run / "metrics.jsonl")
              for name, value in line["metrics"].items()}  # fmt: skip
    found = {(int(row["step"]), name): float(value) for row in table(run)
             for name, value in row.items() if name != "step" and value}  # fmt: skip
    assert found == pytest.approx(logged) and len(found) > 10


def test_rows_that_a_resumed_run_makes_again_stand_there_once(tmp_path: Path) -> None:
    log = MetricLog(tmp_path / "metrics.jsonl")
    log.write("start", stage="pretrain", name="a run", params={}, tags={})
    for step in (1, 2, 3):
        log.write("metrics", step=step, metrics={"loss": 1.0})
    log.write("resume", step=1)
    log.write("metrics", step=2, metrics={"loss": 0.5, "=lr": 0.1})
    log.close()
    for _ in range(2):
        CsvSink(tmp_path).replay()
    assert [(row["step"], row["loss"]) for row in table(tmp_path)] == [("1", "1.0"), ("2", "0.5")]
    assert "'=lr" in table(tmp_path)[0], "a name that a spreadsheet would take for a formula"


@pytest.mark.parametrize(
    ("names", "uri", "kinds"),
    [(("mlflow", "csv"), "sqlite:///mlflow.db", ["MlflowSink", "CsvSink"]), (("csv",), "sqlite:///m.db", ["CsvSink"]),
     (("mlflow",), "", []), ((), "sqlite:///mlflow.db", [])],
)  # fmt: skip
def test_a_run_has_the_sinks_that_are_set(tmp_path: Path, names: tuple[str, ...], uri: str, kinds: list[str]) -> None:
    config = TrackingConfig(uri=uri, sinks=names)  # type: ignore[arg-type]
    assert [type(sink).__name__ for sink in sinks(tmp_path, config)] == kinds
