"""Folders and class names of a class tree: what would be lost, mixed up or scored for nothing is refused or told."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from data_helpers import data_config, silent
from PIL import Image

from moco.data.class_tree import class_tree
from moco.data.prepare import prepare
from moco.errors import UserError

NFC, NFD = "caf\u00e9", "cafe\u0301"


def put(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)).save(path)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Two classes, two images each in train, one in val, three in the pool."""
    root = tmp_path / "tree"
    for number, name in enumerate(("ant", "bee")):
        put(root / f"train/{name}/1.png", number)
        put(root / f"train/{name}/2.png", 10 + number)
        put(root / f"val/{name}/1.png", 20 + number)
    for number in range(3):
        put(root / f"unlabeled/{number}.png", 30 + number)
    return root


def refused(tree: Path, code: str, *words: str) -> None:
    with pytest.raises(UserError) as caught:
        class_tree(tree, silent)
    assert caught.value.code == code
    assert len(str(caught.value)) <= 300
    for word in words:
        assert word in str(caught.value)


@pytest.mark.fault("data-layout")
def test_the_pool_is_found_by_both_spellings(tree: Path) -> None:
    (tree / "unlabeled").rename(tree / "unlabelled")
    found = class_tree(tree, silent)
    pool = found.splits["unlabeled"]
    assert [Path(path).name for path in pool.paths or []] == ["0.png", "1.png", "2.png"]
    assert pool.image_name(1) == "unlabeled/1.png"
    put(tree / "unlabeled/4.png", 50)
    refused(tree, "E-DATA-TWO-POOLS", "unlabeled/", "unlabelled/")


@pytest.mark.fault("data-layout")
@pytest.mark.parametrize(("name", "hint"), [("unlabled", "unlabeled"), ("Train", "train"), ("test", ""), ("extra", "")])
def test_a_folder_beside_the_known_ones_is_named_with_the_nearest(tree: Path, name: str, hint: str) -> None:
    put(tree / name / "1.png", 60)
    refused(tree, "E-DATA-FOLDER", f"{name}/", f"did you mean '{hint}'" if hint else f"{name}/; it has")


def test_files_hidden_folders_and_those_of_systems_are_no_mistake(tree: Path) -> None:
    for name in (".git", "lost+found"):
        (tree / name).mkdir()
    (tree / "README.txt").touch()
    assert class_tree(tree, silent).classes == ["ant", "bee"]


@pytest.mark.fault("class-names")
@pytest.mark.parametrize("name", [" cat", "cat ", "ca\u200bt", "ca\nt"])
def test_names_that_no_label_would_match_are_refused(tree: Path, name: str) -> None:
    put(tree / "train" / name / "1.png", 70)
    refused(tree, "E-DATA-CLASS-NAME", ascii(name))


@pytest.mark.fault("class-names")
def test_two_forms_of_one_name_are_one_class_or_refused(tree: Path) -> None:
    for split, form in (("train", NFD), ("val", NFC)):  # packed on a Mac, checked on Linux
        put(tree / split / form / "1.png", 80)
    assert class_tree(tree, silent).classes == ["ant", "bee", NFC]
    put(tree / "train" / NFC / "2.png", 81)
    refused(tree, "E-DATA-CLASS-FORMS", ascii(NFC), ascii(NFD))


@pytest.mark.fault("class-names")
def test_classes_that_differ_in_case_alone_are_told(tree: Path) -> None:
    put(tree / "train/Ant/1.png", 90)
    said: list[str] = []
    assert len(class_tree(tree, said.append).classes or []) == 3
    assert [line for line in said if "case" in line and "'Ant' and 'ant'" in line]


@pytest.mark.fault("class-names")
@pytest.mark.parametrize(("name", "told"), [("\uff42ee", "form of letters"), ("b\u0435e", "several alphabets")])
def test_classes_that_look_alike_are_told(tree: Path, name: str, told: str) -> None:
    """A form of full width, and a Cyrillic letter."""
    put(tree / "train" / name / "1.png", 90)
    said: list[str] = []
    assert len(class_tree(tree, said.append).classes or []) == 3
    assert [line for line in said if told in line and ascii(name) in line]


@pytest.mark.fault("data-layout")
def test_a_missing_split_is_asked_about_where_another_is_near(tree: Path) -> None:
    (tree / "val").rename(tree / "Val")
    refused(tree, "E-DATA-LAYOUT", "val: not found", "did you mean 'Val'")


@pytest.mark.fault("data-layout")
def test_a_level_too_many_is_refused_or_told(tree: Path, tmp_path: Path) -> None:
    said: list[str] = []
    for split in ("train", "val"):
        shutil.move(tree / split, tree / "inner")
        (tree / "inner").rename(tree / "moved")
        (tree / split).mkdir()
        shutil.move(tree / "moved", tree / split / split)
    refused(tree, "E-DATA-NESTED", "train/train", "up by one level")
    deep = tmp_path / "deep"
    for split in ("train", "val"):
        for number, name in enumerate(("insects/ant", "insects/bee", "birds/owl", "birds/jay")):
            put(deep / split / name / "1.png", number)
    assert class_tree(deep, said.append).classes == ["birds", "insects"]
    assert [line for line in said if "one level too many" in line]


@pytest.mark.fault("data-layout")
def test_the_folder_above_is_told_where_the_tree_is(tree: Path) -> None:
    refused(tree.parent, "E-DATA-LAYOUT", f"set data.path to {tree}")


def test_a_class_may_be_called_train(tree: Path) -> None:
    for split in ("train", "val"):
        put(tree / split / "train/1.png", 40)
    assert class_tree(tree, silent).classes == ["ant", "bee", "train"]


@pytest.mark.fault("data-layout")
def test_one_class_only_is_refused(tree: Path, dataset: Path, tmp_path: Path) -> None:
    for split in ("train", "val"):
        shutil.rmtree(tree / split / "bee")
    refused(tree, "E-DATA-ONE-CLASS", "ant")
    for split, count in (("train", 20), ("val", 10)):
        torch.save(torch.zeros(count, dtype=torch.int64), dataset / f"{split}_label_tensor.pt")
    for declared in (None, 5):
        with pytest.raises(UserError) as caught:
            prepare(data_config(dataset, classes=declared), tmp_path / "scratch", silent)
        assert caught.value.code == "E-DATA-ONE-CLASS"
