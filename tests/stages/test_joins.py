"""Whatever joins an encoder or a classifier to data compares what they must share."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from stage_helpers import run_all

from conftest import Moco, assert_one_line_error, write_dataset, write_params

CLASSES = ("ant", "bee", "cat")


def write_tree(root: Path, size: int = 16, seed: int = 0) -> None:
    rng = np.random.default_rng(seed)
    for split, count in (("train", 4), ("val", 2)):
        for number, name in enumerate(CLASSES):
            for i in range(count):
                path = root / split / name / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(rng.integers(60 * number, 60 * number + 90, (size, size, 3)).astype(np.uint8)).save(
                    path
                )


@pytest.fixture
def trained(moco: Moco, project: Path) -> Moco:
    """A class tree whose classifier is trained, without stage `train_extra` so far."""
    write_tree(project / "tree")
    params(project)
    run_all(moco, "data", "pretrain", "train")
    return moco


def params(project: Path, **changes: object) -> None:
    write_params(
        project,
        **{"data__source": "classes", "data__path": "tree", "data__classes": None, "pretrain__epochs": 1, **changes},
    )


def rename(project: Path, old: str, new: str) -> None:
    for split in ("train", "val"):
        (project / "tree" / split / old).rename(project / "tree" / split / new)


@pytest.mark.fault("other-data", 6)
def test_a_renamed_class_is_refused_by_all_that_use_the_classifier(trained: Moco, project: Path) -> None:
    """It once scored 0 % instead of 100 %, with exit code 0: `ant` had become the last of the classes."""
    rename(project, "ant", "wasp")
    assert trained("data").returncode == 0
    for command in (("eval",), ("finetune",), ("train_extra",), ("request", "--strategy", "margin")):
        code = "E-STAGE-OTHER-CLASSIFIER" if command[0] == "request" else "E-STAGE-CLASSES"
        assert_one_line_error(trained(*command), "models/classifier", "moco train", f"[{code}]")
    said = trained("eval").stderr
    assert "first 0 is 'ant' there and 'bee' in the data" in said
    told = trained("request").stderr
    assert "models/classifier is not asked" in told, "where it is not needed"
    rename(project, "wasp", "ant")
    run_all(trained, "data", "eval", "finetune", "train_extra")


@pytest.mark.fault("other-data")
def test_extra_labels_keep_to_their_classes_when_training_starts_at_the_encoder(trained: Moco, project: Path) -> None:
    """They are numbers: after a class was renamed they would be other classes."""
    run_all(trained, "train_extra")
    params(project, finetune__classifier="classifier_extra", finetune__start="encoder")
    rename(project, "ant", "wasp")
    assert trained("data").returncode == 0
    assert_one_line_error(trained("finetune"), "models/classifier_extra", "moco train_extra", "[E-STAGE-CLASSES]")


@pytest.mark.fault("other-data", 3)
def test_images_of_another_size_are_refused_and_other_ones_told(trained: Moco, project: Path) -> None:
    shutil.rmtree(project / "tree")
    write_tree(project / "tree", seed=1)
    assert trained("data").returncode == 0
    for command in ("eval", "train"):
        done = trained(command)
        assert done.returncode == 0 and "made with other data than the manifest describes" in done.stderr
    shutil.rmtree(project / "tree")
    write_tree(project / "tree", size=24)
    assert trained("data").returncode == 0
    for command, made in (("train", "encoder.pth"), ("eval", "classifier"), ("finetune", "classifier")):
        assert_one_line_error(trained(command), made, "16x16", "24x24", "[E-STAGE-IMAGE-SIZE]")


@pytest.mark.fault("other-data", 2)
def test_a_strangers_classifier_is_scored_with_a_warning_or_by_its_own_names(trained: Moco, project: Path) -> None:
    folder = project / "theirs"
    folder.mkdir()
    for name in ("submission.py", "model_sub.pth"):
        shutil.copy(project / "models/classifier" / name, folder)
    assert "does not say which classes" not in trained("eval", "--classifier", "theirs").stderr
    text = (folder / "submission.py").read_text()
    (folder / "submission.py").write_text(
        text.replace("class_names = ['ant', 'bee', 'cat']", "class_names = ['bee', 'ant', 'cat']")
    )
    done = trained("eval", "--classifier", "theirs", "--yes")
    assert_one_line_error(done, "in another order", "[E-STAGE-CLASSES]")
    (folder / "submission.py").write_text(text.replace("class_names = ", "other = "))
    done = trained("eval", "--classifier", "theirs", "--yes")
    assert done.returncode == 0 and "does not say which classes it knows" in done.stderr


def test_a_brighter_pool_is_told_with_its_numbers(moco: Moco, project: Path) -> None:
    run_all(moco, "data", "pretrain")
    shutil.rmtree(project / "dataset")
    write_dataset(project / "dataset", seed=3)
    for path in (project / "dataset").glob("*/*.png"):
        with Image.open(path) as image:
            bright = np.minimum(np.asarray(image).astype(int) + 90, 255).astype(np.uint8)
        Image.fromarray(bright).save(path)
    assert moco("data").returncode == 0
    said = moco("train").stderr
    mean = json.loads((project / "models/manifest.json").read_text())["mean"]
    assert "mean of channels" in said and f"{mean[0]:.2f}" in said
