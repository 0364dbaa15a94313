"""Drawn datasets: reproducible to the byte, balanced, and not to be told apart by raw pixels."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from data_helpers import data_config, generated_config, hide_all_but, mounts_below, need, silent, try_mount

from moco.data import generated
from moco.data.generated import CLASSES, draw, generate
from moco.data.prepare import open_decoded, prepare
from moco.errors import UserError


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_the_same_seed_draws_the_same_bytes(tmp_path: Path) -> None:
    first = generate(generated_config(), tmp_path / "a", silent)
    second = generate(generated_config(), tmp_path / "b", silent)
    assert first.name == "dataset"
    assert contents(first) == contents(second)
    assert first.parent.name == second.parent.name


def test_another_seed_draws_other_images_of_the_same_labels(tmp_path: Path) -> None:
    first = contents(generate(generated_config(), tmp_path, silent))
    second = contents(generate(generated_config(seed=4), tmp_path, silent))
    assert first.keys() == second.keys()
    images = [name for name in first if name.endswith(".png")]
    assert len(images) == 24 + 24 + 12
    assert all(first[name] != second[name] for name in images)
    assert first["train_label_tensor.pt"] == second["train_label_tensor.pt"]


def test_no_image_is_drawn_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generated, "BATCH", 12)  # several lots of the same size and the same classes
    found = contents(generate(generated_config(unlabeled=48), tmp_path, silent))
    images = [content for name, content in found.items() if name.endswith(".png")]
    assert len(set(images)) == len(images) == 48 + 24 + 12


def test_a_larger_set_begins_with_the_smaller_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole lots of images are drawn from seeds of their own, so that counts can grow."""
    monkeypatch.setattr(generated, "BATCH", 12)
    small = contents(generate(generated_config(unlabeled=24), tmp_path, silent))
    large = contents(generate(generated_config(unlabeled=36), tmp_path, silent))
    for i in range(24):
        assert small[f"unlabeled/{i}.png"] == large[f"unlabeled/{i}.png"]


def test_all_classes_have_the_same_share_and_their_names(tmp_path: Path) -> None:
    config = data_config(tmp_path, "generated", generated=generated_config(train_per_class=3, val_per_class=2))
    manifest = prepare(config, tmp_path / "scratch", silent)
    assert manifest.classes == list(CLASSES)
    assert len(set(CLASSES)) == 12
    assert manifest.splits["train"].per_class == [3] * 12
    assert manifest.splits["val"].per_class == [2] * 12
    assert (manifest.height, manifest.width) == (32, 32)
    assert manifest.duplicates_train_val == 0
    assert manifest.source == {"kind": "generated"}


def test_what_was_drawn_is_used_again(tmp_path: Path) -> None:
    said: list[str] = []
    first = generate(generated_config(), tmp_path, said.append)
    assert len(said) == 1
    (first / "unlabeled" / "0.png").write_bytes(b"mark")
    assert generate(generated_config(), tmp_path, said.append) == first
    assert len(said) == 1
    assert (first / "unlabeled" / "0.png").read_bytes() == b"mark"


def test_a_raised_version_is_drawn_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = generate(generated_config(), tmp_path, silent)
    monkeypatch.setattr(generated, "VERSION", generated.VERSION + 1)
    assert generate(generated_config(), tmp_path, silent) != first


def test_packed_images_are_the_same_dataset(tmp_path: Path) -> None:
    need("mksquashfs")
    plain = data_config(tmp_path, "generated")
    packed = data_config(tmp_path, "generated", generated=generated_config(pack=True))
    scratch = tmp_path / "scratch"
    expected, found = prepare(plain, scratch, silent), prepare(packed, scratch, silent)
    image = generate(packed.generated, tmp_path, silent)
    assert image.name == "student_dataset.sqsh"
    assert [path.name for path in image.parent.iterdir()] == ["student_dataset.sqsh"]
    assert found.digest == expected.digest
    assert found.source["kind"] == "squashfs"
    shutil.rmtree(scratch)
    splits = open_decoded(packed, found, scratch, silent)
    assert splits["unlabeled"].images.shape == (24, 32, 32, 3)
    assert splits["train"].labels.tolist() == [i % 12 for i in range(24)]
    assert mounts_below(tmp_path) == []


def test_packing_without_the_tool_is_refused_before_drawing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hide_all_but((), tmp_path / "bin", monkeypatch)
    with pytest.raises(UserError, match="needs mksquashfs; install squashfs-tools"):
        generate(generated_config(pack=True), tmp_path / "build", silent)
    assert not (tmp_path / "build").exists()


def test_a_full_disk_is_one_error_and_leaves_nothing(tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    try_mount(["mount", "-t", "tmpfs", "-o", "size=48k", "tmpfs", str(small)])
    try:
        with pytest.raises(UserError, match="images cannot be written: No space left on device"):
            generate(generated_config(), small, silent)
        assert list(small.iterdir()) == []
    finally:
        try_mount(["umount", str(small)])


def nearest_neighbours(images: np.ndarray, classes: np.ndarray, bank: int, k: int, normalise: bool) -> float:
    """Share of right answers of the k nearest of the first `bank` images, asked with the others."""
    pixels = torch.from_numpy(images.reshape(len(images), -1).astype(np.float32))
    if normalise:
        pixels = torch.nn.functional.normalize(pixels - pixels.mean(1, keepdim=True))
    near = torch.cdist(pixels[bank:], pixels[:bank]).topk(k, largest=False).indices
    votes = torch.nn.functional.one_hot(torch.from_numpy(classes)[:bank][near], len(CLASSES)).sum(1)
    return float((votes.argmax(1) == torch.from_numpy(classes)[bank:]).float().mean())


def test_raw_pixels_do_not_tell_the_classes() -> None:
    """Chance is 8.3 %. Without this, a kNN score of learnt features would say little about them."""
    classes = np.arange(1000) % len(CLASSES)
    images = draw(np.random.default_rng(0), classes, 40)
    for normalise in (False, True):
        for k in (1, 10):
            assert nearest_neighbours(images, classes, 600, k, normalise) < 0.25


def test_mean_colour_does_not_tell_the_classes() -> None:
    classes = np.arange(1000) % len(CLASSES)
    images = draw(np.random.default_rng(0), classes, 32).mean((1, 2), keepdims=True)
    assert nearest_neighbours(images, classes, 600, 10, False) < 0.2


def test_classes_differ_where_everything_else_is_the_same() -> None:
    """The counterpart: with all random choices equal, each pair of shape and texture is another image."""
    images = [draw(np.random.default_rng(7), np.array([label]), 48)[0].astype(int) for label in range(len(CLASSES))]
    for a in range(len(CLASSES)):
        for b in range(a):
            assert np.abs(images[a] - images[b]).mean() > 1, (CLASSES[a], CLASSES[b])


def test_no_image_is_flat() -> None:
    images = draw(np.random.default_rng(0), np.arange(240) % len(CLASSES), 32)
    assert images.shape == (240, 32, 32, 3)
    assert images.std((1, 2, 3)).min() > 10
