"""Images that stand in two splits or two classes: told, taken out of the pool, and names stay those of the source."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from data_helpers import data_config, generated_config, silent
from PIL import Image

from moco.data.manifest import Manifest, load_manifest
from moco.data.prepare import open_decoded, prepare
from moco.errors import UserError
from moco.labels.extra_labels import IN_VAL, USED, read_extra_labels
from moco.labels.pool_names import pool_names
from moco.training.features import apart


def copied(source: Path, target: Path) -> None:
    """The same pixels in another file."""
    with Image.open(source) as image:
        image.save(target, compress_level=0)


@pytest.fixture
def mixed(dataset: Path) -> Path:
    """Images 3, 17 and 39 of the pool are those of val 2, 5 and 2."""
    for of_pool, of_val in ((3, 2), (17, 5), (39, 2)):
        copied(dataset / f"val/{of_val}.png", dataset / f"unlabeled/{of_pool}.png")
    return dataset


def read(dataset: Path, scratch: Path, **changes: object) -> tuple[Manifest, list[str]]:
    said: list[str] = []
    return prepare(data_config(dataset, **changes), scratch, said.append), said


@pytest.mark.fault("overlap")
def test_images_of_val_are_taken_out_of_the_pool(mixed: Path, tmp_path: Path) -> None:
    manifest, _ = read(mixed, tmp_path)
    assert manifest.splits["unlabeled"].count == 37 and manifest.val_in_pool == 3
    assert manifest.excluded == [[3, 2], [17, 5], [39, 2]]
    assert any("3 image(s)" in note and "taken out" in note for note in manifest.notes())
    splits = open_decoded(data_config(mixed), manifest, tmp_path, silent)
    assert not set(map(bytes, splits["unlabeled"].digests)) & set(map(bytes, splits["val"].digests))
    for row, number in enumerate(manifest.pool_numbers()):
        with Image.open(mixed / f"unlabeled/{number}.png") as image:
            np.testing.assert_array_equal(splits["unlabeled"].images[row], np.asarray(image))
    path = tmp_path / "manifest.json"
    path.write_text(manifest.to_json())
    assert load_manifest(path) == manifest


@pytest.mark.fault("overlap")
def test_they_may_stay_and_are_told(mixed: Path, tmp_path: Path) -> None:
    manifest, _ = read(mixed, tmp_path, exclude_val=False)
    assert manifest.splits["unlabeled"].count == 40 and manifest.excluded == [] and manifest.val_in_pool == 3
    assert any("3 image(s)" in note and "pretraining sees them" in note for note in manifest.notes())


def test_names_and_answers_are_those_of_the_source(mixed: Path, tmp_path: Path) -> None:
    """Also beside an image that cannot be read; an answer for an image of val is left out, as always."""
    (mixed / "unlabeled/5.png").write_text("no image")
    config = data_config(mixed, unreadable=1)
    manifest = prepare(config, tmp_path, silent)
    assert manifest.left_out == [5] and [number for number, _ in manifest.excluded] == [3, 17, 39]
    splits = open_decoded(config, manifest, tmp_path, silent)
    names = pool_names(np.array([0, 3, 4, 35]), config, manifest, splits["unlabeled"], silent)
    assert names == ["0.png", "4.png", "6.png", "38.png"]
    (tmp_path / "reply.csv").write_text("image,label\n4.png,1\n17.png,2\n38.png,3\n39.png,\n")
    found = read_extra_labels(tmp_path / "reply.csv", config, manifest, splits, silent)
    assert [answer.status for answer in found.answers][:3] == [USED, IN_VAL, USED]
    for image, number in zip(found.images, (4, 38), strict=True):
        with Image.open(mixed / f"unlabeled/{number}.png") as picture:
            np.testing.assert_array_equal(image, np.asarray(picture))
    (tmp_path / "reply.csv").write_text("image,label\n40.png,1\n")
    with pytest.raises(UserError, match=r"0\.png to 39\.png"):
        read_extra_labels(tmp_path / "reply.csv", config, manifest, splits, silent)


def test_names_of_a_class_tree_stay(tmp_path: Path) -> None:
    root, rng = tmp_path / "tree", np.random.default_rng(0)
    for name in ("train/a/1", "train/b/1", "val/a/1", "val/b/1", "unlabeled/x", "unlabeled/y", "unlabeled/z"):
        path = root / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(path)
    copied(root / "val/b/1.png", root / "unlabeled/y.png")
    config = data_config(root, "classes")
    manifest = prepare(config, tmp_path, silent)
    splits = open_decoded(config, manifest, tmp_path, silent)
    assert pool_names(np.arange(2), config, manifest, splits["unlabeled"], silent) == ["x.png", "z.png"]
    (tmp_path / "reply.csv").write_text("image,label\ny.png,a\nz.png,b\n")
    found = read_extra_labels(tmp_path / "reply.csv", config, manifest, splits, silent)
    assert [answer.status for answer in found.answers] == [IN_VAL, USED]


@pytest.mark.fault("overlap")
def test_a_pool_that_is_train_is_said_and_loses_what_val_has(tmp_path: Path) -> None:
    root, rng = tmp_path / "tree", np.random.default_rng(0)
    for name in ("train/a/1", "train/a/2", "train/b/1", "val/a/1", "val/b/1"):
        path = root / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(path)
    copied(root / "val/a/1.png", root / "train/a/2.png")
    manifest = prepare(data_config(root, "classes"), tmp_path, silent)
    assert manifest.splits["unlabeled"].count == 2 and manifest.splits["train"].count == 3
    assert manifest.duplicates_train_val == 1
    assert any("pool is train" in note for note in manifest.notes())
    assert any("val also stand in train" in note for note in manifest.notes())


@pytest.mark.fault("overlap")
def test_a_pool_of_val_alone_is_refused(dataset: Path, tmp_path: Path) -> None:
    shutil.rmtree(dataset / "unlabeled")
    shutil.copytree(dataset / "val", dataset / "unlabeled")
    with pytest.raises(UserError) as caught:
        read(dataset, tmp_path)
    assert caught.value.code == "E-DATA-POOL-IN-VAL"


@pytest.mark.fault("overlap")
def test_one_image_in_two_classes_is_named(dataset: Path, tmp_path: Path) -> None:
    (dataset / "classes.txt").write_text("ant\nbee\ncat\ndog\nelk\n")
    copied(dataset / "train/2.png", dataset / "train/8.png")  # cat and dog
    copied(dataset / "train/1.png", dataset / "train/6.png")  # bee, both
    manifest, said = read(dataset, tmp_path)
    assert manifest.classes_twice == 1
    assert any("train/8.png (dog) = train/2.png (cat)" in line for line in said)
    assert any("two classes" in note for note in manifest.notes())


@pytest.mark.fault("overlap")
def test_copies_within_a_split_and_classes_without_val_are_said(dataset: Path, tmp_path: Path) -> None:
    copied(dataset / "train/0.png", dataset / "train/5.png")  # of one class
    copied(dataset / "val/0.png", dataset / "val/1.png")
    labels = torch.arange(10) % 5
    labels[labels == 3] = 4
    torch.save(labels, dataset / "val_label_tensor.pt")
    manifest, _ = read(dataset, tmp_path)
    assert manifest.repeated == {"train": 1, "val": 1} and manifest.classes_without_val() == ["3"]
    assert len([note for note in manifest.notes() if "repeat another one" in note]) == 2
    assert any("no image in val" in note and note.endswith(": 3") for note in manifest.notes())


@pytest.mark.fault("overlap")
def test_copies_of_held_out_images_are_not_learned_from() -> None:
    digests = np.array([[1], [2], [1], [3]], np.uint8)
    assert apart(np.array([0, 1, 3]), np.array([2]), digests).tolist() == [1, 3]


def test_drawn_images_have_none(tmp_path: Path) -> None:
    config = data_config(tmp_path / "d", "generated", generated=generated_config(unlabeled=240, train_per_class=20))
    manifest = prepare(config, tmp_path, silent)
    assert (manifest.val_in_pool, manifest.duplicates_train_val, manifest.classes_twice) == (0, 0, 0)
    assert manifest.notes() == [] and manifest.excluded == []
    assert torch.equal(torch.from_numpy(manifest.pool_numbers()), torch.arange(240))
