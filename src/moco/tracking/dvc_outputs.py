"""DVC's metrics and plots, written from the metric log."""

from __future__ import annotations

import json
from pathlib import Path

from moco.csv_files import csv_text
from moco.files import write_text
from moco.tracking.metric_log import metric_history


def write_curve(log: Path, path: Path, metric: str, joined: bool = False) -> Path:
    """Write a CSV file with a row per step at which `metric` was measured and a column per metric measured with it.

    joined: include the metrics that other lines of the log have for the same steps.
    """
    rows: dict[int, dict[str, float]] = {}
    history = metric_history(log)
    measured = {line["step"] for line in history if metric in line["metrics"]}
    for line in history:
        if metric in line["metrics"] or (joined and line["step"] in measured):
            rows.setdefault(line["step"], {}).update(line["metrics"])
    columns = sorted({name for row in rows.values() for name in row})
    table = [[step, *(row.get(name) for name in columns)] for step, row in sorted(rows.items())]
    write_text(path, csv_text([["step", *columns], *table]))
    return path


def write_metrics(log: Path, path: Path, extra: dict[str, float]) -> Path:
    """Write a JSON file with the last value of every metric, and `extra`, without what describes a window of steps."""
    last: dict[str, float] = {}
    for line in metric_history(log):
        last.update(line["metrics"])
    last.pop("data_wait_share", None)
    write_text(path, json.dumps({**last, **extra}, indent=2, sort_keys=True) + "\n")
    return path
