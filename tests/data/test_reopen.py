"""Opening the decoded cache again: sound ones are used as they are, damaged ones are built anew."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from data_helpers import data_config, left_behind, silent
from PIL import Image

from conftest import write_dataset
from moco.data import cache
from moco.data.manifest import Manifest
from moco.data.prepare import open_decoded, prepare
from moco.errors import UserError


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    return tmp_path / "scratch"


@pytest.fixture
def manifest(dataset: Path, scratch: Path) -> Manifest:
    return prepare(data_config(dataset), scratch, silent)


@pytest.fixture
def place(manifest: Manifest, scratch: Path) -> Path:
    return cache.cache_folder(scratch, manifest.digest)


def test_a_sound_cache_is_used_without_the_source(
    dataset: Path, scratch: Path, manifest: Manifest, place: Path
) -> None:
    assert place.is_dir()
    shutil.rmtree(dataset)
    said: list[str] = []
    splits = open_decoded(data_config(dataset), manifest, scratch, said.append)
    assert said == []
    assert splits["unlabeled"].images.shape == (40, 32, 32, 3)


@pytest.mark.parametrize(
    ("changes", "refused"),
    [
        ({"resize": 16}, "data.resize"),
        ({"labelled": 5}, "data.labelled"),
        ({"source": "classes"}, "data.source"),
        ({"mounted": "/elsewhere", "copy_to_scratch": True}, None),  # how it is reached, not what it is
    ],
)
def test_settings_changed_since_the_manifest_are_refused(
    dataset: Path, scratch: Path, manifest: Manifest, changes: dict[str, object], refused: str | None
) -> None:
    if refused is None:
        open_decoded(data_config(dataset, **changes), manifest, scratch, silent)
        return
    with pytest.raises(UserError, match=f"^{refused}: changed since the manifest was made; run `moco data` again"):
        open_decoded(data_config(dataset, **changes), manifest, scratch, silent)


@pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user needs root")
def test_scratch_shared_with_another_user_is_no_obstacle(dataset: Path, tmp_path: Path) -> None:
    """/tmp is everybody's; each user has caches of their own there."""
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o1777)
    prepare(data_config(dataset), shared, silent)
    for folder in (tmp_path, *tmp_path.parents):  # pytest's folders are root's alone
        if folder.stat().st_uid == 0 and not folder.stat().st_mode & 0o001:
            folder.chmod(folder.stat().st_mode | 0o011)
    process = multiprocessing.get_context("fork").Process(target=as_nobody, args=(dataset, shared))
    process.start()
    process.join(60)
    assert process.exitcode == 0
    assert {path.name for path in shared.iterdir()} == {"moco-cache-0", "moco-cache-65534"}


def as_nobody(dataset: Path, shared: Path) -> None:
    os.setgid(65534)
    os.setuid(65534)
    prepare(data_config(dataset), shared, silent)


@pytest.mark.fault("read-only")
def test_a_place_that_cannot_be_written_is_one_error(dataset: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot be written: .*; set runtime\.scratch"):
        prepare(data_config(dataset), tmp_path / "file", silent)


def test_what_a_killed_process_left_is_swept_and_what_is_in_use_is_not(dataset: Path, scratch: Path) -> None:
    parent = cache.caches(scratch)
    for name in ("dead", "alive"):
        (parent / f".building-{name}").mkdir(parents=True)
        (parent / f".building-{name}.lock").touch()
    code = "import sys, filelock; lock = filelock.FileLock(sys.argv[1]); lock.acquire(); print(1, flush=True); input()"
    command = [sys.executable, "-c", code, str(parent / ".building-alive.lock")]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdout is not None and holder.stdout.readline() == b"1\n"
    prepare(data_config(dataset), scratch, silent)
    assert sorted(path.name for path in parent.glob(".building-*")) == [".building-alive", ".building-alive.lock"]
    holder.communicate(b"\n", timeout=120)


def test_a_node_without_the_cache_builds_it(dataset: Path, tmp_path: Path, manifest: Manifest) -> None:
    said: list[str] = []
    splits = open_decoded(data_config(dataset), manifest, tmp_path / "another" / "node", said.append)
    assert "not on this node; building it" in said[0]
    assert splits["unlabeled"].images.shape == (40, 32, 32, 3)


def flip(name: str, at: int) -> Callable[[Path], None]:
    def change(place: Path) -> None:
        content = bytearray((place / name).read_bytes())
        content[at] ^= 1
        (place / name).write_bytes(content)

    return change


def cut(name: str) -> Callable[[Path], None]:
    return lambda place: (place / name).write_bytes((place / name).read_bytes()[:-5])


def delete(name: str) -> Callable[[Path], None]:
    return lambda place: (place / name).unlink()


def write(name: str, text: str) -> Callable[[Path], None]:
    return lambda place: (place / name).write_text(text)


DAMAGE = {
    "a byte of the first image": flip("unlabeled.u8", 0),
    "a byte of the last image": flip("val.u8", -1),
    "a byte of the labels": flip("train_label.npy", -8),
    "a byte of the digests": flip("unlabeled.digests", 100),
    "truncated images": cut("train.u8"),
    "truncated digests": cut("val.digests"),
    "truncated labels": cut("val_label.npy"),
    "no images": delete("unlabeled.u8"),
    "no labels": delete("train_label.npy"),
    "no index": delete("cache.json"),
    "empty index": write("cache.json", ""),
    "foreign index": write("cache.json", "[1, 2]"),
}


@pytest.mark.fault("damaged-cache")
@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_cache_is_built_anew(
    dataset: Path, scratch: Path, manifest: Manifest, place: Path, kind: str
) -> None:
    assert cache.damage(place) is None
    DAMAGE[kind](place)
    said: list[str] = []
    splits = open_decoded(data_config(dataset), manifest, scratch, said.append)
    assert "; building it" in said[0]
    assert cache.damage(place) is None
    for name, count in (("unlabeled", 40), ("train", 20), ("val", 10)):
        with Image.open(dataset / name / f"{count - 1}.png") as image:
            np.testing.assert_array_equal(splits[name].images[count - 1], np.asarray(image))
    assert splits["train"].labels.tolist() == [i % 5 for i in range(20)]
    assert left_behind(scratch) == []


@pytest.mark.parametrize("chunk", [2, 64])
def test_large_files_are_checked_by_samples(
    dataset: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    """With many chunks, and with fewer than are sampled: then all of them are looked at."""
    monkeypatch.setattr(cache, "CHECK_ALL_BELOW", 1)
    monkeypatch.setattr(cache, "CHUNK", 64)
    built = cache.cache_folder(scratch, prepare(data_config(dataset), scratch, silent).digest)
    index = json.loads((built / "cache.json").read_text())
    if chunk == 2:  # the same file described in smaller pieces, as if it were large
        index["chunk"] = chunk
        for name, entry in index["splits"].items():
            content = (built / f"{name}.u8").read_bytes()
            row = chunk * 32 * 32 * 3
            entry["crc"] = [cache.zlib.crc32(content[at : at + row]) for at in range(0, len(content), row)]
        (built / "cache.json").write_text(json.dumps(index))
    assert cache.damage(built) is None
    content = bytearray((built / "unlabeled.u8").read_bytes())
    (built / "unlabeled.u8").write_bytes(bytes(255 - byte for byte in content))
    assert "unlabeled.u8 has a wrong checksum" in (cache.damage(built) or "")


CHANGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "a pixel": (lambda root: Image.new("RGB", (32, 32)).save(root / "val" / "3.png"), "val"),
    "a label": (lambda root: torch.save(torch.arange(20) // 4, root / "train_label_tensor.pt"), "train"),
    "an image more": (lambda root: Image.new("RGB", (32, 32)).save(root / "unlabeled" / "40.png"), "unlabeled"),
    "class names": (lambda root: (root / "classes.txt").write_text("a\nb\nc\nd\ne\n"), "classes or image size"),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_a_dataset_changed_since_the_manifest_is_refused(
    dataset: Path, scratch: Path, manifest: Manifest, place: Path, kind: str
) -> None:
    change, split = CHANGES[kind]
    change(dataset)
    shutil.rmtree(place)
    with pytest.raises(UserError, match=rf"^{split}: the dataset is not the one in the manifest any more; run `moco"):
        open_decoded(data_config(dataset), manifest, scratch, silent)


def test_swapped_images_are_another_dataset(dataset: Path, scratch: Path, manifest: Manifest) -> None:
    """Order is content: labels are joined to images by it."""
    first, second = dataset / "train" / "0.png", dataset / "train" / "1.png"
    kept = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(kept)
    assert prepare(data_config(dataset), scratch, silent).digest != manifest.digest


def test_extra_labels_appended_to_train_keep_to_their_images(tmp_path: Path, scratch: Path) -> None:
    """Fault 10: image i has label i also behind the point where images were added."""
    root = write_dataset(tmp_path / "extra", train=12, classes=3)
    labels = torch.tensor([0, 1, 2] * 4 + [2, 2, 0])
    for i in range(12, 15):
        Image.new("RGB", (32, 32), (i, 0, 0)).save(root / "train" / f"{i}.png")
    torch.save(labels, root / "train_label_tensor.pt")
    config = data_config(root, classes=5)
    splits = open_decoded(config, prepare(config, scratch, silent), scratch, silent)
    assert splits["train"].images[12:, 0, 0, 0].tolist() == [12, 13, 14]
    assert splits["train"].labels.tolist() == labels.tolist()
