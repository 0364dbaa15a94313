"""The table at the end: this pipeline beside what the labels give without it."""

from __future__ import annotations

import json
from typing import Any

from rich.console import Console
from rich.table import Table

from moco.data.manifest import load_manifest
from moco.errors import UserError
from moco.stages.workspace import MANIFEST, REPORTS


def _read(stage: str) -> dict[str, Any]:
    path = REPORTS / stage / "metrics.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def run(console: Console) -> None:
    """Prints the table. Raises UserError where no stage has left results yet."""
    baseline, pretrain, train, score = (_read(s) for s in ("baseline", "pretrain", "train", "eval"))
    extra, finetune = _read("train_extra"), _read("finetune")
    score = score or train  # which measure the same, one of them by the files that are handed in
    if not (baseline or score or extra or finetune):
        raise UserError(f"{REPORTS}: no results yet; run `dvc repro` first")
    table = Table(title="Accuracy on val")
    table.add_column("features and training")
    for name in ("top-1", "kNN", "training", "images seen"):
        table.add_column(name, justify="right")

    def percent(source: dict[str, Any], name: str) -> str:
        return f"{source[name]:.1%}" if name in source else "-"

    def effort(source: dict[str, Any], prefix: str) -> tuple[str, str]:
        if f"{prefix}minutes" not in source:
            return "-", "-"
        return f"{source[prefix + 'minutes']:.1f} min", f"{source[prefix + 'images_seen']:,.0f}"

    if baseline:
        table.add_row(
            "random weights, linear classifier",
            percent(baseline, "random_val_accuracy"), percent(baseline, "random_val_knn_accuracy"), "-", "-",
        )  # fmt: skip
        table.add_row(
            "supervised on the labels alone",
            percent(baseline, "supervised_val_accuracy"), "-", *effort(baseline, "supervised_"),
        )  # fmt: skip
    if score:
        table.add_row(
            "this pipeline: pretrained, linear classifier",
            percent(score, "val_accuracy"), percent(train, "val_knn_accuracy"), *effort(pretrain, ""),
            style="bold",
        )  # fmt: skip
    if extra.get("extra_labels"):
        gain = f" ({extra['val_accuracy'] - score['val_accuracy']:+.1%})" if score else ""
        table.add_row(
            f"the same with {extra['extra_labels']:,.0f} extra labels{gain}",
            percent(extra, "val_accuracy"), percent(extra, "val_knn_accuracy"), "-", "-",
        )  # fmt: skip
    if finetune:
        more = f", with {finetune['extra_labels']:,.0f} extra labels" if finetune.get("extra_labels") else ""
        table.add_row(
            f"pretrained, all weights fine-tuned{more}", percent(finetune, "val_accuracy"), "-", *effort(finetune, "")
        )  # fmt: skip
    console.print(table)
    if MANIFEST.is_file():
        for note in load_manifest(MANIFEST).notes():
            console.print(f"Note: {note}.", markup=False)
    console.print("Compare runs in the MLflow UI: moco ui, then open the address that it prints.")
