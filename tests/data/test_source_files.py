"""A source whose files changed is read again, one whose files did not is not; the content decides."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from data_helpers import data_config, generated_config, silent
from PIL import Image

from conftest import Moco, assert_one_line_error, write_dataset, write_params
from moco.data import source_files
from moco.data.prepare import open_decoded, prepare
from moco.errors import UserError


@pytest.fixture(autouse=True)
def soon_settled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source_files, "SETTLED_S", -1.0)


def pixels(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (32, 32, 3), np.uint8))


def replaced(path: Path, keep_times: bool) -> None:
    """Another image in the same file, of the same size in bytes and, if asked, the same modification time."""
    before = path.stat()
    pixels(99).save(path, compress_level=0)
    first = path.read_bytes()
    path.write_bytes(first.ljust(before.st_size, b"\0"))
    if keep_times:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.fault("source-changed")
@pytest.mark.parametrize("keep_times", [False, True])
def test_an_image_changed_in_place_is_noticed_by_later_stages(moco: Moco, project: Path, keep_times: bool) -> None:
    write_params(project)
    pixels(1).save(project / "dataset/unlabeled/7.png", compress_level=0)
    assert moco("data").returncode == 0
    before = (project / "models/manifest.json").read_text()
    replaced(project / "dataset/unlabeled/7.png", keep_times)
    done = moco("pretrain")
    assert_one_line_error(done, "unlabeled", "run `moco data` again", "[E-DATA-CHANGED]")
    assert moco("data").returncode == 0
    assert (project / "models/manifest.json").read_text() != before
    assert moco("pretrain").returncode == 0


@pytest.mark.fault("source-changed")
def test_unchanged_files_are_not_read_again(dataset: Path, tmp_path: Path) -> None:
    with Image.open(dataset / "train/5.png") as image:
        image.save(dataset / "val/1.png")
    said: list[str] = []
    first = prepare(data_config(dataset), tmp_path / "scratch", said.append)
    warnings = [line for line in said if line.startswith("warning")]
    assert warnings
    said.clear()
    assert prepare(data_config(dataset), tmp_path / "scratch", said.append) == first
    assert not [line for line in said if line.startswith("decoded")]
    assert [line for line in said if line.startswith("warning")] == warnings, "what was told is told again"


def test_touched_files_are_read_again_and_are_the_same_dataset(dataset: Path, tmp_path: Path) -> None:
    manifest = prepare(data_config(dataset), tmp_path / "scratch", silent)
    os.utime(dataset / "unlabeled/3.png", (1, 1))
    said: list[str] = []
    open_decoded(data_config(dataset), manifest, tmp_path / "scratch", said.append)
    assert [line for line in said if line.startswith("decoded 40 images")]
    said.clear()
    open_decoded(data_config(dataset), manifest, tmp_path / "scratch", said.append)
    assert said == []


def test_files_that_just_changed_may_change_again(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within one tick of the file system's clock nothing but the content tells."""
    monkeypatch.setattr(source_files, "SETTLED_S", 3600.0)
    said: list[str] = []
    for _ in range(2):
        prepare(data_config(dataset), tmp_path / "scratch", said.append)
    assert len([line for line in said if line.startswith("decoded 40 images")]) == 2


@pytest.mark.fault("source-changed")
def test_a_manifest_of_before_does_not_bring_its_images_back(dataset: Path, tmp_path: Path) -> None:
    """As DVC's run cache, or a checkout, puts it there; the decoded cache of before is still on the node."""
    old = prepare(data_config(dataset), tmp_path / "scratch", silent)
    pixels(5).save(dataset / "val/3.png")
    new = prepare(data_config(dataset), tmp_path / "scratch", silent)
    with pytest.raises(UserError) as caught:
        open_decoded(data_config(dataset), old, tmp_path / "scratch", silent)
    assert caught.value.code == "E-DATA-CHANGED" and "val" in str(caught.value)
    open_decoded(data_config(dataset), new, tmp_path / "scratch", silent)


@pytest.mark.fault("source-changed")
def test_another_reader_reads_again(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a new version of the program would decode otherwise must not come from a record."""
    prepare(data_config(dataset), tmp_path / "scratch", silent)
    monkeypatch.setattr(source_files, "reader", lambda: "new")
    said: list[str] = []
    prepare(data_config(dataset), tmp_path / "scratch", said.append)
    assert [line for line in said if line.startswith("decoded 40 images")]


@pytest.mark.fault("source-changed")
def test_a_source_that_went_is_what_was_read_of_it_and_another_one_is_not(dataset: Path, tmp_path: Path) -> None:
    config, scratch = data_config(dataset), tmp_path / "scratch"
    manifest = prepare(config, scratch, silent)
    dataset.rename(tmp_path / "moved")
    said: list[str] = []
    assert prepare(config, scratch, said.append, may_be_absent=True) == manifest
    assert [line for line in said if line.startswith("warning") and "not here" in line]
    open_decoded(config, manifest, scratch, silent)
    with pytest.raises(UserError):
        prepare(config, scratch, silent)
    with pytest.raises(UserError):
        prepare(data_config(tmp_path / "misspelt"), scratch, silent, may_be_absent=True)
    shutil.rmtree(scratch)
    with pytest.raises(UserError):
        prepare(config, scratch, silent, may_be_absent=True)


@pytest.mark.fault("source-changed")
def test_every_kind_of_file_counts(tmp_path: Path) -> None:
    """Labels and class names too, images behind links, and folders of classes."""
    root = write_dataset(tmp_path / "a/dataset")
    (tmp_path / "elsewhere.png").write_bytes((root / "train/1.png").read_bytes())
    (root / "train/1.png").unlink()
    (root / "train/1.png").symlink_to(tmp_path / "elsewhere.png")
    config = data_config(root)
    seen = set()
    changes = (
        lambda: None, lambda: (root / "classes.txt").write_text("a\n"),
        lambda: (root.parent / "classes.txt").write_text("a\n"), (root / "val_label_tensor.pt").touch,
        (tmp_path / "elsewhere.png").touch, lambda: (root / "val/0.png").rename(root / "val/9.png"),
    )  # fmt: skip
    for change in changes:
        time.sleep(0.01)  # a tick
        change()
        source = source_files.present_source(config)
        assert source is not None
        seen.add(source_files.stamp(source)[0])
    assert len(seen) == len(changes)


def test_drawn_images_and_absent_ones(tmp_path: Path) -> None:
    config = data_config(tmp_path / "drawn", "generated", generated=generated_config())
    assert source_files.present_source(config) is None
    prepare(config, tmp_path / "scratch", silent)
    assert source_files.present_source(config) is not None
    for kind in ("squashfs", "classes", "cifar10"):
        assert source_files.present_source(data_config(tmp_path / "absent", kind)) is None


def test_an_overlay_may_give_files_other_inodes_each_time(dataset: Path, tmp_path: Path) -> None:
    config = data_config(tmp_path / "absent.sqsh", "squashfs", mounted=str(dataset))
    source = source_files.present_source(config)
    assert source is not None
    before = source_files.stamp(source)[0]
    copy = Path(shutil.copytree(dataset, tmp_path / "copy"))  # keeps modification times
    shutil.rmtree(dataset)
    copy.rename(dataset)
    assert source_files.stamp(source)[0] == before
