"""Files from strangers: code in weights does not run, links and odd names lead nowhere."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from fault_helpers import must
from PIL import Image

from conftest import Moco, Payload, assert_one_line_error, write_dataset, write_params
from moco.files import sha256

PLACES = [
    ("data", "dataset/train_label_tensor.pt", ()),
    ("data", "dataset/val_label_tensor.pt", ()),
    ("pretrain", "runs/pretrain/*/checkpoint_002.pth", ()),
    ("pretrain", "somewhere.pth", ("--resume", "somewhere.pth")),
    ("train", "models/encoder.pth", ()),
    ("train_extra", "labels/others/train_label_tensor.pt", ()),
    ("request", "models/encoder.pth", ()),
    ("request", "models/classifier/model_sub.pth", ()),
    ("finetune", "models/classifier/model_sub.pth", ()),
    ("finetune", "runs/finetune/*/checkpoint_003.pth", ()),
    ("eval", "models/classifier/model_sub.pth", ()),
    ("eval", "models/classifier/model_best_*.pth", ()),
]


SETTINGS = {"request__strategy": "margin", "finetune__epochs": 3, "checkpoint__every": 1}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project in which all stages have run."""
    folder = tmp_path_factory.mktemp("made")
    write_dataset(folder / "dataset")
    write_params(folder, **SETTINGS)
    for stage in ("data", "pretrain", "train", "finetune"):
        must(folder, stage)
    return folder


@pytest.fixture
def trained(made: Path, project: Path) -> Path:
    shutil.copytree(made, project, dirs_exist_ok=True)
    return project


@pytest.mark.fault("code-in-weights")
@pytest.mark.parametrize("form", ["torch", "pickle"])
@pytest.mark.parametrize(("stage", "place", "arguments"), PLACES)
def test_code_in_any_file_is_refused_and_does_not_run(
    moco: Moco, trained: Path, stage: str, place: str, arguments: tuple[str, ...], form: str
) -> None:
    mark = trained / "payload-ran"
    if place.startswith("labels/"):
        shutil.copytree(trained / "dataset/train", trained / "labels/others/train")
        write_params(trained, **SETTINGS, train_extra__labels="labels/others")
    for done in trained.glob("runs/*/*/done"):
        done.unlink()
    (path,) = list(trained.glob(place)) or [trained / place]
    content = {"model": Payload(mark)}
    path.write_bytes(b"") if not path.exists() else None
    if form == "torch":
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content, protocol=2))
    if path.with_suffix(".pth.sha256").exists():  # a stranger who knows of the digest
        path.with_suffix(".pth.sha256").write_text(f"{sha256(path)}  {path.name}\n")
    done = moco(stage, *arguments)
    assert_one_line_error(done, path.name)
    assert not mark.exists()
    if form == "torch":
        torch.load(path, weights_only=False)
        assert mark.exists(), "the payload is a real one"


@pytest.mark.fault("code-in-weights")
def test_code_in_the_decoded_cache_does_not_run(moco: Moco, project: Path) -> None:
    """Labels lie there as an array; one of Python objects is not opened, and the cache is built anew."""
    assert moco("data").returncode == 0
    (path,) = (project / "scratch").glob("moco-cache-*/*/train_label.npy")
    mark = project / "payload-ran"
    np.save(path, np.array([Payload(mark)], dtype=object), allow_pickle=True)
    index = json.loads((path.parent / "cache.json").read_text())
    index["files"][path.name] = zlib.crc32(path.read_bytes())
    (path.parent / "cache.json").write_text(json.dumps(index))
    done = moco("pretrain")
    assert done.returncode == 0 and "building it" in done.stderr, done.stderr
    assert not mark.exists()


@pytest.mark.fault("strangers")
@pytest.mark.skipif(os.geteuid() != 0, reason="giving files away needs root")
def test_a_cache_folder_that_somebody_else_has_made_is_not_used(moco: Moco, project: Path) -> None:
    assert moco("data").returncode == 0
    (folder,) = (project / "scratch").glob("moco-cache-*")
    os.chown(folder, 65534, 65534)
    for stage in ("pretrain", "data"):
        assert_one_line_error(moco(stage), folder.name, "belongs to another user")


@pytest.mark.fault("escape")
@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", ["fifo", "device", "folder", "loop"])
def test_what_only_looks_like_an_image_neither_hangs_nor_passes(moco: Moco, project: Path, kind: str) -> None:
    path = project / "dataset/unlabeled/7.png"
    path.unlink()
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(path)
    assert_one_line_error(moco("data"), "unlabeled/7.png")


@pytest.mark.fault("escape")
@pytest.mark.timeout(60)
@pytest.mark.parametrize("stage", ["data", "train_extra"])
def test_labels_from_a_pipe_are_not_waited_for(moco: Moco, project: Path, stage: str) -> None:
    for earlier in ("data", "pretrain", "train"):
        assert moco(earlier).returncode == 0
    path = project / ("dataset/train_label_tensor.pt" if stage == "data" else "a.csv")
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    write_params(project, train_extra__labels="a.csv")
    assert_one_line_error(moco(stage), path.name, "not a regular file")


@pytest.mark.fault("code-in-weights")
def test_a_picture_starts_no_interpreter(moco: Moco, project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow gives PostScript to Ghostscript, whatever the file is called."""
    (project / "bin").mkdir()
    (project / "bin/gs").write_text(f"#!/bin/sh\ntouch '{project}/payload-ran'\necho 10\n")
    (project / "bin/gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{project}/bin{os.pathsep}{os.environ['PATH']}")
    picture = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n%%EndComments\nshowpage\n%%EOF\n"
    (project / "dataset/unlabeled/0.png").write_bytes(picture)
    assert_one_line_error(moco("data"), "unlabeled/0.png (not an image)")
    assert not (project / "payload-ran").exists()


@pytest.mark.fault("escape")
def test_names_in_label_files_do_not_lead_out_of_the_pool(moco: Moco, project: Path) -> None:
    """Though the image there is one of the pool's, to the bit."""
    tree = project / "tree"
    for split, label, value in (("train", "a", 1), ("train", "b", 2), ("val", "a", 3), ("val", "b", 4),
                                ("unlabeled", "", 5), ("../elsewhere", "", 5)):  # fmt: skip
        for number in range(4):
            (tree / split / label).mkdir(parents=True, exist_ok=True)
            image = np.random.default_rng(10 * value + number).integers(0, 255, (32, 32, 3), np.uint8)
            Image.fromarray(image).save(tree / split / label / f"{number}.png")
    write_params(project, data__source="classes", data__path="tree", data__classes=None, train_extra__labels="a.csv",
                 pretrain__batch_size=2)  # fmt: skip
    for stage in ("data", "pretrain", "train"):
        done = moco(stage)
        assert done.returncode == 0, done.stderr
    for name in ("../../elsewhere/0.png", str(tree / "unlabeled/0.png")):
        (project / "a.csv").write_text(f"image,label\n{name},a\n")
        assert_one_line_error(moco("train_extra"), "is not in the unlabelled pool")


@pytest.mark.fault("escape")
def test_links_that_lead_out_of_the_dataset_are_told(moco: Moco, project: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside.png"
    shutil.move(project / "dataset/unlabeled/7.png", outside)
    (project / "dataset/unlabeled/7.png").symlink_to(outside)
    done = moco("data")
    assert done.returncode == 0
    assert "warning: 1 file(s) or folder(s) of unlabeled lead out of the dataset by links: 7.png" in done.stderr
    (project / "dataset/unlabeled/7.png").unlink()
    (project / "dataset/unlabeled/7.png").symlink_to("8.png")
    assert "warning" not in moco("data").stderr
    shutil.move(project / "dataset/train", tmp_path / "elsewhere")
    (project / "dataset/train").symlink_to(tmp_path / "elsewhere")
    assert "of train lead out of the dataset by links: train" in moco("data").stderr


@pytest.mark.fault("escape")
def test_names_with_line_ends_and_escapes_stay_on_one_line(moco: Moco, project: Path) -> None:
    tree = project / "tree"
    for split in ("train", "val"):
        for label in ("a", "b"):
            (tree / split / label).mkdir(parents=True)
            for number in range(3):
                Image.fromarray(np.full((32, 32, 3), number, np.uint8)).save(tree / split / label / f"{number}.png")
    (tree / "train/a/x\nerror: \x1b[31mred.png").write_bytes(b"no image")
    write_params(project, data__source="classes", data__path="tree", data__classes=None)
    done = moco("data")
    assert_one_line_error(done, r"x\nerror: \x1b[31mred.png", "not an image")
    assert "\x1b" not in done.stderr
