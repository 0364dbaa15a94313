"""Extra labels: joined to images by name, checked before anything is trained, measured on the same held-out images."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from stage_helpers import outside_score, run_all

from conftest import Moco, assert_one_line_error, write_params
from moco.training import linear

EXTRA = {"17.png": 2, "3": 3, "39.png": 4, "8": 3, "21": 1}  # the right labels: the number modulo 5


def write_labels(project: Path, lines: list[str], header: str = "image,label") -> None:
    (project / "labels.csv").write_text("\n".join([header, *lines]) + "\n")


@pytest.fixture
def pretrained(moco: Moco, project: Path) -> Path:
    write_params(project, train_extra__labels="labels.csv")
    write_labels(project, [f"{name},{label}" for name, label in EXTRA.items()])
    run_all(moco, "data", "pretrain")
    return project


def metrics(project: Path, stage: str = "train_extra") -> dict[str, Any]:
    found: dict[str, Any] = json.loads((project / f"reports/{stage}/metrics.json").read_text())
    return found


def result(project: Path) -> bytes:
    return (project / "models/classifier_extra/model_sub.pth").read_bytes()


def test_it_leaves_a_classifier_beside_that_of_train(moco: Moco, pretrained: Path) -> None:
    run_all(moco, "train")
    before = (pretrained / "models/classifier/model_sub.pth").read_bytes()
    done = moco("train_extra")
    assert done.returncode == 0, done.stderr
    assert "5 labels added to 20: 0 to 2 a class, with train's 4 to 6" in done.stderr
    assert (pretrained / "models/classifier/model_sub.pth").read_bytes() == before != result(pretrained)
    names = [path.name for path in (pretrained / "models/classifier_extra").iterdir()]
    assert len(names) == 4 and {"model_sub.pth", "submission.py", "extra_labels.pth"} < set(names)
    found = metrics(pretrained)
    assert found["extra_labels"] == 5
    right, total = outside_score(pretrained, batch=4, folder="models/classifier_extra")
    assert found["val_accuracy"] == pytest.approx(right / total)
    done = moco("eval", "--classifier", "models/classifier_extra")
    assert done.returncode == 0 and "other settings" not in done.stderr
    assert metrics(pretrained, "eval-classifier_extra")["val_accuracy"] == pytest.approx(right / total)
    run_all(moco, "eval")
    assert "5 extra labels" in moco("report").stdout


def test_every_label_meets_its_image(moco: Moco, pretrained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault 10: what is fitted are the features of exactly these images with exactly these labels."""
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    fit = linear.fit_linear

    def watched(views: torch.Tensor, labels: torch.Tensor, *rest: Any, **more: Any) -> Any:
        seen.append((views, labels))
        return fit(views, labels, *rest, **more)

    monkeypatch.setattr("moco.stages.train.fit_linear", watched)
    run_all(moco, "train_extra")
    views, labels = seen[-1]  # the refit, on all labels
    order = sorted(int(name.removesuffix(".png")) for name in EXTRA)
    assert labels[20:].tolist() == [number % 5 for number in order]
    # The same pictures as a train set of their own give the same features in the same order.
    train = pretrained / "dataset/train"
    shutil.rmtree(train)
    train.mkdir()
    for position, number in enumerate(order * 2):
        shutil.copy(pretrained / f"dataset/unlabeled/{number}.png", train / f"{position}.png")
    torch.save(torch.tensor([number % 5 for number in order * 2]), pretrained / "dataset/train_label_tensor.pt")
    run_all(moco, "data", "train")
    assert torch.allclose(seen[-1][0][0, :5], views[0, 20:], atol=1e-5)


def test_the_order_in_the_file_and_the_way_to_name_a_thing_change_nothing(moco: Moco, pretrained: Path) -> None:
    run_all(moco, "train_extra")
    first = result(pretrained)
    lines = [f"{name.removesuffix('.png')}.png, {label}" for name, label in EXTRA.items()]
    write_labels(pretrained, [lines[i] for i in np.random.default_rng(1).permutation(len(lines))] + [""])
    (pretrained / "models/classifier_extra/model_sub.pth").unlink()
    run_all(moco, "train_extra")
    assert result(pretrained) == first
    write_labels(pretrained, [*lines[:-1], "21,2"])
    run_all(moco, "train_extra")
    assert result(pretrained) != first, "a label counts"


def test_the_epoch_is_chosen_on_the_images_that_train_holds_out(
    moco: Moco, pretrained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[tuple[torch.Tensor, torch.Tensor]] = []
    fit = linear.fit_linear

    def watched(views: Any, labels: Any, out: torch.Tensor, out_labels: torch.Tensor, *rest: Any, **more: Any) -> Any:
        if len(out):
            held.append((out, out_labels))
        return fit(views, labels, out, out_labels, *rest, **more)

    monkeypatch.setattr("moco.stages.train.fit_linear", watched)
    run_all(moco, "train", "train_extra")
    assert torch.equal(held[0][0], held[1][0]) and torch.equal(held[0][1], held[1][1])


def test_an_image_that_is_in_the_pool_twice_has_one_label(moco: Moco, project: Path) -> None:
    write_params(project, train_extra__labels="labels.csv")
    shutil.copy(project / "dataset/unlabeled/17.png", project / "dataset/unlabeled/18.png")
    run_all(moco, "data", "pretrain")
    write_labels(project, ["17.png,2", "18.png,3"])
    assert_one_line_error(moco("train_extra"), "'18.png' has the label", "labels.csv:2")
    write_labels(project, ["17.png,2", "18.png,2"])
    done = moco("train_extra")
    assert done.returncode == 0 and "1 labels added" in done.stderr, done.stderr


def test_labels_of_val_change_nothing_but_the_report(moco: Moco, pretrained: Path) -> None:
    run_all(moco, "train_extra")
    first = result(pretrained)
    labels = torch.load(pretrained / "dataset/val_label_tensor.pt")
    torch.save((labels + 1) % 5, pretrained / "dataset/val_label_tensor.pt")
    run_all(moco, "data", "train_extra")
    assert result(pretrained) == first


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (["17.png,2", "40.png,1"], ("labels.csv:3", "'40.png' is not in the unlabelled pool", "0.png to 39.png")),
        (["017.png,2"], ("labels.csv:2", "'017.png' is not in")),
        (["cat.png,2"], ("labels.csv:2", "'cat.png' is not in")),
        (["train/1.png,2"], ("labels.csv:2", "is not in")),
        (["17,5"], ("labels.csv:2", "label 5 is out of range", "0 to 4")),
        (["17,-1"], ("labels.csv:2", "label -1 is out of range")),
        (["17,two"], ("labels.csv:2", "'two' is no class")),
        (["17,2.5"], ("labels.csv:2", "'2.5' is no class")),
        (["17,"], ("labels.csv", "no label in it that could be used")),
        (["17,2", "3,1", "17.png,3"], ("labels.csv:4", "label 3 here and 2 in labels.csv:2")),
        (["17,2", "3"], ("labels.csv:3", "1 columns")),
        (["17,2,1"], ("labels.csv:2", "3 columns")),
        ([], ("labels.csv", "no label")),
        (['17,"2'], ("labels.csv", "cannot be read")),
    ],
)
def test_wrong_lines_are_refused_by_file_and_line(
    moco: Moco, pretrained: Path, lines: list[str], words: tuple[str, ...]
) -> None:
    write_labels(pretrained, lines)
    assert_one_line_error(moco("train_extra"), *words)
    assert not (pretrained / "runs/train_extra").exists(), "refused before training"


def test_wrong_header_file_and_setting(moco: Moco, pretrained: Path) -> None:
    write_labels(pretrained, ["17,2"], header="image,lable")
    assert_one_line_error(
        moco("train_extra"), "labels.csv:1", "no column 'label'", "'lable'", "image,label is expected"
    )
    (pretrained / "labels.csv").write_bytes(b"image,label\n\xff\x81,1\n")
    assert_one_line_error(moco("train_extra"), "labels.csv", "not a text in UTF-8", "[E-LABEL-FILE]")
    (pretrained / "labels.csv").write_text("")
    assert_one_line_error(moco("train_extra"), "labels.csv:1", "header")
    (pretrained / "labels.csv").unlink()
    assert_one_line_error(moco("train_extra"), "labels.csv: not found", "train_extra.labels")
    (pretrained / "empty").mkdir()
    write_params(pretrained, train_extra__labels="empty")
    assert_one_line_error(moco("train_extra"), "empty: no labels in it", "a folder per class")
    write_params(pretrained)
    assert_one_line_error(moco("train_extra"), "models/classifier: not found", "moco train", "train_extra.labels")


def test_labels_that_dvc_does_not_look_at_are_told(moco: Moco, pretrained: Path) -> None:
    assert "labels.csv lies outside labels/" in moco("train_extra").stderr
    (pretrained / "labels").mkdir()
    (pretrained / "labels.csv").rename(pretrained / "labels/mine.csv")
    write_params(pretrained, train_extra__labels="labels/mine.csv")
    assert "outside" not in moco("train_extra").stderr


def test_the_same_label_twice_is_told_and_used_once(moco: Moco, pretrained: Path) -> None:
    run_all(moco, "train_extra")
    first = result(pretrained)
    with (pretrained / "labels.csv").open("a") as file:
        file.write("17,2\n3.png,3\n")
    done = moco("train_extra")
    assert done.returncode == 0 and done.stderr.count("again") == 1
    assert "2 line(s) say again what stands before them, first labels.csv:7" in done.stderr
    assert result(pretrained) == first and metrics(pretrained)["extra_labels"] == 5


def test_images_that_stand_in_train_or_val_too(moco: Moco, pretrained: Path) -> None:
    """Known by their pixels: one of train adds nothing and may not say otherwise, one of val must not be trained on."""
    dataset = pretrained / "dataset"
    shutil.copy(dataset / "train/6.png", dataset / "unlabeled/8.png")
    shutil.copy(dataset / "val/4.png", dataset / "unlabeled/39.png")
    run_all(moco, "data", "pretrain")
    write_labels(pretrained, ["8,1", "39,4", "17,2"])
    done = moco("train_extra")
    assert done.returncode == 0 and metrics(pretrained)["extra_labels"] == 1
    assert "1 line(s) say again what train says, first labels.csv:2" in done.stderr
    assert "1 line(s) label an image that also stands in val" in done.stderr and "first labels.csv:3" in done.stderr
    write_labels(pretrained, ["17,2", "8,3"])
    assert_one_line_error(moco("train_extra"), "labels.csv:3", "'8' has the label 3 here and 1 in train")


def test_names_of_classes_are_labels(moco: Moco, pretrained: Path) -> None:
    (pretrained / "dataset/classes.txt").write_text("cat\ndog\nowl\nfox\n3D\n")
    run_all(moco, "data", "pretrain")
    write_labels(pretrained, ["17,owl", "3,fox", "39,3D", "8,3", "21,dog"])
    done = moco("train_extra")
    assert done.returncode == 0 and "1 label(s) are positions of classes, counted from 0: 0 is cat" in done.stderr
    by_name = result(pretrained)
    write_labels(pretrained, ["17,2", "3,3", "39,4", "8,fox", "21,dog"])
    run_all(moco, "train_extra")
    assert result(pretrained) == by_name
    write_labels(pretrained, ["17,dgo"])
    assert_one_line_error(moco("train_extra"), "labels.csv:2", "'dgo' is no class", "did you mean 'dog'")


def test_in_a_class_tree_images_are_named_by_their_paths(moco: Moco, project: Path) -> None:
    tree, flat = project / "tree", project / "dataset"
    for split, count in (("train", 20), ("val", 10)):
        for i in range(count):
            folder = tree / split / "abcde"[i % 5]
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(flat / split / f"{i}.png", folder / f"{i:02}.png")
    (tree / "unlabeled/deep").mkdir(parents=True)
    for i in range(40):
        shutil.copy(flat / f"unlabeled/{i}.png", tree / f"unlabeled/deep/image-{i:02}.png")
    params = {"data__source": "classes", "data__path": "tree", "train_extra__labels": "labels.csv"}
    write_params(project, **params)
    write_labels(project, ["deep/image-17.png,c", "deep/image-03.png,3"])
    run_all(moco, "data", "pretrain", "train_extra")
    first = result(project)
    (tree / "unlabeled/deep/image-00.png").rename(tree / "unlabeled/deep/zero.png")  # shifts every position
    assert_one_line_error(moco("train_extra"), "[E-DATA-CHANGED]")
    run_all(moco, "data", "train_extra")
    assert result(project) == first
    write_labels(project, ["deep/image-17.png,c", "image-17.png,c"])
    assert_one_line_error(moco("train_extra"), "labels.csv:3", "'image-17.png' is not in the unlabelled pool")
    Image.new("RGB", (32, 32)).save(tree / "unlabeled/new.png")
    write_labels(project, ["new.png,c"])
    assert_one_line_error(moco("train_extra"), "[E-DATA-CHANGED]")  # which the file's stamp tells


def test_the_curve_has_every_epoch(moco: Moco, pretrained: Path) -> None:
    run_all(moco, "train_extra")
    with (pretrained / "reports/train_extra/epochs.csv").open() as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["1", "2"]  # with 5 more labels, of 3


@pytest.mark.fault("linear-optimum")
def test_extra_labels_do_not_mean_more_steps(moco: Moco, pretrained: Path) -> None:
    """Else a part of what they gain is what training longer gains."""
    write_params(pretrained, train_extra__labels="labels.csv", train__epochs=40, train__batch_size=1)
    run_all(moco, "train", "train_extra")
    own = 20 - int(metrics(pretrained)["held_out_images"])
    steps = []
    for stage, images in (("train", own), ("train_extra", own + len(EXTRA))):
        with (pretrained / f"reports/{stage}/epochs.csv").open() as file:
            steps.append(len(list(csv.DictReader(file))) * images)
    assert steps[0] == 40 * own and abs(steps[1] - steps[0]) <= (own + len(EXTRA)) / 2
