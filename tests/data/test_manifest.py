"""The manifest as a file, and the checks of labels and classes that stand before it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from data_helpers import data_config, left_behind, silent
from PIL import Image

from conftest import write_dataset
from moco.data.manifest import Manifest, load_manifest
from moco.data.prepare import open_decoded, prepare
from moco.errors import UserError


def made(path: Path, scratch: Path, **changes: object) -> Manifest:
    return prepare(data_config(path, **changes), scratch, silent)


def test_manifest_survives_its_file(dataset: Path, tmp_path: Path) -> None:
    manifest = made(dataset, tmp_path / "scratch")
    path = tmp_path / "manifest.json"
    path.write_text(manifest.to_json())
    loaded = load_manifest(path)
    assert loaded == manifest
    assert loaded.digest == manifest.digest == json.loads(path.read_text())["digest"]
    assert loaded.classes == ["0", "1", "2", "3", "4"]
    assert [split.count for split in loaded.splits.values()] == [40, 20, 10]
    assert loaded.splits["train"].per_class == [4] * 5
    assert loaded.splits["unlabeled"].labels is None


def test_the_same_content_elsewhere_has_the_same_digest(dataset: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(dataset, tmp_path / "copy"))
    assert made(copy, tmp_path / "a").digest == made(dataset, tmp_path / "b").digest


EDITS = {
    "a count": ('"count": 40', '"count": 41'),
    "a class": ('"4"', '"four"'),
    "the size": ('"height": 32', '"height": 64'),
    "a label digest": ('"labels": "', '"labels": "0'),
}


@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_manifest_is_refused(dataset: Path, tmp_path: Path, edit: str) -> None:
    text = made(dataset, tmp_path / "scratch").to_json()
    old, new = EDITS[edit]
    assert old in text
    (tmp_path / "manifest.json").write_text(text.replace(old, new, 1))
    with pytest.raises(UserError, match=r"manifest\.json: digest and content disagree; run `moco data` again"):
        load_manifest(tmp_path / "manifest.json")


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"format": 1, "digest": "x", "splits": {}}', "\udcff"])
def test_another_file_is_no_manifest(tmp_path: Path, text: str) -> None:
    path = tmp_path / "manifest.json"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError, match=r"manifest\.json: not a manifest of this version; run `moco data` again"):
        load_manifest(path)


def test_a_missing_manifest_says_what_makes_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"manifest\.json: not found; run `moco data`"):
        load_manifest(tmp_path / "manifest.json")


def test_images_of_val_that_stand_in_train_are_counted_and_warned_about(dataset: Path, tmp_path: Path) -> None:
    for of_val, of_train in ((1, 5), (2, 5), (7, 0)):
        with Image.open(dataset / "train" / f"{of_train}.png") as image:
            image.save(dataset / "val" / f"{of_val}.png", compress_level=0)
    said: list[str] = []
    manifest = prepare(data_config(dataset), tmp_path, said.append)
    assert manifest.duplicates_train_val == 3  # of val
    assert said[-1].startswith("warning: 3 image(s) of val also stand in train: val/1.png = train/5.png, ")


def test_without_duplicates_nothing_is_warned_about(dataset: Path, tmp_path: Path) -> None:
    said: list[str] = []
    assert prepare(data_config(dataset), tmp_path, said.append).duplicates_train_val == 0
    assert not [line for line in said if "warning" in line]


def test_a_part_of_the_labels_is_the_same_part_each_time(dataset: Path, tmp_path: Path) -> None:
    whole = made(dataset, tmp_path / "whole")
    config = data_config(dataset, labelled=8, classes=5)
    first, again = prepare(config, tmp_path / "a", silent), prepare(config, tmp_path / "b", silent)
    assert first == again
    assert first.splits["train"].count == 8
    assert first.splits["unlabeled"] == whole.splits["unlabeled"]
    assert first.splits["val"] == whole.splits["val"]
    splits = open_decoded(config, first, tmp_path / "a", silent)
    files = [np.asarray(Image.open(dataset / "train" / f"{i}.png")) for i in range(20)]
    rows = [next(i for i, file in enumerate(files) if np.array_equal(file, image)) for image in splits["train"].images]
    assert len(set(rows)) == 8
    assert rows == sorted(rows)
    assert rows != list(range(8)), "a choice, not the beginning"
    assert splits["train"].labels.tolist() == [row % 5 for row in rows]


@pytest.mark.fault("few-labels")
def test_a_part_of_the_labels_has_every_class_in_its_share(tmp_path: Path) -> None:
    """`data.labelled: 800` once left 194 of 800 classes without a label."""
    root = write_dataset(tmp_path / "dataset", train=120, classes=30)
    labels = torch.arange(120) % 30
    labels[:60] = labels[60:] % 2  # two classes have 34 each, the others some two
    labels[60:] = torch.arange(60) % 30
    torch.save(labels, root / "train_label_tensor.pt")
    said: list[str] = []
    for count in (30, 60):
        config = data_config(root, labelled=count)
        per_class = prepare(config, tmp_path / "scratch", said.append).splits["train"].per_class or []
        assert sum(per_class) == count and min(per_class) == 1
        assert len(per_class) == 30
    assert per_class[0] in (16, 17) and per_class[1] in (16, 17), "half of the 32 to 34 that there are"
    assert not [line for line in said if "without one" in line]
    prepare(data_config(root, labelled=20), tmp_path / "scratch", said.append)
    assert [line for line in said if "10 of 30 classes" in line]


def test_more_labels_than_there_are_is_refused(dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.labelled: 21 wanted, train has 20 images"):
        made(dataset, tmp_path, labelled=21)


@pytest.mark.parametrize(
    ("split", "label", "declared", "words"),
    [
        ("train", 5, 5, r"train: 1 label\(s\) out of range, first 5 of train/7\.png; 5 classes are expected: 0 to 4"),
        ("train", -1, None, r"train: 1 label\(s\) out of range, first -1 of train/7\.png; 5 classes are expected"),
        ("val", 5, None, r"val: 1 label\(s\) out of range, first 5 of val/7\.png; 5 classes are expected"),
        ("val", -3, 5, r"val: 1 label\(s\) out of range, first -3 of val/7\.png"),
    ],
)
def test_label_out_of_range_is_named_with_its_image(
    dataset: Path, tmp_path: Path, split: str, label: int, declared: int | None, words: str
) -> None:
    path = dataset / f"{split}_label_tensor.pt"
    labels = torch.load(path)
    labels[7] = label
    torch.save(labels, path)
    with pytest.raises(UserError, match=words):
        made(dataset, tmp_path, classes=declared)
    assert left_behind(tmp_path) == []


def test_a_class_without_images_needs_the_number_of_classes_declared(dataset: Path, tmp_path: Path) -> None:
    """One wrong label, 800, would else make 801 classes of it."""
    path = dataset / "train_label_tensor.pt"
    labels = torch.load(path)
    labels[7] = 800
    torch.save(labels, path)
    with pytest.raises(UserError, match=r"train: 795 of 801 .*\(5, 6, 7, .* and 785 more\).*data\.classes"):
        made(dataset, tmp_path)
    manifest = made(dataset, tmp_path, classes=801)
    assert len(manifest.classes) == 801
    assert sum(manifest.splits["train"].per_class or []) == 20


def test_named_classes_and_declared_number_must_agree(dataset: Path, tmp_path: Path) -> None:
    (dataset / "classes.txt").write_text("a\nb\nc\nd\ne\n")
    assert made(dataset, tmp_path).classes == ["a", "b", "c", "d", "e"]
    with pytest.raises(UserError, match=r"classes\.txt names 5 classes, data\.classes says 6"):
        made(dataset, tmp_path, classes=6)


def test_content_decides_about_the_digest(tmp_path: Path) -> None:
    digests = [
        made(write_dataset(tmp_path / f"{seed}{count}", unlabeled=count, seed=seed), tmp_path / "scratch").digest
        for seed, count in ((0, 8), (1, 8), (0, 9))
    ]
    assert len(set(digests)) == 3
