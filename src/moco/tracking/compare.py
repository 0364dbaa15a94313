"""A table of the pipelines that ran here: what differs between them first, then what came out. From the metric logs,
so that it needs no server."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from moco.errors import NAMED, UserError
from moco.settings.reading import nearest
from moco.tracking.metric_log import last_values, read_events
from moco.tracking.pipeline_run import of_pipeline
from moco.tracking.sync import logs_of
from moco.training.significance import wilson

HELD_OUT = re.compile(r"held_out_accuracy$|\.knn_accuracy$")
PROVENANCE = "artifacts/provenance.json"  # beside the log: what the run was made from (moco.tracking.digests)

# Shown where they were measured and nothing else is asked for.
USUAL = (
    "pretrain.knn_accuracy", "train.best_held_out_accuracy", "train.val_accuracy", "finetune.best_held_out_accuracy",
    "finetune.val_accuracy", "eval.val_accuracy",
)  # fmt: skip


@dataclass
class Pipeline:
    """One row. params: by dotted name; digest: of its data; metrics: last values, by STAGE.METRIC; status: of the run
    that began last. images: number that an accuracy is of, by the same names; left_out: stages with runs that are not
    of the same encoder or classifier as the others."""

    name: str
    params: dict[str, Any]
    digest: str
    metrics: dict[str, float] = field(default_factory=dict)
    status: str = ""
    images: dict[str, int] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Result:
    """Of one run. params: of its chain. made: its digests, {} where an earlier version did not keep them."""

    stage: str
    params: dict[str, Any]
    digest: str
    metrics: dict[str, float]
    made: dict[str, Any]

    def fits(self, train: Result | None) -> bool:
        """Return whether it is of the same encoder and classifier as a run of `train`.

        Where it scored a classifier, the classifier must have the same weights. The answer is True where either did not
        keep its digests.
        """
        if train is None or not train.made or not self.made:
            return True
        if self.stage == "eval":
            return bool(self.made.get("weights") == train.made.get("weights"))
        return "encoder" not in self.made or bool(self.made["encoder"] == train.made.get("encoder"))


def collect(project: Path, problems: list[str] | None = None) -> list[Pipeline]:
    """Return every pipeline with a run in the project or its sweeps, in the order in which they began.

    A stage's result belongs to every pipeline that has its settings and data, also where it ran once for several. The
    newest classifier counts, and of the other stages the newest run that is of its encoder and weights: a row mixes no
    two chains.

    problems: takes a line for each log, and one for all folders, that could not be read and are left out.
    """
    problems = [] if problems is None else problems
    logs = logs_of(project)
    problems += [told] if (told := logs.describe()) else []
    found: dict[str, Pipeline] = {}
    results = []
    for log in logs.logs:
        try:
            events = list(read_events(log))
            metrics = last_values(log)
        except (UserError, OSError) as error:
            problems.append(f"left out: {error}")
            continue
        start = next((event for event in events if event["event"] == "start"), None)
        if start is None or "pipeline" not in start:  # by an earlier version
            continue
        known, digest = start["pipeline"], start["dataset"]["digest"]
        if not of_pipeline(start["params"], known["params"]):  # the classifier is of other settings, or from elsewhere
            continue
        row = found.setdefault(known["key"], Pipeline(known["name"], known["params"], digest))
        row.status = next((e.get("status", "RUNNING") for e in reversed(events) if e["event"] in ("start", "end")), "")
        results.append(Result(start["stage"], start["params"], digest, metrics, _made(log)))
    for row in found.values():
        _fill(row, [each for each in results if each.digest == row.digest and of_pipeline(each.params, row.params)])
    return list(found.values())


def _fill(row: Pipeline, results: list[Result]) -> None:
    """Fill the row with the results of its stages. results: in the order in which they began."""
    trained = [each for each in results if each.stage == "train"]
    train = max(trained, key=lambda each: (bool(each.made), results.index(each)), default=None)
    for stage in dict.fromkeys(each.stage for each in results):
        fitting = [each for each in results if each.stage == stage and each.fits(train)]
        if not fitting:
            row.left_out.append(stage)
            continue
        known = [each for each in fitting if each.made]
        fitting = [train] if stage == "train" and train else known or fitting
        chosen = fitting[-1]
        row.metrics |= {f"{stage}.{name}": value for name, value in chosen.metrics.items()}
        counts = {name: int(text.partition(":")[0]) for name, text in chosen.made.get("correct", {}).items()}
        row.images |= {f"{stage}.{name}": count for name, count in (chosen.made.get("images", {}) | counts).items()}


def _made(log: Path) -> dict[str, Any]:
    try:
        found = json.loads((log.parent / PROVENANCE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def show(project: Path, console: Console, params: list[str], metrics: list[str], sort: str | None) -> None:
    """Print the table. Raises UserError where nothing ran, and for a name that no pipeline has."""
    problems: list[str] = []
    rows = collect(project, problems)
    if not rows and problems:
        raise UserError(problems[0], "E-COMPARE-UNREADABLE")
    if not rows:
        raise UserError("no pipeline ran here yet; `dvc repro` runs one", "E-COMPARE-EMPTY")
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
        cells += [_number(row.metrics.get(name), row.images.get(name)) for name in chosen]
        table.add_row(row.name if row.status == "FINISHED" else f"{row.name} ({row.status.lower()})", *cells)
    console.print(table)
    if any(row.images.get(name) for row in rows for name in chosen):
        console.print("±: 95 % interval (Wilson, the longer side) for the number of images that an accuracy is of.")
    for row in rows:
        for line in _seen_by_pretraining(row, chosen):
            console.print(line, markup=False, highlight=False)
        for stage in row.left_out:
            console.print(f"{row.name}: {stage} is of another encoder or classifier than train, and left out.")
    for problem in problems[:NAMED]:
        console.print(f"note: {problem}", markup=False, highlight=False, soft_wrap=True)
    if len(problems) > NAMED:
        console.print(f"note: and {len(problems) - NAMED} more that could not be read")


def _seen_by_pretraining(row: Pipeline, chosen: list[str]) -> Iterator[str]:
    """Yield a line where accuracies are of held-out images of which some stand in the pool, with the stages."""
    stages = dict.fromkeys(name.split(".")[0] for name in chosen if name in row.metrics and HELD_OUT.search(name))
    counts = {stage: row.metrics.get(f"{stage}.held_out_in_pool", 0) for stage in stages}
    if any(counts.values()):
        numbers = ", ".join(f"{count:,.0f} of {stage}" for stage, count in counts.items() if count)
        yield f"{row.name}: held-out images also stand in the pool, so pretraining sees them: {numbers}"


def _header(name: str) -> str:
    """Return the name in lines of about 12 letters, broken at its dots and underscores."""
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


def _number(value: float | None, images: int | None = None) -> str:
    """Return the value. An accuracy whose images were counted has its 95 % interval below."""
    if value is None or not images:
        return "" if value is None else f"{value:.4g}"
    low, high = wilson(round(value * images), images)
    return f"{value:.4g}\n±{max(high - value, value - low):.2g}"
