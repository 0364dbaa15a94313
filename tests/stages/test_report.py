"""The table of `moco report` and the record of `moco eval` follow what a classifier was made from."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from stage_helpers import run_all

from conftest import Moco, assert_one_line_error, write_params
from moco.files import sha256
from moco.tracking.metric_log import last_values
from moco.training.significance import unpack, wilson

ANOTHER = "another encoder than models/encoder.pth"


def read(project: Path, stage: str, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((project / "reports" / stage / f"{name}.json").read_text())
    return found


def row(text: str, label: str) -> tuple[str, str]:
    """Both lines of a row of the table."""
    lines = text.splitlines()
    place = next(i for i, line in enumerate(lines) if label in line)
    return lines[place], lines[place + 1]


@pytest.mark.fault("chain")
def test_report_and_eval_keep_to_the_encoder_that_the_classifier_was_made_from(moco: Moco, project: Path) -> None:
    """As in the issue: a classifier of another seed, then another pretraining of one epoch."""
    run_all(moco, "data", "pretrain", "train", "eval", "finetune")
    whole, first = moco("report").stdout, read(project, "pretrain", "metrics")
    assert "(1)" not in whole, whole
    seen = f"{first['images_seen']:,.0f}"
    assert seen in row(whole, "linear classifier")[0] and f"{seen} +" in row(whole, "fine-tuned")[0]

    write_params(project, train__seed=1)
    run_all(moco, "train")
    text = moco("report").stdout
    assert "reports/eval is of another classifier" in text and "fine-tuned from another classifier" in text
    assert f"{100 * read(project, 'train', 'metrics')['val_accuracy']:.1f} %" in row(text, "linear classifier")[0]

    write_params(project, train__seed=1, pretrain__epochs=1)
    run_all(moco, "pretrain")
    second = read(project, "pretrain", "metrics")
    assert second["images_seen"] < first["images_seen"] and second["loss"] != first["loss"]
    text = moco("report").stdout
    assert ANOTHER in text and seen in row(text, "linear classifier")[0]
    run_all(moco, "eval")
    logs = sorted((project / "runs/eval").glob("*/metrics.jsonl"), key=lambda path: path.stat().st_mtime)
    logged, made = last_values(logs[-1]), read(project, "train", "metrics")
    assert logged["images_seen"] == first["images_seen"] and logged["pretrain_loss"] == first["loss"]
    assert logged["pretrain_minutes"] == first["minutes"] and logged["knn_accuracy"] == first["knn_accuracy"]
    assert logged["held_out_accuracy"] == pytest.approx(made["best_held_out_accuracy"])
    assert logged["val_knn_accuracy"] == made["val_knn_accuracy"]
    assert ANOTHER in moco("report").stdout

    run_all(moco, "train", "eval", "finetune")
    assert "(1)" not in moco("report").stdout, "all of one chain again"


@pytest.mark.fault("chain")
def test_weights_that_are_not_those_of_the_record_beside_them_have_no_known_past(moco: Moco, project: Path) -> None:
    run_all(moco, "data", "pretrain", "train")
    path = project / "models/classifier/model_sub.pth"
    state = torch.load(path, weights_only=True)
    state["fc.bias"] += 1
    torch.save(state, path)
    done = moco("eval")
    assert done.returncode == 0 and "of other weights than model_sub.pth" in done.stderr
    (log,) = (project / "runs/eval").glob("*/metrics.jsonl")
    assert "images_seen" not in last_values(log) and "pretrain_loss" not in last_values(log)
    assert "what its pretraining took is not known" in moco("report").stdout
    write_params(project, train_extra__labels=None)
    done = moco("train_extra")
    assert done.returncode == 1 and "E-STAGE-CHAIN" in done.stderr
    assert not (project / "models/classifier_extra").exists()


@pytest.mark.fault("chain")
def test_report_tells_of_other_data_another_network_and_earlier_versions(moco: Moco, project: Path) -> None:
    run_all(moco, "data", "pretrain", "train", "baseline")
    assert "(1)" not in moco("report").stdout
    labels = torch.load(project / "dataset/val_label_tensor.pt")
    torch.save((labels + 1) % 5, project / "dataset/val_label_tensor.pt")
    run_all(moco, "data")
    assert "other data than models/manifest.json" in moco("report").stdout
    write_params(project, pretrain__width=6)
    run_all(moco, "pretrain", "train")
    text = moco("report").stdout
    assert "of another network than the classifier" in text
    assert "not comparable" in row(text, "labels alone")[0], "val has other labels now"
    for path in (project / "reports").glob("*/provenance.json"):
        path.unlink()
    assert "of an earlier version" in moco("report").stdout


def test_every_accuracy_has_its_interval_and_every_difference_its_chance(moco: Moco, project: Path) -> None:
    run_all(moco, "data", "pretrain", "train", "eval", "baseline")
    text = moco("report").stdout
    assert "on val, 10 images" in text
    for label, stage, metric in (
        ("pretrained, linear", "eval", "val_accuracy"),
        ("random weights", "baseline", "random_val_accuracy"),
        ("labels alone", "baseline", "supervised_val_accuracy"),
    ):
        accuracy = read(project, stage, "metrics")[metric]
        correct = unpack(read(project, stage, "provenance")["correct"][metric])
        assert correct.mean() == pytest.approx(accuracy)
        low, high = wilson(round(accuracy * 10), 10)
        top, below = row(text, label)
        assert f"{100 * accuracy:.1f} %" in top and f"{100 * low:.1f} to {100 * high:.1f}" in below
    linear = unpack(read(project, "train", "provenance")["correct"]["val_accuracy"])
    assert (linear == unpack(read(project, "eval", "provenance")["correct"]["val_accuracy"])).all()
    knn = unpack(read(project, "train", "provenance")["correct"]["val_knn_accuracy"])
    assert f"{100 * knn.mean():.1f} %" in row(text, "pretrained, linear")[0].split("│")[4]
    assert knn.mean() == pytest.approx(read(project, "train", "metrics")["val_knn_accuracy"])
    assert len(re.findall(r"p [=<] 0|p = 1", text)) == 2, text
    predictions = (project / "reports/eval/predictions.csv").read_text().splitlines()[1:]
    assert [line.split(",")[1] == line.split(",")[2] for line in predictions] == linear.tolist()


def test_a_difference_that_may_be_chance_says_so(moco: Moco, project: Path) -> None:
    """The same files with other answers: on 10 images one more right is chance, on 100 thirty more are not."""
    from moco.training.significance import pack

    run_all(moco, "data", "pretrain", "train", "baseline")
    for count, more, words in ((10, 1, "+10.0 points"), (100, 30, "+30.0 points")):
        for stage, right in (("train", 0), ("baseline", more)):
            path = project / f"reports/{stage}/provenance.json"
            content = json.loads(path.read_text())
            half = np.arange(count) < count // 2 + right
            content["correct"] = dict.fromkeys(content["correct"], pack(half))
            path.write_text(json.dumps(content))
        top, below = row(moco("report").stdout, "labels alone")
        assert words in top
        assert ("p = 1, chance" in below) if more == 1 else ("p < 0.001" in below and "chance" not in below)


def test_a_copied_classifier_takes_its_past_along(moco: Moco, project: Path) -> None:
    run_all(moco, "data", "pretrain", "train")
    shutil.copytree(project / "models/classifier", project / "elsewhere")
    first = read(project, "pretrain", "metrics")
    write_params(project, pretrain__epochs=1)
    run_all(moco, "pretrain", "train")
    run_all(moco, "eval")
    assert moco("eval", "--classifier", "elsewhere").returncode == 0
    (folder,) = (project / "reports").glob("eval-elsewhere-*")
    made = json.loads((folder / "provenance.json").read_text())
    assert made["weights"] == sha256(project / "elsewhere/model_sub.pth")
    assert made["encoder"] != sha256(project / "models/encoder.pth")
    logs = sorted((project / "runs/eval").glob("*/metrics.jsonl"), key=lambda path: path.stat().st_mtime)
    assert last_values(logs[-1])["images_seen"] == first["images_seen"]


@pytest.mark.fault("damaged-reports", 7)
def test_rows_are_shown_beside_files_that_cannot_be_read(moco: Moco, project: Path) -> None:
    run_all(moco, "data", "pretrain", "train", "baseline")
    reports = project / "reports"
    for name, content in (
        ("provenance", "{"), ("provenance", "[]"), ("provenance", '{"data": 5}'), ("provenance", '\udcff'),
        ("provenance", '{"data": "x", "pretraining": "y"}'), ("metrics", '{"val_accuracy": "high"}'),
    ):  # fmt: skip
        path = reports / f"train/{name}.json"
        before = path.read_bytes()
        path.write_bytes(content.encode("utf-8", "surrogateescape"))
        done = moco("report")
        assert done.returncode == 0, done.stderr
        assert f"reports/train/{name}.json is damaged" in " ".join(done.stdout.split())
        assert "random weights" in done.stdout and ("linear classifier" in done.stdout)
        assert "earlier version" not in done.stdout
        path.write_bytes(before)
    shutil.move(reports / "train/metrics.json", reports / "train/kept")
    (reports / "train/metrics.json").mkdir()
    done = moco("report")
    assert done.returncode == 0 and "reports/train/metrics.json cannot be read" in " ".join(done.stdout.split())
    shutil.rmtree(reports / "baseline")
    assert_one_line_error(moco("report"), "reports/train/metrics.json", "[E-REPORT-UNREADABLE]")
