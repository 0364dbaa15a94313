"""From a registered classifier back to what made it, in a fresh clone, and pipelines beside each other."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT, Moco, assert_one_line_error, write_params
from moco.settings.reading import load
from moco.tracking.compare import collect
from moco.training.significance import wilson

STORE = "sqlite:///mlflow.db"


@pytest.fixture(autouse=True)
def no_store_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MLFLOW_TRACKING_URI", "DVC_EXP_NAME"):
        monkeypatch.delenv(name, raising=False)


def test_pipelines_are_compared_by_what_differs_and_share_what_they_have_in_common(moco: Moco, project: Path) -> None:
    for lr in (0.5, 50.0):
        write_params(project, train__lr=lr)
        for stage in ("data", "pretrain", "train")[0 if lr == 0.5 else 2 :]:
            assert moco(stage).returncode == 0
    rows = collect(project)
    assert [row.params["train.lr"] for row in rows] == [0.5, 50.0]
    assert rows[0].metrics["pretrain.loss"] == rows[1].metrics["pretrain.loss"], "one pretraining, of both"
    assert [row.status for row in rows] == ["FINISHED", "FINISHED"]
    shown = moco("compare", "--param", "train.epochs", "--sort", "train.val_accuracy").stdout
    head = "".join(shown.split("┡")[0].split())
    assert "lr" in head and "momentum" not in head
    assert_one_line_error(moco("compare", "--metric", "train.val_acuracy"), "did you mean 'train.val_accuracy'")
    assert_one_line_error(moco("compare", "--param", "train.lrr"), "did you mean 'train.lr'")


def test_a_training_after_a_change_of_what_is_logged_belongs_to_its_pipeline(moco: Moco, project: Path) -> None:
    for every, stages in ((2, ("data", "pretrain", "train")), (3, ("train",))):
        write_params(project, monitor__log_every=every, train__lr=float(every))
        for stage in stages:
            assert moco(stage).returncode == 0
    rows = collect(project)
    assert [row.params["train.lr"] for row in rows] == [2.0, 3.0]
    assert all({"pretrain.loss", "train.val_accuracy"} <= row.metrics.keys() for row in rows)


@pytest.mark.fault("chain")
def test_a_row_has_the_numbers_of_one_chain_and_their_intervals(moco: Moco, project: Path) -> None:
    """Two runs of the same settings whose encoders differ, as with other sources; the newer one made no classifier."""
    for stage in ("data", "pretrain", "train", "eval"):
        assert moco(stage).returncode == 0
    (row,) = collect(project)
    loss = row.metrics["pretrain.loss"]
    assert row.images["eval.val_accuracy"] == 10 and row.images["pretrain.knn_accuracy"] == 10 and not row.left_out
    shown = moco("compare").stdout
    accuracy = row.metrics["train.val_accuracy"]
    low, high = wilson(round(accuracy * 10), 10)
    assert f"±{max(high - accuracy, accuracy - low):.2g}" in shown and "Wilson" in shown
    shutil.rmtree(next((project / "runs/pretrain").iterdir()) / "outputs")  # else its result is taken again
    assert moco("pretrain").returncode == 0
    newer = max((project / "runs/pretrain").iterdir(), key=lambda folder: folder.stat().st_mtime)
    log = newer / "metrics.jsonl"
    log.write_text(log.read_text().replace('"loss": ', '"loss": 9'))
    path = newer / "artifacts/provenance.json"
    path.write_text(path.read_text().replace(json.loads(path.read_text())["encoder"], "0" * 64))
    (row,) = collect(project)
    assert row.metrics["pretrain.loss"] == loss, "of the encoder that the classifier was made from"
    for older in (project / "runs/pretrain").iterdir():
        if older != newer:
            shutil.rmtree(older)
    (row,) = collect(project)
    assert "pretrain.loss" not in row.metrics and row.left_out == ["pretrain"]
    assert "pretrain is of another encoder" in moco("compare").stdout


def test_with_nothing_to_compare_one_line_says_so(moco: Moco, project: Path) -> None:
    assert_one_line_error(moco("compare"), "no pipeline ran here yet")


def test_without_a_store_the_origin_is_one_line(moco: Moco, project: Path) -> None:
    assert_one_line_error(moco("origin"), "tracking.uri is empty")
    write_params(project, tracking__uri="sqlite:///mlflow.db")
    assert_one_line_error(moco("origin"), "mlflow.db: no such store", "MLFLOW_TRACKING_URI")
    assert not (project / "mlflow.db").exists(), "nothing is made by looking"


def command(folder: Path, *words: str, **environment: str) -> str:
    path = f"{folder / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    who = {"GIT_AUTHOR_NAME": "t", "GIT_AUTHOR_EMAIL": "t@example.org", "GIT_COMMITTER_NAME": "t",
           "GIT_COMMITTER_EMAIL": "t@example.org"}  # fmt: skip
    done = subprocess.run(
        words, cwd=folder, capture_output=True, text=True, check=False,
        env={**os.environ, **who, "PATH": path, **environment},
    )  # fmt: skip
    assert done.returncode == 0, f"{words}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
    return done.stdout


@pytest.mark.slow
def test_a_fresh_clone_makes_the_champion_again_bit_for_bit(project: Path, dataset: Path) -> None:
    """With settings and a source that were not committed, and after the project went on."""
    place = project / "first"
    place.mkdir()
    for name in ("src", ".dvc"):
        shutil.copytree(
            ROOT / name, place / name, ignore=shutil.ignore_patterns("__pycache__", "tmp", "cache", "*.egg-info")
        )
    for name in ("dvc.yaml", ".dvcignore", ".gitignore"):
        shutil.copy(ROOT / name, place)
    (place / "bin").mkdir()
    (place / "bin/moco").write_text(f'#!/bin/sh\nPYTHONPATH="$PWD/src" exec "{sys.executable}" -m moco.cli "$@"\n')
    (place / "bin/moco").chmod(0o755)
    settings = {"tracking__uri": f"sqlite:///{project}/mlflow.db", "data__path": str(dataset)}
    write_params(place, **settings)
    command(place, "git", "init", "-q", "-b", "main")
    command(place, "git", "add", "-A")
    command(place, "git", "commit", "-q", "-m", "one")
    write_params(place, **settings, train__seed=7, pretrain__temperature=0.3)
    source = place / "src/moco/training/schedules.py"
    source.write_text(source.read_text() + "# not committed\n")
    (place / "src/moco/training/fresh.py").write_text("# git does not know it\n")
    command(place, "dvc", "repro", "train")
    wanted = hashlib.sha256((place / "models/classifier/model_sub.pth").read_bytes()).hexdigest()
    assert command(place, "git", "status", "--porcelain", "src") == (
        " M src/moco/training/schedules.py\n?? src/moco/training/fresh.py\n"
    ), "the index is the user's"
    command(place, "git", "checkout", "-q", ".")
    (place / "src/moco/training/fresh.py").unlink()
    (place / "later.txt").touch()
    command(place, "git", "add", "-A")
    command(place, "git", "commit", "-q", "-m", "two")

    again = project / "again"
    command(project, "git", "clone", "-q", str(place), str(again))
    store = {"MLFLOW_TRACKING_URI": f"sqlite:///{project}/mlflow.db"}
    told = command(again, "moco", "origin", "champion", "--restore", "--yes", **store)
    assert wanted in told and "`dvc repro train`" in told
    assert not (again / "later.txt").exists()
    assert "# not committed" in (again / "src/moco/training/schedules.py").read_text()
    assert (again / "src/moco/training/fresh.py").read_text() == "# git does not know it\n"
    assert load(again / "params.yaml").train.seed == 7
    command(again, "dvc", "repro", "train", MLFLOW_TRACKING_URI=f"sqlite:///{again}/mlflow.db")
    assert hashlib.sha256((again / "models/classifier/model_sub.pth").read_bytes()).hexdigest() == wanted
    done = subprocess.run(
        ["moco", "origin", "--restore"], cwd=again, capture_output=True, text=True, check=False,
        env={**os.environ, **store, "PATH": f"{again / 'bin'}:{os.environ['PATH']}"},
    )  # fmt: skip
    assert_one_line_error(done, "changed here, and would be lost")
