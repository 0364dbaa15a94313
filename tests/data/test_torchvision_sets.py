"""CIFAR-10 and STL-10 in their own file formats, written here in small. Only the checksums are exchanged."""

from __future__ import annotations

import hashlib
import pickle
from pathlib import Path

import numpy as np
import pytest
from data_helpers import data_config, silent
from PIL import Image
from torchvision.datasets import CIFAR10, STL10

from moco.data.cache import caches, open_cache
from moco.data.dataset import Dataset
from moco.data.prepare import open_decoded, prepare
from moco.data.sources import open_dataset
from moco.errors import UserError

CIFAR_NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


@pytest.fixture
def cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, dict[str, np.ndarray]]:
    """A root with two training batches of 10 images and a test batch of 10; the images as N x 32 x 32 x 3."""
    folder = tmp_path / "cifar" / CIFAR10.base_folder
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    parts = {}
    for name in ("data_batch_1", "data_batch_2", "test_batch"):
        parts[name] = rng.integers(0, 256, (10, 32, 32, 3), dtype=np.uint8)
        planes = parts[name].transpose(0, 3, 1, 2).reshape(10, -1)
        (folder / name).write_bytes(pickle.dumps({"data": planes, "labels": list(range(10))}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": CIFAR_NAMES}))
    monkeypatch.setattr(CIFAR10, "train_list", [[n, md5(folder / n)] for n in ("data_batch_1", "data_batch_2")])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", md5(folder / "test_batch")]])
    meta = {"filename": "batches.meta", "key": "label_names", "md5": md5(folder / "batches.meta")}
    monkeypatch.setattr(CIFAR10, "meta", meta)
    images = {
        "train": np.concatenate([parts["data_batch_1"], parts["data_batch_2"]]),
        "val": parts["test_batch"],
    }
    return tmp_path / "cifar", images


@pytest.fixture
def stl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, dict[str, np.ndarray]]:
    """A root with 12 unlabelled, 10 training and 10 test images of 96 pixels; the images as N x 96 x 96 x 3."""
    folder = tmp_path / "stl" / STL10.base_folder
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    images = {}
    for split, file, count in (("unlabeled", "unlabeled", 12), ("train", "train", 10), ("val", "test", 10)):
        images[split] = rng.integers(0, 256, (count, 96, 96, 3), dtype=np.uint8)
        images[split].transpose(0, 3, 2, 1).tofile(folder / f"{file}_X.bin")  # columns first
        if split != "unlabeled":
            np.arange(1, 11, dtype=np.uint8).tofile(folder / f"{file}_y.bin")  # from 1
    (folder / "class_names.txt").write_text("\n".join(CIFAR_NAMES) + "\n")
    lists = {"train_list": ("train_X.bin", "train_y.bin", "unlabeled_X.bin"), "test_list": ("test_X.bin", "test_y.bin")}
    for name, files in lists.items():
        monkeypatch.setattr(STL10, name, [[file, md5(folder / file)] for file in files])
    monkeypatch.setattr(STL10, "folds_list_file", "absent")
    return tmp_path / "stl", images


def opened(path: Path, source: str) -> Dataset:
    with open_dataset(data_config(path, source), path, silent) as found:
        return found


def test_cifar10_files_become_the_three_splits(cifar: tuple[Path, dict[str, np.ndarray]]) -> None:
    root, images = cifar
    found = opened(root, "cifar10")
    assert found.classes == CIFAR_NAMES
    assert found.origin == {"kind": "cifar10"}
    for name, key in (("unlabeled", "train"), ("train", "train"), ("val", "val")):
        np.testing.assert_array_equal(found.splits[name].array, images[key])
    assert found.splits["train"].labels.tolist() == [*range(10), *range(10)]
    assert found.splits["val"].labels.tolist() == list(range(10))
    assert found.splits["unlabeled"].labels is None


def test_stl10_files_become_the_three_splits(stl: tuple[Path, dict[str, np.ndarray]]) -> None:
    root, images = stl
    found = opened(root, "stl10")
    assert found.classes == CIFAR_NAMES
    for name, expected in images.items():
        np.testing.assert_array_equal(found.splits[name].array, expected)
    assert found.splits["train"].labels.tolist() == list(range(10))
    assert found.splits["val"].labels.dtype == np.int64


@pytest.mark.parametrize("source", ["cifar10", "stl10"])
def test_missing_files_are_reported_with_the_way_to_get_them(tmp_path: Path, source: str) -> None:
    with pytest.raises(UserError) as caught:
        opened(tmp_path / "nothing", source)
    assert f"{source} cannot be read" in str(caught.value)
    assert str(caught.value).endswith("; set data.download to true")


def test_a_damaged_cifar10_file_is_refused_unread(cifar: tuple[Path, dict[str, np.ndarray]]) -> None:
    root, _ = cifar
    path = root / CIFAR10.base_folder / "data_batch_2"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match="corrupted"):
        opened(root, "cifar10")


def test_arrays_go_through_the_cache_as_they_are(cifar: tuple[Path, dict[str, np.ndarray]], tmp_path: Path) -> None:
    root, images = cifar
    config = data_config(root, "cifar10", labelled=13)
    manifest = prepare(config, tmp_path, silent)
    splits = open_decoded(config, manifest, tmp_path, silent)
    np.testing.assert_array_equal(splits["unlabeled"].images, images["train"])
    np.testing.assert_array_equal(splits["val"].images, images["val"])
    assert len(splits["train"].images) == manifest.splits["train"].count == 13
    for image, label in zip(splits["train"].images, splits["train"].labels, strict=True):
        rows = np.flatnonzero((images["train"] == image).all((1, 2, 3)))
        assert rows % 10 == label
    np.testing.assert_allclose(manifest.mean, images["train"].mean((0, 1, 2)) / 255, rtol=1e-9)


def test_arrays_are_resized_like_files(cifar: tuple[Path, dict[str, np.ndarray]], tmp_path: Path) -> None:
    root, images = cifar
    manifest = prepare(data_config(root, "cifar10", resize=16), tmp_path, silent)
    assert (manifest.height, manifest.width) == (16, 16)
    place = next(path for path in caches(tmp_path).iterdir() if path.is_dir())
    expected = np.asarray(Image.fromarray(images["val"][3]).resize((16, 16), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(open_cache(place)["val"].images[3], expected)
