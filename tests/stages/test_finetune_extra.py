"""Fine-tuning on the extra labels too: joined as `train_extra` joined them, never held out, and no others."""

from __future__ import annotations

import json
import shutil
import signal
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from stage_helpers import run_all, signalled

from conftest import Moco, assert_one_line_error, write_params
from moco.training import linear
from moco.training.supervised import SupervisedStep

EXTRA = {"17.png": 2, "3.png": 3, "39.png": 4}  # the right labels: the number modulo 5
ORDER = [3, 17, 39]


def write(project: Path, labels: dict[str, int] = EXTRA, **changes: object) -> None:
    (project / "labels.csv").write_text(
        "image,label\n" + "".join(f"{name},{label}\n" for name, label in labels.items())
    )
    settings = {"train_extra__labels": "labels.csv", "finetune__classifier": "classifier_extra", **changes}
    write_params(project, **settings)


@pytest.fixture
def with_extra(moco: Moco, project: Path) -> Path:
    write(project)
    run_all(moco, "data", "pretrain", "train", "train_extra")
    return project


class Watched:
    """What the steps of fine-tuning got: images by the bytes of each, with their labels."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.trained: dict[bytes, int] = {}
        self.measured: list[dict[bytes, int]] = []
        call, accuracy = SupervisedStep.__call__, SupervisedStep.accuracy

        def step(this: SupervisedStep, indices: np.ndarray, images: torch.Tensor, *rest: Any) -> dict[str, Any]:
            for row, image in zip(indices, images.numpy(), strict=True):
                self.trained[image.tobytes()] = int(this.labels[row])
            return call(this, indices, images, *rest)

        def measure(this: SupervisedStep, images: np.ndarray, labels: np.ndarray) -> float:
            self.measured.append({image.tobytes(): int(label) for image, label in zip(images, labels, strict=True)})
            return accuracy(this, images, labels)

        monkeypatch.setattr(SupervisedStep, "__call__", step)
        monkeypatch.setattr(SupervisedStep, "accuracy", measure)


def pictures(project: Path, split: str, numbers: list[int]) -> list[bytes]:
    return [np.asarray(Image.open(project / f"dataset/{split}/{number}.png")).tobytes() for number in numbers]


@pytest.mark.parametrize("start", ["classifier", "encoder"])
def test_every_extra_label_meets_its_image_and_none_is_held_out(
    moco: Moco, with_extra: Path, monkeypatch: pytest.MonkeyPatch, start: str
) -> None:
    watched = Watched(monkeypatch)
    write(with_extra, finetune__start=start, finetune__batch_size=2)
    run_all(moco, "finetune")
    found = [watched.trained.get(picture) for picture in pictures(with_extra, "unlabeled", ORDER)]
    assert found == [number % 5 for number in ORDER]
    train = pictures(with_extra, "train", list(range(20)))
    labels = torch.load(with_extra / "dataset/train_label_tensor.pt").tolist()
    held = watched.measured[0]
    assert {**watched.trained, **held} == dict(zip(train, labels, strict=True)) | dict(
        zip(pictures(with_extra, "unlabeled", ORDER), found, strict=True)
    )
    assert len(held) == 10 and not held.keys() & watched.trained.keys()
    metrics = json.loads((with_extra / "reports/finetune/metrics.json").read_text())
    assert metrics["extra_labels"] == 3
    run_all(moco, "eval")
    monkeypatch.setenv("COLUMNS", "200")
    assert "fine-tuned, with 3 extra labels" in moco("report").stdout.replace("\n", " ")
    done = moco("eval", "--classifier", "models/finetuned")
    assert done.returncode == 0 and "other settings" not in done.stderr, done.stderr


def test_the_last_layer_begins_with_the_extra_labels(
    moco: Moco, with_extra: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the same order as `train_extra` has them, each beside the features of its own image."""
    fitted: list[tuple[torch.Tensor, torch.Tensor]] = []
    epochs: list[int] = []  # of the schedule
    fit = linear.fit_linear

    def watched(views: torch.Tensor, labels: torch.Tensor, *rest: Any, **more: Any) -> Any:
        fitted.append((views, labels))
        epochs.append(rest[3].epochs)
        return fit(views, labels, *rest, **more)

    for module in ("train", "finetune"):
        monkeypatch.setattr(f"moco.stages.{module}.fit_linear", watched)
    write(with_extra, train__epochs=39)
    shutil.rmtree(
        with_extra / "runs/train_extra", ignore_errors=True
    )  # else its result is taken, and nothing is fitted
    run_all(moco, "train_extra", "finetune")
    *_, (theirs, _), (views, labels) = fitted
    assert set(epochs) == {30}, "10 own images of 13: the rate falls over as many steps as without the extra ones"
    assert labels[-3:].tolist() == [number % 5 for number in ORDER] and len(labels) == 13
    assert torch.allclose(views[0, -3:], theirs[0, -3:], atol=1e-5)
    assert not torch.allclose(views[0, -3], views[0, -2], atol=1e-3)


def test_answers_that_come_meanwhile_wait_for_train_extra(moco: Moco, with_extra: Path) -> None:
    """`moco label` goes on while a job is interrupted and continues: the labels are those that were checked."""
    write(with_extra, finetune__pool=3)
    run_all(moco, "finetune")
    weights = with_extra / "models/finetuned/model_sub.pth"
    before = weights.read_bytes()
    (with_extra / "runs").rename(with_extra / "runs-undisturbed")
    weights.unlink()
    with signalled(4):
        assert moco("finetune").returncode == 128 + signal.SIGTERM
    write(with_extra, {**EXTRA, "8.png": 3}, finetune__pool=3)
    done = moco("finetune")
    assert done.returncode == 0 and "continuing from" in done.stderr, done.stderr
    warnings = [line for line in done.stderr.splitlines() if "warning" in line and "better than its start" not in line]
    assert not warnings
    assert weights.read_bytes() == before
    run_all(moco, "train_extra", "finetune")
    assert weights.read_bytes() != before


def test_images_that_bring_their_labels_are_kept_with_the_classifier(
    moco: Moco, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are not in the pool, and may be gone when the classifier is trained further."""
    folder = project / "labels/more/4"
    folder.mkdir(parents=True)
    own = np.random.default_rng(5).integers(0, 255, (32, 32, 3), np.uint8)
    Image.fromarray(own).save(folder / "a.png")
    write_params(project, train_extra__labels="labels/more", finetune__classifier="classifier_extra",
                 finetune__batch_size=2)  # fmt: skip
    run_all(moco, "data", "pretrain", "train", "train_extra")
    shutil.rmtree(project / "labels")
    watched = Watched(monkeypatch)
    run_all(moco, "finetune")
    assert watched.trained[own.tobytes()] == 4


def test_other_settings_and_damage_are_told(moco: Moco, with_extra: Path) -> None:
    path = with_extra / "models/classifier_extra/extra_labels.pth"
    good = path.read_bytes()
    for bad in (good[:100], b""):
        path.write_bytes(bad)
        assert_one_line_error(moco("finetune"), path.name, "damaged", "moco train_extra")
    content = torch.load(BytesIO(good), weights_only=True)
    for name, value in (("labels", content["labels"] - 1), ("digests", content["digests"] + 1), ("own", None)):
        torch.save({**content, name: value}, path)
        assert_one_line_error(moco("finetune"), path.name, "moco train_extra")
    path.unlink()
    assert_one_line_error(moco("finetune"), path.name, "not found", "moco train_extra")
    path.write_bytes(good)
    for changes, words in (
        ({"train_extra__labels": None}, "train_extra.labels is labels.csv there and None here; `moco train_extra`"),
        ({"finetune__start": "encoder", "pretrain__lr": 9.0}, "models/encoder.pth was made with other settings"),
    ):
        write(with_extra, **changes)
        done = moco("finetune")
        assert done.returncode == 0 and words in done.stderr, done.stderr


def test_without_extra_labels_it_is_what_train_and_finetune_make(moco: Moco, project: Path) -> None:
    write_params(project, request__answers="people")
    run_all(moco, "data", "pretrain", "train", "request", "train_extra", "finetune")
    weights = project / "models/finetuned/model_sub.pth"
    before = weights.read_bytes()
    weights.unlink()
    for labels in (None, "models/request/request.csv"):  # nobody has answered
        write(project, train_extra__labels=labels)
        run_all(moco, "train_extra", "finetune")
        assert weights.read_bytes() == before
        done = moco("eval", "--classifier", "models/finetuned")
        assert done.returncode == 0 and "warning" not in done.stderr, done.stderr


def test_it_says_what_to_run_first(moco: Moco, project: Path) -> None:
    write(project)
    run_all(moco, "data", "pretrain", "train")
    assert_one_line_error(moco("finetune"), "models/classifier_extra/model_sub.pth", "moco train_extra")
    write(project, finetune__start="encoder")
    assert_one_line_error(moco("finetune"), "models/classifier_extra/model_sub.pth", "moco train_extra")
