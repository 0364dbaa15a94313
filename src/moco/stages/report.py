"""The table at the end: this pipeline beside what the labels give without it.

Every row follows the digests of what it was made from (moco.tracking.digests). One that is not of the data, encoder or
classifier in models/ says so below the table; a difference says whether it is more than chance.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from moco.data.manifest import load_manifest
from moco.errors import UserError, first_of
from moco.files import sha256
from moco.layout import CLASSIFIER, CLASSIFIER_EXTRA, ENCODER, FINETUNED, MANIFEST, REPORTS
from moco.tracking.digests import NAME, read_json
from moco.training.significance import discordant, mcnemar, percent, unpack, wilson

WIDTH = 130  # columns of what is not a terminal
CHANCE = 0.05  # p from which on a difference may be chance
FOLDERS = {"train": CLASSIFIER, "eval": CLASSIFIER, "train_extra": CLASSIFIER_EXTRA, "finetune": FINETUNED}


@dataclass(frozen=True)
class Results:
    """What a stage has left in reports/STAGE. problems: a line for each file that is there and cannot be used."""

    stage: str
    metrics: dict[str, Any]
    provenance: dict[str, Any]
    problems: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.metrics)

    @property
    def weights(self) -> str | None:
        """Return the sha256 of the classifier's model_sub.pth."""
        return self.provenance.get("weights")

    @property
    def encoder(self) -> str | None:
        """Return the sha256 of the encoder that the classifier was made from."""
        return self.provenance.get("encoder")

    def correct(self, metric: str) -> np.ndarray | None:
        """Return which images an accuracy counts as right, N booleans; None where that was not recorded."""
        try:
            return unpack(self.provenance["correct"][metric])
        except (KeyError, TypeError, ValueError, AttributeError):
            return None


@dataclass
class Row:
    """accuracy: name of a metric; knn: the stage that measured it and the name; effort: minutes and images, '-' where
    there are none."""

    label: str
    results: Results
    accuracy: str = "val_accuracy"
    knn: tuple[Results, str] | None = None
    effort: tuple[str, str] = ("-", "-")
    notes: list[str] = field(default_factory=list)
    bold: bool = False


def run(console: Console) -> None:
    """Print the table. Raises UserError where no stage has left results yet."""
    if not console.is_terminal:
        console.width = max(console.width, WIDTH)
    found = {stage: _read(stage) for stage in ("baseline", "pretrain", "train", "eval", "train_extra", "finetune")}
    pipeline = _pipeline(found)
    rows = [*_baseline(found, pipeline), *([pipeline] if pipeline else []), *_extra(found, pipeline)]
    rows += _finetuned(found, pipeline)
    problems = [problem for results in found.values() for problem in results.problems]
    if not rows and problems:
        raise UserError(f"{first_of(problems, 200)}; run the stages again", "E-REPORT-UNREADABLE")
    if not rows:
        raise UserError(f"{REPORTS}: no results yet; run `dvc repro` first")
    _print(console, rows, pipeline)
    for problem in problems:
        console.print(f"Note: {problem}; running the stage again writes it.", markup=False, highlight=False)
    manifest = load_manifest(MANIFEST) if MANIFEST.is_file() else None
    counts = {stage: found[stage].metrics.get("held_out_in_pool", 0) for stage in ("pretrain", "train", "finetune")}
    if any(counts.values()) and not (manifest and manifest.pool_is_train()):
        numbers = ", ".join(f"{count:,.0f} of {stage}" for stage, count in counts.items() if count)
        console.print(f"Note: held-out images also stand in the pool, so pretraining sees them: {numbers}.")
    for note in manifest.notes() if manifest else []:
        console.print(f"Note: {note}.", markup=False)
    console.print("Compare runs in the MLflow UI: moco ui, then open the address that it prints.")


def _read(stage: str) -> Results:
    folder, problems = REPORTS / stage, list[str]()
    metrics = _content(folder / "metrics.json", _are_numbers, problems)
    return Results(stage, metrics, _content(folder / NAME, _is_provenance, problems), problems)


def _content(path: Path, sound: Callable[[Any], bool], problems: list[str]) -> dict[str, Any]:
    """Return what a file of reports holds; {} where it is not there, or no use, which goes to `problems`."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if sound(found):
            return dict(found)
        problems.append(f"{path} is damaged")
    except FileNotFoundError:
        pass
    except OSError as error:
        problems.append(f"{path} cannot be read: {error.strerror}")
    except (ValueError, RecursionError):  # the second: brackets without end
        problems.append(f"{path} is damaged")
    return {}


def _are_numbers(found: Any) -> bool:
    return isinstance(found, dict) and all(isinstance(value, int | float) for value in found.values())


def _is_provenance(found: Any) -> bool:
    return (
        isinstance(found, dict)
        and isinstance(found.get("data"), str)
        and all(isinstance(found.get(name, ""), str) for name in ("encoder", "weights", "start", "trained_on"))
        and _are_numbers(found.get("pretraining", {}))
    )


def _digest(path: Path) -> str | None:
    """Return the file's sha256.

    It is None where the file is not there, as in a clone without the models, or cannot be read.
    """
    try:
        return sha256(path) if path.is_file() else None
    except OSError:
        return None


def _broken(results: Results) -> list[str]:
    """Return what of a stage's results does not belong to the files in models/."""
    if results.problems:
        return [f"{results.problems[0]}: what it was made from is not known"]
    if not results.provenance:
        return ["of an earlier version of this program: what it was made from is not known"]
    notes = []
    data = read_json(MANIFEST).get("digest")
    if data and data != results.provenance.get("data"):
        notes.append(f"measured on other data than {MANIFEST} describes")
    if (trained := results.provenance.get("trained_on")) and trained != results.provenance.get("data"):
        seen = results.provenance.get("learned_in_val")
        few = "may have learned from images of this val" if seen is None else f"learned from {seen} images of this val"
        notes.append(f"trained on other data than it is scored on; it {few}")
    if results.stage in FOLDERS:
        path = FOLDERS[results.stage] / "model_sub.pth"
        if (weights := _digest(path)) and weights != results.weights:
            notes.append(f"of another classifier than {path}")
        if results.encoder and (encoder := _digest(ENCODER)) and encoder != results.encoder:
            notes.append(f"made from another encoder than {ENCODER}")
    return notes


def _pipeline(found: dict[str, Results]) -> Row | None:
    """Return the row of models/classifier: by `eval`, which scores the files that are handed in, where that is of this
    classifier, else by `train`, which measured the same."""
    train, score = found["train"], found["eval"]
    if not train and not score:
        return None
    wanted = _digest(CLASSIFIER / "model_sub.pth") or train.weights or score.weights
    chosen = score if score and (not train or score.weights == wanted) else train
    row = Row("pretrained, linear classifier", chosen, bold=True, notes=_broken(chosen))
    if score and chosen is train:
        row.notes.append(
            "reports/eval is of another classifier: the accuracy is that of `train`; `moco eval` scores it"
        )
    if train and train.weights == chosen.weights:
        row.knn = (train, "val_knn_accuracy")
        row.effort = _effort(_pretraining(train))
    if row.effort[0] == "-":
        row.notes.append("what its pretraining took is not known")
    return row


def _other_settings(one: Results, other: Results) -> bool:
    """Return whether both know the settings of their linear classifiers, and these differ."""
    settings = [each.provenance.get("train_settings") for each in (one, other)]
    return None not in settings and settings[0] != settings[1]


def _pretraining(results: Results) -> dict[str, Any]:
    return dict(results.provenance.get("pretraining", {}))


def _baseline(found: dict[str, Results], pipeline: Row | None) -> list[Row]:
    baseline = found["baseline"]
    if not baseline:
        return []
    notes = _broken(baseline)
    network, train = baseline.provenance.get("architecture"), found["train"]
    if pipeline and train.weights == pipeline.results.weights and network != train.provenance.get("architecture"):
        notes.append("of another network than the classifier")
    if _other_settings(baseline, train):
        notes.append("its linear classifier has other settings of section train")
    random, supervised = "random_val_accuracy", "supervised_val_accuracy"
    knn, effort = (baseline, "random_val_knn_accuracy"), _effort(baseline.metrics, "supervised_")
    return [
        Row("random weights, linear classifier", baseline, random, knn, notes=notes),
        Row("supervised on the labels alone", baseline, supervised, effort=effort, notes=notes),
    ]


def _extra(found: dict[str, Results], pipeline: Row | None) -> list[Row]:
    extra = found["train_extra"]
    if not extra.metrics.get("extra_labels"):
        return []
    notes = _broken(extra)
    if pipeline and pipeline.results.encoder != extra.encoder:
        notes.append("from another encoder than the row above: the difference is not that of the labels")
    if pipeline and _other_settings(extra, found["train"]):
        notes.append("with other settings of section train than the row above, so that it is not the labels' gain")
    label = f"the same with {extra.metrics['extra_labels']:,.0f} extra labels"
    return [Row(label, extra, knn=(extra, "val_knn_accuracy"), notes=notes)]


def _finetuned(found: dict[str, Results], pipeline: Row | None) -> list[Row]:
    """Return the row of the fine-tuned classifier.

    Its minutes and images are added to those of the pretraining that it needs.
    """
    tuned = found["finetune"]
    if not tuned:
        return []
    notes = _broken(tuned)
    starts = {tuned.encoder, pipeline.results.weights if pipeline else None, found["train_extra"].weights}
    if tuned.provenance.get("start") not in starts and tuned.provenance:
        notes.append(f"fine-tuned from another classifier than {CLASSIFIER}")
    count = tuned.metrics.get("extra_labels")
    label = "pretrained, all weights fine-tuned" + (f", with {count:,.0f} extra labels" if count else "")
    before, own = _effort(_pretraining(tuned)), _effort(tuned.metrics)
    effort = (f"{before[0].removesuffix(' min')} + {own[0]}", f"{before[1]} + {own[1]}")
    if before[0] == "-":
        effort = own
        notes.append("without its pretraining, of which it is not known what it took")
    return [Row(label, tuned, effort=effort, notes=notes)]


def _effort(source: dict[str, Any], prefix: str = "") -> tuple[str, str]:
    if f"{prefix}minutes" not in source or f"{prefix}images_seen" not in source:
        return "-", "-"
    return f"{source[prefix + 'minutes']:.1f} min", f"{source[prefix + 'images_seen']:,.0f}"


def _print(console: Console, rows: list[Row], pipeline: Row | None) -> None:
    right = [row.results.correct(row.accuracy) for row in rows]
    counts = {len(correct) for correct in right if correct is not None}
    same = f", {counts.pop():,} images" if len(counts) == 1 else ""
    table = Table(
        title=f"Accuracy on val{same}, with 95 % intervals; differences to the bold row", title_justify="left"
    )
    table.add_column("features and training", min_width=34)
    for name in ("top-1", "difference", "kNN", "training", "images seen"):
        table.add_column(name, justify="right")
    notes: list[str] = []
    for row in rows:
        notes += [note for note in row.notes if note not in notes]
        marks = "".join(f" ({notes.index(note) + 1})" for note in row.notes)
        cells = [_share(row.results, row.accuracy, not same), _difference(row, pipeline)]
        cells += [_share(*row.knn, not same) if row.knn else "-", *row.effort]
        table.add_row(row.label + marks, *cells, style="bold" if row.bold else None)
    console.print(table)
    for number, note in enumerate(notes, 1):
        console.print(f"({number}) {note}", highlight=False)


def _share(results: Results, metric: str, counted: bool) -> str:
    """Return '55.4 %' and below it its interval and, where rows differ in it, the number of images."""
    correct = results.correct(metric)
    if correct is None or not len(correct):
        return percent(results.metrics[metric]) if metric in results.metrics else "-"
    low, high = wilson(int(correct.sum()), len(correct))
    count = f" of {len(correct):,}" if counted else ""
    return f"{percent(correct.mean())}{count}\n{100 * low:.1f} to {100 * high:.1f}"


def _difference(row: Row, pipeline: Row | None) -> str:
    """Return '+1.2 points' and below it whether that is more than chance.

    McNemar's exact test on the same images decides.
    """
    if pipeline is None or row is pipeline:
        return "-"
    ours, theirs = row.results.correct(row.accuracy), pipeline.results.correct(pipeline.accuracy)
    if (
        ours is None
        or theirs is None
        or len(ours) != len(theirs)
        or row.results.provenance["data"] != pipeline.results.provenance["data"]
    ):
        return "not comparable"
    chance = mcnemar(*discordant(ours, theirs))
    words = "p < 0.001" if chance < 0.001 else f"p = {chance:.2g}"
    return f"{100 * (ours.mean() - theirs.mean()):+.1f} points\n{words}{', chance' if chance >= CHANCE else ''}"
