"""What cannot be read or is not followed never vanishes without a word, whatever the source."""

from __future__ import annotations

import codecs
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conftest import write_dataset
from moco.data.generated import pack
from moco.data.prepare import prepare
from moco.errors import UserError
from moco.labels.label_files import read_lines
from moco.settings.data import DataConfig, GeneratedConfig
from process_helpers import forget_failed_imports

LITTER = (".DS_Store", "._0.png", "Thumbs.db", "desktop.ini", "__MACOSX")


def config(path: Path, source: str = "classes", unreadable: int = 0) -> DataConfig:
    drawn = GeneratedConfig(seed=3, size=32, unlabeled=24, train_per_class=2, val_per_class=1, pack=False)
    return DataConfig(
        source=source, path=str(path), mounted="", copy_to_scratch=False, download=False, classes=None,  # type: ignore[arg-type]
        resize=None, labelled=None, unreadable=unreadable, max_pixels=178956970, exclude_val=True,
        generated=drawn,
    )  # fmt: skip


def put(path: Path, value: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((8, 8, 3), value, np.uint8)).save(path, "PNG")


@pytest.fixture
def tree() -> Iterator[Path]:
    """Two classes and a pool, at a place that every user of the machine may read."""
    folder = Path(tempfile.mkdtemp(prefix="moco-listing-"))
    folder.chmod(0o755)
    root = folder / "tree"
    for number, name in enumerate(("ant", "bee")):
        for image in range(3):
            put(root / f"train/{name}/{image}.png", 10 * number + image)
            put(root / f"val/{name}/{image}.png", 100 + 10 * number + image)
    for image in range(6):
        put(root / f"unlabeled/{image}.png", 200 + image)
    (folder / "scratch").mkdir()
    (folder / "scratch").chmod(0o777)
    yield root
    shutil.rmtree(folder)


@pytest.fixture
def nobody(tree: Path) -> Iterator[None]:
    """Without root's rights, which let it read everything."""
    Image.init()
    codecs.lookup("ascii")  # loaded late, from a folder that may be root's alone
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    yield
    os.seteuid(0)
    forget_failed_imports()


def without_rights(path: Path) -> None:
    """As a file or folder of another user, with umask 077."""
    before = os.geteuid()
    if os.getuid() == 0:
        os.seteuid(0)
    path.chmod(0)
    os.seteuid(before)


def put_in_the_way(kind: str, folder: Path) -> str:
    """Put something of the kind into the folder; return its name."""
    name = "7.png"
    if kind == "lost link":
        (folder / name).symlink_to("nowhere.png")
    elif kind == "lost link to a folder":
        name = "more.v2"
        (folder / name).symlink_to(folder / "nowhere")
    elif kind == "loop":
        (folder / name).symlink_to(name)
    elif kind == "linked folder":
        name = "more"
        (folder / name).symlink_to(folder.parent)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as server:
            before = Path.cwd()
            os.chdir(folder)  # paths of sockets are short
            server.bind(name)
            os.chdir(before)
    elif kind == "pipe":
        name = "pipe"
        os.mkfifo(folder / name)
    elif kind == "folder without rights":
        name = "closed"
        put(folder / name / "1.png", 1)
        without_rights(folder / name)
    elif kind == "file without rights":
        put(folder / name, 1)
        without_rights(folder / name)
    return name


KINDS = ("lost link", "lost link to a folder", "loop", "linked folder", "socket", "pipe", "folder without rights",
         "file without rights")  # fmt: skip


@pytest.mark.fault("unlisted")
@pytest.mark.timeout(60)
@pytest.mark.parametrize("split", ["train/ant", "val/bee", "unlabeled"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_cannot_be_read_in_a_class_tree_is_an_error(
    tree: Path, kind: str, split: str, request: pytest.FixtureRequest
) -> None:
    """Of the pool it is left out and told where `data.unreadable` allows it."""
    name = put_in_the_way(kind, tree / split)
    request.getfixturevalue("nobody")
    with pytest.raises(UserError) as caught:
        prepare(config(tree, unreadable=0 if split == "unlabeled" else 9), tree.parent / "scratch", lambda _: None)
    assert caught.value.code == "E-DATA-UNREADABLE" and f"1 image(s) cannot be used: {split}/{name} (" in str(
        caught.value
    )
    if split == "unlabeled":
        said: list[str] = []
        found = prepare(config(tree, unreadable=1), tree.parent / "scratch", said.append)
        assert found.splits["unlabeled"].count == 6 and len(found.left_out) == 1
        assert [line for line in said if "left out" in line and f"unlabeled/{name} (" in line]


@pytest.mark.fault("unlisted")
@pytest.mark.parametrize("place", ["train", "val", "unlabeled", "train/cow", "unlabled"])
def test_a_link_that_leads_nowhere_in_place_of_a_folder_is_an_error(tree: Path, place: str) -> None:
    """Else a class, or the whole pool, is gone."""
    shutil.rmtree(tree / place, ignore_errors=True)
    (tree / place).symlink_to("/nowhere/at/all")
    with pytest.raises(UserError) as caught:
        prepare(config(tree, unreadable=9), tree.parent / "scratch", lambda _: None)
    assert caught.value.code == "E-DATA-LINK" and place.rpartition("/")[2] in str(caught.value)


@pytest.mark.fault("unlisted")
@pytest.mark.parametrize("place", ["", "train", "val", "unlabeled", "train/ant"])
def test_folders_without_rights_are_named(tree: Path, place: str, request: pytest.FixtureRequest) -> None:
    without_rights(tree / place)
    request.getfixturevalue("nobody")
    with pytest.raises(UserError) as caught:
        prepare(config(tree), tree.parent / "scratch", lambda _: None)
    assert caught.value.code in ("E-DATA-LIST", "E-DATA-UNREADABLE")
    assert "Permission denied" in str(caught.value) and (place or "tree") in str(caught.value)


@pytest.mark.fault("unlisted")
@pytest.mark.parametrize("place", ["", "unlabeled", "val"])
def test_folders_of_the_contract_without_rights_are_named(
    tree: Path, place: str, request: pytest.FixtureRequest
) -> None:
    dataset = write_dataset(tree.parent / "dataset")
    without_rights(dataset / place)
    request.getfixturevalue("nobody")
    with pytest.raises(UserError, match="Permission denied") as caught:
        prepare(config(dataset, "folder"), tree.parent / "scratch", lambda _: None)
    assert caught.value.code == "E-DATA-LIST" and (place or "dataset") in str(caught.value)


@pytest.mark.fault("unlisted")
def test_a_folder_of_extra_labels_loses_no_class(tree: Path) -> None:
    (tree / "train/cow").symlink_to("/nowhere")
    with pytest.raises(UserError, match="cow") as caught:
        read_lines(tree / "train", lambda _: None)
    assert caught.value.code == "E-DATA-LINK"
    (tree / "train/cow").unlink()
    (tree / "train/bee/7.png").symlink_to("nowhere")
    assert str(tree / "train/bee/7.png") in [line.file for line in read_lines(tree / "train", lambda _: None)]


def test_many_bad_images_are_one_line_and_ten_names(tree: Path) -> None:
    for number in range(200):
        (tree / f"train/ant/a name of some length, {number:03}.png").symlink_to("nowhere")
    said: list[str] = []
    with pytest.raises(UserError, match=r"200 image\(s\) cannot be used") as caught:
        prepare(config(tree), tree.parent / "scratch", said.append)
    assert len(str(caught.value)) <= 300
    assert len([line for line in said if "a link that leads nowhere" in line]) == 10


@pytest.mark.parametrize("source", ["classes", "folder", "squashfs"])
def test_what_systems_leave_is_passed_over_in_every_source(tree: Path, source: str) -> None:
    root = tree if source == "classes" else write_dataset(tree.parent / "made/dataset")
    expected = prepare(
        config(root, "folder" if source == "squashfs" else source), tree.parent / "scratch", lambda _: None
    )
    for name in LITTER:
        for folder in (root, *(path for path in sorted(root.rglob("*")) if path.is_dir() and path.name not in LITTER)):
            if name == "__MACOSX":
                (folder / name).mkdir()
                (folder / name / "._1.png").write_bytes(b"\0\5\x16\7")
            else:
                (folder / name).write_bytes(b"\0\0\0\1Bud1")
    place = root
    if source == "squashfs":
        if shutil.which("mksquashfs") is None:
            pytest.skip("mksquashfs is not installed")
        place = tree.parent / "mac.sqsh"
        pack(root, place)
    said: list[str] = []
    assert prepare(config(place, source), tree.parent / "scratch", said.append).digest == expected.digest
    assert not [line for line in said if "warning" in line]


def test_images_are_known_by_their_content_where_the_name_does_not_say(tree: Path) -> None:
    for number, name in enumerate(("plain", "scan.0001", "Mr. Ant", "gray.pgm", "bits.pbm", "any.pnm")):
        path = tree / "train/ant" / name
        put(path.with_name("x.png"), 50 + number)
        path.with_name("x.png").rename(path)
    for name in ("LICENSE", "notes.txt"):
        (tree / "train/ant" / name).write_text("no image")
    said: list[str] = []
    found = prepare(config(tree), tree.parent / "scratch", said.append)
    assert found.splits["train"].per_class == [9, 3]
    assert [line for line in said if "2 file(s)" in line and "LICENSE" in line and "notes.txt" in line]
