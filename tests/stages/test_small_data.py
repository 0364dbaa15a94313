"""Settings that are larger than the data, and images in several places: told beside every number, or refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image
from stage_helpers import run_all

from conftest import Moco, assert_one_line_error, write_params
from moco.tracking.metric_log import read_events


@pytest.mark.fault("overlap")
def test_images_of_val_in_train_are_told_with_every_score(moco: Moco, project: Path) -> None:
    """A score of 100 % once stood in the report, and in the tracker, without a word."""
    for number in range(10):
        with Image.open(project / f"dataset/train/{number}.png") as image:
            image.save(project / f"dataset/val/{number}.png", compress_level=0)
    fact = "10 image(s) of val also stand in train"
    assert fact in moco("data").stderr
    assert fact in moco("data").stderr, "each time"
    run_all(moco, "pretrain", "train")
    assert fact in moco("eval").stderr
    assert fact in " ".join(moco("report").stdout.split())
    for stage in ("pretrain", "train", "eval"):
        (log,) = (project / f"runs/{stage}").glob("*/metrics.jsonl")
        start = next(read_events(log))
        assert fact in start["tags"]["data_notes"] and fact in start["pipeline"]["tags"]["data_notes"]


@pytest.mark.fault("small-data", 2)
def test_a_batch_or_queue_beyond_the_pool_is_told(moco: Moco, project: Path) -> None:
    write_params(project, pretrain__batch_size=64, pretrain__queue=100, pretrain__epochs=1)
    run_all(moco, "data")
    said = moco("pretrain").stderr
    assert "pretrain.batch_size: 64" in said and "batches are of 40" in said
    assert "pretrain.queue: 100" in said and "a pool of 40" in said


@pytest.mark.fault("small-data")
def test_splits_beyond_the_real_batch_are_refused(moco: Moco, project: Path) -> None:
    write_params(project, pretrain__batch_size=64, pretrain__batch_norm="split", pretrain__splits=32)
    run_all(moco, "data")
    assert_one_line_error(moco("pretrain"), "pretrain.splits", "40", "20 at most", "[E-PRETRAIN-SPLITS]")


def test_settings_that_fit_are_not_warned_about(moco: Moco, project: Path) -> None:
    run_all(moco, "data")
    assert "warning" not in moco("pretrain").stderr


@pytest.mark.fault("overlap", 6)
def test_held_out_images_that_pretraining_sees_are_told_with_their_accuracy(moco: Moco, project: Path) -> None:
    """By the stages, the report, the comparison and the record, from which MLflow is fed."""
    for number in range(20):
        shutil.copy(project / f"dataset/train/{number}.png", project / f"dataset/unlabeled/{number}.png")
    write_params(project, pretrain__epochs=1, finetune__epochs=1)
    run_all(moco, "data")
    for stage in ("pretrain", "train", "finetune"):
        said = moco(stage).stderr
        held = 10
        assert f"{held} of the {held} held-out images also stand in the pool" in said, said
        metrics = json.loads((project / f"reports/{stage}/metrics.json").read_text())
        assert metrics["held_out_in_pool"] == held
        events = list(read_events(next((project / f"runs/{stage}").glob("*/metrics.jsonl"))))
        assert any(event.get("metrics", {}).get("held_out_in_pool") == held for event in events)
        if stage != "pretrain":
            (model,) = [event for event in events if event["event"] == "model"]
            assert float(model["tags"]["held_out_in_pool"]) == held
    for command in ("report", "compare"):
        told = " ".join(moco(command).stdout.split())
        assert "held-out images also stand in the pool, so pretraining sees them: 10 of pretrain" in told
        assert "10 of train" in told and "10 of finetune" in told


def test_held_out_images_of_their_own_are_not_remarked(moco: Moco, project: Path) -> None:
    write_params(project, pretrain__epochs=1)
    run_all(moco, "data", "pretrain")
    assert "stand in the pool" not in moco("train").stderr
    assert json.loads((project / "reports/train/metrics.json").read_text())["held_out_in_pool"] == 0
    assert "stand in the pool" not in moco("report").stdout


@pytest.mark.fault("small-data", 3)
def test_a_batch_beyond_the_labelled_images_is_told(moco: Moco, project: Path) -> None:
    sizes = {"train__batch_size": 64, "baseline__batch_size": 64, "finetune__batch_size": 64}
    write_params(project, pretrain__epochs=1, baseline__epochs=1, finetune__epochs=1, **sizes)
    run_all(moco, "data", "pretrain")
    for stage, count in (("train", 10), ("baseline", 20), ("finetune", 10)):
        assert f"{stage}.batch_size: 64 is more than the {count} images" in moco(stage).stderr
