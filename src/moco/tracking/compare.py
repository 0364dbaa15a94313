"""A table of the pipelines that ran here: what differs between them first, then what came out. From the metric logs,
so that it needs no server."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from moco.errors import UserError
from moco.params import nearest
from moco.tracking.metric_log import last_values, read_events
from moco.tracking.pipeline_run import of_pipeline
from moco.tracking.sync import logs_of

# Shown where they were measured and nothing else is asked for.
USUAL = (
    "pretrain.knn_accuracy", "train.best_held_out_accuracy", "train.val_accuracy", "finetune.best_held_out_accuracy",
    "finetune.val_accuracy", "eval.val_accuracy",
)  # fmt: skip


@dataclass
class Pipeline:
    """One row. params: by dotted name; digest: of its data; metrics: last values, by STAGE.METRIC; status: of the run
    that began last."""

    name: str
    params: dict[str, Any]
    digest: str
    metrics: dict[str, float] = field(default_factory=dict)
    status: str = ""


def collect(project: Path) -> list[Pipeline]:
    """Of every pipeline with a run in the project or its sweeps, in the order in which they began. A stage's result is
    that of every pipeline that has its settings and data, also where it ran once for several; the newest run counts."""
    found: dict[str, Pipeline] = {}
    results = []
    for log in logs_of(project):
        events = list(read_events(log))
        start = next((event for event in events if event["event"] == "start"), None)
        if start is None or "pipeline" not in start:  # by an earlier version
            continue
        known, digest = start["pipeline"], start["dataset"]["digest"]
        if not of_pipeline(start["params"], known["params"]):  # the classifier is of other settings, or from elsewhere
            continue
        row = found.setdefault(known["key"], Pipeline(known["name"], known["params"], digest))
        row.status = next((e.get("status", "RUNNING") for e in reversed(events) if e["event"] in ("start", "end")), "")
        metrics = {f"{start['stage']}.{name}": value for name, value in last_values(log).items()}
        results.append((start["params"], digest, metrics))
    for row in found.values():
        for params, digest, metrics in results:
            if digest == row.digest and of_pipeline(params, row.params):
                row.metrics |= metrics
    return list(found.values())


def show(project: Path, console: Console, params: list[str], metrics: list[str], sort: str | None) -> None:
    """Prints the table. Raises UserError where nothing ran, and for a name that no pipeline has."""
    rows = collect(project)
    if not rows:
        raise UserError("no pipeline ran here yet; `dvc repro` runs one")
    known_params = {name for row in rows for name in row.params}
    known_metrics = {name for row in rows for name in row.metrics}
    _check("--param", params, known_params)
    _check("--metric", metrics, known_metrics)
    _check("--sort", [sort] if sort else [], known_metrics)
    differing = [name for name in sorted(known_params) if len({str(row.params.get(name)) for row in rows}) > 1]
    chosen = metrics or [name for name in USUAL if name in known_metrics]
    columns = [*differing, *(name for name in params if name not in differing)]
    if sort:
        rows.sort(key=lambda row: -row.metrics.get(sort, float("-inf")))
    table = Table(title=f"{len(rows)} pipelines" if len(rows) > 1 else None)
    table.add_column("pipeline", no_wrap=True)
    for name in [*columns, *chosen]:
        table.add_column(_header(name), justify="right", overflow="fold", min_width=6)  # a cut name is none
    for row in rows:
        cells = [str(row.params.get(name, "")) for name in columns]
        cells += [_number(row.metrics.get(name)) for name in chosen]
        table.add_row(row.name if row.status == "FINISHED" else f"{row.name} ({row.status.lower()})", *cells)
    console.print(table)


def _header(name: str) -> str:
    """In lines of some 12 letters, broken where the name has its joints."""
    lines = [""]
    for part in re.findall(r"[^._]+[._]?", name):
        if lines[-1] and len(lines[-1]) + len(part) > 12:
            lines.append("")
        lines[-1] += part
    return "\n".join(lines)


def _check(option: str, names: list[str], known: set[str]) -> None:
    for name in names:
        if name not in known:
            raise UserError(f"{option} {name}: no pipeline here has it{nearest(name, known)}")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
