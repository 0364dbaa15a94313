"""Images that cannot be read: refused, or so many of the pool left out as the user allows, and always told."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conftest import Moco, assert_one_line_error, write_params
from moco.data.manifest import load_manifest

pytestmark = pytest.mark.fault("bad-images")
BAD = (7, 20)


@pytest.fixture
def damaged(project: Path) -> Path:
    for number in BAD:
        path = project / f"dataset/unlabeled/{number}.png"
        path.write_bytes(path.read_bytes()[:200])
    return project


def test_by_default_they_are_refused_by_name(moco: Moco, damaged: Path) -> None:
    assert_one_line_error(moco("data"), "2 image(s) cannot be used: unlabeled/7.png (", "unlabeled/20.png (")


@pytest.mark.parametrize("split", ["train", "val"])
def test_those_with_labels_are_refused_whatever_is_allowed(moco: Moco, damaged: Path, split: str) -> None:
    write_params(damaged, data__unreadable=9)
    (damaged / f"dataset/{split}/3.png").write_bytes(b"")
    assert_one_line_error(moco("data"), f"1 image(s) cannot be used: {split}/3.png (not an image)")


def test_more_than_allowed_are_refused(moco: Moco, damaged: Path) -> None:
    write_params(damaged, data__unreadable=1)
    assert_one_line_error(moco("data"), "2 image(s) cannot be used")


def test_those_allowed_are_told_and_all_others_keep_their_names(moco: Moco, damaged: Path) -> None:
    write_params(
        damaged, data__unreadable=2, request__budget=38, request__strategy="random", train_extra__labels="a.csv"
    )
    done = moco("data")
    assert done.returncode == 0, done.stderr
    assert "warning: 2 image(s) cannot be used and are left out: unlabeled/7.png (" in done.stderr
    manifest = load_manifest(Path("models/manifest.json"))
    assert manifest.left_out == list(BAD) and manifest.splits["unlabeled"].count == 38
    for stage in ("pretrain", "train", "request"):
        done = moco(stage)
        assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader((damaged / "models/request/request.csv").read_text().splitlines()))
    assert {row["image"] for row in rows} == {f"{number}.png" for number in range(40) if number not in BAD}
    by_name = {row["image"]: row["content"] for row in rows}
    (damaged / "a.csv").write_text("image,label\n7.png,1\n")
    assert_one_line_error(moco("train_extra"), "'7.png' could not be read and was left out (data.unreadable)")
    lines = "".join(f"{name},{int(name[:-4]) % 5},{content}\n" for name, content in by_name.items())
    (damaged / "a.csv").write_text(f"image,label,content\n{lines}")
    done = moco("train_extra")
    assert done.returncode == 0 and "38 labels added" in done.stderr, done.stderr
    shutil.rmtree(damaged / "scratch")
    before = json.loads((damaged / "models/manifest.json").read_text())["digest"]
    done = moco("eval")
    assert done.returncode == 0 and "left out" in done.stderr, "another node builds the same cache"
    assert load_manifest(Path("models/manifest.json")).digest == before


def write_kinds(project: Path) -> None:
    """Write a class tree of four images a class, and parameters that read it."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in ("ant", "bee"):
            folder = project / "kinds" / split / name
            folder.mkdir(parents=True)
            for number in range(4):
                Image.fromarray(rng.integers(0, 255, (8, 8, 3), np.uint8)).save(folder / f"{number}.png")
    write_params(project, data__source="classes", data__path="kinds", data__classes=None)


@pytest.mark.fault("bad-images", 8)
@pytest.mark.parametrize("suffix", [".heic", ".hif", ".jxl", ".jp2", ".dng", ".CR2", ".psd", ".svg"])
def test_images_of_kinds_that_are_not_read_are_an_error_in_train(project: Path, moco: Moco, suffix: str) -> None:
    """40 of 100 were once left out with a warning. What is no image by its name is told."""
    write_kinds(project)
    (project / "kinds/train/ant/notes.txt").write_text("by hand")
    done = moco("data")
    assert done.returncode == 0 and "notes.txt" in done.stderr
    for number in range(3):
        (project / f"kinds/val/bee/photo{number}{suffix}").write_bytes(b"\0\0\0\x18 no such image" * 9)
    if suffix in (".dng", ".CR2"):  # which begin like TIFF and hold a small preview, as cameras write them
        Image.new("RGB", (8, 8)).save(project / f"kinds/val/bee/photo0{suffix}", "tiff")
    done = moco("data")
    assert_one_line_error(done, f"val/bee/photo0{suffix}", "[E-DATA-UNREADABLE]")


@pytest.mark.fault("bad-images")
def test_a_cameras_raw_beside_its_image_is_left_out_and_told(project: Path, moco: Moco) -> None:
    write_kinds(project)
    (project / "kinds/train/ant/0.CR2").write_bytes(b"II*\0")
    (project / "kinds/train/bee/1.hdr").write_text("ENVI")
    done = moco("data")
    assert done.returncode == 0 and "0.CR2" in done.stderr and "1.hdr" in done.stderr
    assert load_manifest(Path("models/manifest.json")).splits["train"].count == 8
