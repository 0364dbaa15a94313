"""Fine-tuning on the extra labels too: joined as `train_extra` joined them, never held out, and no others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from stage_helpers import run_all

from conftest import Moco, assert_one_line_error, write_params
from moco.stages import finetune as stage
from moco.stages.supervised import SupervisedStep

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
        self.measured: list[int] = []
        call, accuracy = SupervisedStep.__call__, SupervisedStep.accuracy

        def step(this: SupervisedStep, indices: np.ndarray, images: torch.Tensor, *rest: Any) -> dict[str, Any]:
            for row, image in zip(indices, images.numpy(), strict=True):
                self.trained[image.tobytes()] = int(this.labels[row])
            return call(this, indices, images, *rest)

        def measure(this: SupervisedStep, images: np.ndarray, labels: np.ndarray) -> float:
            self.measured.append(len(images))
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
    assert all(watched.trained.get(picture, label) == label for picture, label in zip(train, labels, strict=True))
    assert len(watched.trained) == 10 + 3, "train but for what is held out, and the extra ones"
    assert watched.measured[0] == 10, "the images of train that are held out without extra labels, too"
    metrics = json.loads((with_extra / "reports/finetune/metrics.json").read_text())
    assert metrics["extra_labels"] == 3
    run_all(moco, "eval")
    assert "fine-tuned, with 3 extra labels" in moco("report").stdout.replace("\n", " ")
    done = moco("eval", "--classifier", "models/finetuned")
    assert done.returncode == 0 and "other settings" not in done.stderr, done.stderr


def test_the_last_layer_begins_with_the_extra_labels(
    moco: Moco, with_extra: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fitted: list[list[int]] = []
    fit = stage.fit_linear

    def watched(views: torch.Tensor, labels: torch.Tensor, *rest: Any, **more: Any) -> Any:
        fitted.append(labels.tolist())
        return fit(views, labels, *rest, **more)

    monkeypatch.setattr(stage, "fit_linear", watched)
    run_all(moco, "finetune")
    assert len(fitted) == 1 and fitted[0][-3:] == [number % 5 for number in ORDER] and len(fitted[0]) == 13


def test_other_labels_than_those_that_were_checked_are_refused(moco: Moco, with_extra: Path) -> None:
    run_all(moco, "finetune")
    before = (with_extra / "models/finetuned/model_sub.pth").read_bytes()
    for changes in ({**EXTRA, "8.png": 3}, {**EXTRA, "17.png": 1}):
        write(with_extra, changes)
        assert_one_line_error(moco("finetune"), "models/classifier_extra", "labels.csv", "moco train_extra")
    write(with_extra, train_extra__labels=None)
    assert_one_line_error(moco("finetune"), "models/classifier_extra", "moco train_extra")
    assert (with_extra / "models/finetuned/model_sub.pth").read_bytes() == before
    write(with_extra, {**EXTRA, "8.png": 3})
    run_all(moco, "train_extra", "finetune")
    assert (with_extra / "models/finetuned/model_sub.pth").read_bytes() != before


def test_without_extra_labels_it_is_what_train_and_finetune_make(moco: Moco, project: Path) -> None:
    write_params(project)
    run_all(moco, "data", "pretrain", "train", "train_extra", "finetune")
    weights = project / "models/finetuned/model_sub.pth"
    before = weights.read_bytes()
    weights.unlink()
    write(project, train_extra__labels=None)
    run_all(moco, "finetune")
    assert weights.read_bytes() == before


def test_it_says_what_to_run_first(moco: Moco, project: Path) -> None:
    write(project)
    run_all(moco, "data", "pretrain", "train")
    assert_one_line_error(moco("finetune"), "models/classifier_extra/model_sub.pth", "moco train_extra")
    write(project, finetune__start="encoder")
    assert_one_line_error(moco("finetune"), "models/classifier_extra/model_sub.pth", "moco train_extra")
