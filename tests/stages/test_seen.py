"""A score says what a classifier does with images that it has not learned from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from stage_helpers import run_all
from test_joins import CLASSES, params, write_tree

from conftest import Moco, assert_one_line_error


@pytest.fixture
def trained(moco: Moco, project: Path) -> Moco:
    write_tree(project / "tree")
    params(project)
    run_all(moco, "data", "pretrain", "train")
    return moco


def exchange(project: Path) -> None:
    tree = project / "tree"
    for old, new in (("train", "other"), ("val", "train"), ("other", "val")):
        (tree / old).rename(tree / new)


@pytest.mark.fault("learned-from", 2)
def test_a_classifier_is_not_scored_on_images_that_it_learned_from(trained: Moco, project: Path) -> None:
    """After train and val were exchanged it once scored 100 %, with a mark in the report alone."""
    assert trained("eval").returncode == 0
    before = (project / "reports/eval/metrics.json").read_bytes()
    exchange(project)
    assert trained("data").returncode == 0
    done = trained("eval")
    assert_one_line_error(done, "12 of 12", "val/ant/0.png", "moco train", "[E-STAGE-SEEN]")
    assert (project / "reports/eval/metrics.json").read_bytes() == before
    run_all(trained, "pretrain", "train", "eval")


@pytest.mark.fault("learned-from")
def test_one_image_that_moved_into_val_is_enough(trained: Moco, project: Path) -> None:
    (project / "tree/train/bee/3.png").rename(project / "tree/val/bee/7.png")
    assert trained("data").returncode == 0
    assert_one_line_error(trained("eval"), "1 of 7", "val/bee/7.png", "[E-STAGE-SEEN]")
    shutil.copytree(project / "models/classifier", project / "copy")
    # Nobody here can train a classifier from elsewhere again: it is scored, and told and recorded.
    done = trained("eval", "--classifier", "copy", "--yes")
    assert done.returncode == 0 and "copy: learned from 1 of 7" in done.stderr and "val/bee/7.png" in done.stderr
    assert json.loads(next(project.glob("reports/eval-copy-*/provenance.json")).read_text())["learned_in_val"] == 1


def test_new_images_are_scored_and_the_report_says_that_none_was_seen(trained: Moco, project: Path) -> None:
    shutil.rmtree(project / "tree/val")
    write_tree(project / "new", seed=5)
    (project / "new/val").rename(project / "tree/val")
    run_all(trained, "data", "eval")
    made = json.loads((project / "reports/eval/provenance.json").read_text())
    assert made["learned_in_val"] == 0
    assert "it learned from 0 images of this val" in " ".join(trained("report").stdout.split())


@pytest.mark.fault("overlap")
def test_what_the_data_has_twice_is_told_and_scored(trained: Moco, project: Path) -> None:
    for name in CLASSES:
        shutil.copy(project / f"tree/train/{name}/0.png", project / f"tree/val/{name}/9.png")
    run_all(trained, "data", "train")
    assert "3 image(s) of val also stand in train" in trained("eval").stderr
    assert json.loads((project / "reports/eval/provenance.json").read_text())["learned_in_val"] == 3


@pytest.mark.fault("learned-from")
def test_a_classifier_of_before_is_scored_and_said_to_be_unchecked(trained: Moco, project: Path) -> None:
    (path,) = (project / "models/classifier").glob("model_best_*.pth")
    content = torch.load(path, weights_only=True)
    del content["learned"]
    torch.save(content, path)
    exchange(project)
    assert trained("data").returncode == 0
    done = trained("eval")
    assert done.returncode == 0 and "could not be checked" in done.stderr
    assert "learned_in_val" not in json.loads((project / "reports/eval/provenance.json").read_text())
    assert "it may have learned from images of this val" in " ".join(trained("report").stdout.split())


@pytest.mark.fault("learned-from")
def test_extra_labels_whose_images_moved_into_val_are_not_fine_tuned_on(trained: Moco, project: Path) -> None:
    """Labelled images make a good val, and the classifier with extra labels still has them."""
    write_tree(project / "more", seed=9)
    labels = project / "labels/more"
    shutil.copytree(project / "more/train", labels)
    params(project, train_extra__labels="labels/more", finetune__classifier="classifier_extra")
    run_all(trained, "train_extra", "finetune")
    shutil.copy(labels / "cat/1.png", project / "tree/val/cat/5.png")
    assert trained("data").returncode == 0
    for command, what in (
        (("finetune",), "extra_labels.pth"),
        (("eval", "--classifier", "models/finetuned"), "finetuned"),
    ):
        assert_one_line_error(trained(*command), what, "val/cat/5.png", "again", "[E-STAGE-SEEN]")
    run_all(trained, "train_extra", "finetune")


@pytest.mark.fault("learned-from")
def test_digests_of_another_size_say_nothing_and_that_is_said(trained: Moco, project: Path) -> None:
    params(project, data__resize=8)
    run_all(trained, "data", "pretrain", "train")
    params(project, data__resize=12)
    exchange(project)
    assert trained("data").returncode == 0
    done = trained("eval")
    assert done.returncode == 0 and "another size or decoding" in done.stderr


@pytest.mark.fault("learned-from", 6)
@pytest.mark.parametrize(
    "learned",
    [[], "x", None, {"digests": torch.zeros(3, 16)}, {"digests": torch.zeros(3, 5, dtype=torch.uint8)},
     {"digests": torch.zeros(3, 16, dtype=torch.bfloat16)}],
)  # fmt: skip
def test_what_a_stranger_says_that_it_learned_is_not_believed(trained: Moco, project: Path, learned: object) -> None:
    """None of these can be compared, so nothing was seen to be unseen."""
    (path,) = (project / "models/classifier").glob("model_best_*.pth")
    content = torch.load(path, weights_only=True)
    content["learned"] = learned if not isinstance(learned, dict) else {**content["learned"], **learned}
    torch.save(content, path)
    done = trained("eval")
    assert done.returncode == 0 and "could not be checked" in done.stderr
    assert "learned_in_val" not in json.loads((project / "reports/eval/provenance.json").read_text())
