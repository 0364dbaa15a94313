"""Stage `train_extra`: stage `train` with extra labels.

Without any it hands on what `train` made, so that `dvc repro` runs to its end before somebody has labelled something.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from moco.csv_files import csv_text
from moco.data.cache import DecodedSplit
from moco.data.manifest import Manifest, load_manifest
from moco.errors import UserError, say
from moco.exchange.classifier_files import WEIGHTS, read_classifier
from moco.files import sha256, write_text
from moco.labels.extra_file import CONTENT, content
from moco.labels.extra_labels import Answer, ExtraLabels, read_extra_labels
from moco.labels.plausibility import check_labels
from moco.layout import CLASSIFIER, CLASSIFIER_EXTRA, FORM, LABELS, MANIFEST, REPORTS, REQUEST
from moco.runs.identity import Making, Start
from moco.runs.joins import check_classes, check_images, tell_other_data
from moco.runs.outputs import OUTPUTS, copy_file, copy_folder, locked_outputs, publish
from moco.settings.schema import Config
from moco.stages.train import Inputs, open_inputs, train_classifier
from moco.tracking.digests import NAME, read_json

REPORT = REPORTS / "train_extra"


def run(config: Config, start: Start | None = None) -> None:
    """Train the classifier with extra labels. Raises UserError where these are missing or wrong
    (moco.labels.extra_labels), are not likely to belong to their images (moco.labels.plausibility), or encoder, data
    and settings do not fit each other."""
    with locked_outputs("train_extra", say):
        _run(config, (start or Start.of("train_extra")).making(config))


def _run(config: Config, making: Making) -> None:
    if config.train_extra.labels is None:
        _hand_on("train_extra.labels is not set", making)
        return
    path = Path(config.train_extra.labels)
    inputs = open_inputs(config)
    extra = read_extra_labels(path, config.data, inputs.manifest, inputs.splits, say)
    if not len(extra.labels):
        if path.resolve() != FORM.resolve():
            raise UserError(f"{path}: no label in it that could be used")
        _hand_on(f"nobody has answered {path}; answers go to a file of their own, by `moco label`", making)
        return
    if not any(path.resolve().is_relative_to(folder.resolve()) for folder in (LABELS, REQUEST)):
        say(f"warning: {path} lies outside {LABELS}/, so that `dvc repro` does not see when it changes")
    train = inputs.splits["train"]
    classes = len(inputs.manifest.classes)
    added, before = (np.bincount(labels, minlength=classes) for labels in (extra.labels, train.known_labels))
    say(
        f"train_extra: {len(extra.labels)} labels added to {len(train.images)}: {added.min()} to {added.max()} a class,"
        f" with train's {(before + added).min()} to {(before + added).max()}"
    )
    inputs.splits["extra"] = DecodedSplit(extra.images, extra.labels, extra.digests)
    texts = {REPORT / "labels.csv": _table(train, extra.answers, inputs.manifest)}

    def check(features: Tensor) -> None:
        _check(config, inputs, extra, features)

    settings = {"train_extra.labels": config.train_extra.labels, CONTENT: content(extra.digests, extra.labels)}
    train_classifier(
        config, inputs, "train_extra", CLASSIFIER_EXTRA, settings, {"extra_labels": float(len(extra.labels))}, making,
        check, texts,
    )  # fmt: skip


def _hand_on(why: str, making: Making) -> None:
    """Copy the classifier and metrics of `train` where there are no extra labels.

    Raises UserError where there are none yet, or they are of two runs.
    """
    report = REPORTS / "train"
    metrics, epochs, provenance = (report / name for name in ("metrics.json", "epochs.csv", NAME))
    if not CLASSIFIER.is_dir() or not all(path.is_file() for path in (metrics, epochs, provenance)):
        raise UserError(f"{CLASSIFIER}: not found; run `moco train` first, or set train_extra.labels")
    if read_json(provenance).get("weights") != sha256(CLASSIFIER / WEIGHTS):
        raise UserError(
            f"{provenance}: of another classifier than {CLASSIFIER / WEIGHTS}; run `moco train` again", "E-STAGE-CHAIN"
        )
    manifest, made = load_manifest(MANIFEST), read_classifier(CLASSIFIER)
    check_classes(CLASSIFIER, made.classes, manifest, "run `moco train` again")
    check_images(CLASSIFIER, made.images, manifest, "run `moco train` again")
    tell_other_data(CLASSIFIER, made.made_from.get("data"), made.images, manifest, say)
    found = {**json.loads(metrics.read_text()), "extra_labels": 0.0}
    with tempfile.TemporaryDirectory(prefix="moco-train-extra-") as folder:
        own = Path(folder) / OUTPUTS
        copy_folder(CLASSIFIER, own / CLASSIFIER_EXTRA)
        write_text(own / REPORT / "metrics.json", json.dumps(found, indent=2, sort_keys=True) + "\n")
        write_text(own / REPORT / "labels.csv", _table(None, [], None))
        copy_file(epochs, own / REPORT / "epochs.csv")
        copy_file(provenance, own / REPORT / NAME)
        making.refuse_changes("run the same command again")
        publish(Path(folder))
    say(f"train_extra: no extra labels ({why}); {CLASSIFIER_EXTRA} is what `train` made")


def _check(config: Config, inputs: Inputs, extra: ExtraLabels, features: Tensor) -> None:
    """Check whether the extra labels belong to their images. features: of train, then of the extra images."""
    train = inputs.splits["train"]
    order = np.argsort(extra.order)  # as the lines stand in the file
    found = check_labels(
        features[: len(train.images)], torch.from_numpy(train.known_labels), features[len(train.images) :][order],
        torch.from_numpy(extra.labels[order]), len(inputs.manifest.classes),
    )  # fmt: skip
    if not found.runs:
        enough = "" if found.needed is None else f"; {found.needed} would be enough to tell"
        say(f"train_extra: whether the labels belong to their images cannot be told from their neighbours{enough}")
        return
    agreements = [run.agreement for run in found.runs]
    say(
        f"train_extra: neighbours in train agree with {np.mean(agreements):.0%} of the new labels (chance "
        f"{np.mean([run.chance for run in found.runs]):.0%}, train's own {found.known:.0%})"
    )
    bad = [run for run in found.runs if run.suspicious]
    if not bad:
        return
    first, last = (extra.places[order[row]] for row in (bad[0].first, bad[0].last))
    said = (
        f"{first} to {last}: {bad[0].agreement:.0%} of these labels agree with the images' neighbours in train; "
        f"{bad[0].chance:.0%} would by chance, {found.known:.0%} of train's own do, at least {bad[0].threshold:.0%} "
        "are expected"
    )
    if config.monitor.suspicious_labels == "refuse":
        raise UserError(
            f"{said}. Labels of other images, rows that slipped? If they are right, set monitor.suspicious_labels: warn"
        )
    say(f"warning: {said}")


def _table(train: DecodedSplit | None, answers: list[Answer], manifest: Manifest | None) -> str:
    """Return a table of all labels and where each is from: train's by number, then every line that was read."""
    table: list[Sequence[object]] = [["image", "content", "label", "class", "source", "status"]]
    if train is not None and manifest is not None:
        for number, (digest, label) in enumerate(zip(train.digests, train.known_labels.tolist(), strict=True)):
            content = bytes(digest).hex()
            table.append([f"train/{number}", content, label, manifest.classes[label], "train", "used"])
        for each in answers:
            named = ["", ""] if each.label < 0 else [each.label, manifest.classes[each.label]]
            table.append([each.line.name, each.digest.hex(), *named, each.line.place, each.status])
    return csv_text(table)
