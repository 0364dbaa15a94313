"""Decoding into the memory map: the pixels are PIL's, and whatever is wrong with an image or the disk is said."""

from __future__ import annotations

import io
import multiprocessing
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.transforms as tvt
from data_helpers import data_config, left_behind, need, prepare_in_process, silent, try_mount
from PIL import Image

from conftest import write_dataset
from moco.data import cache
from moco.data.cache import DecodedSplit
from moco.data.generated import pack
from moco.data.manifest import Manifest, load_manifest
from moco.data.prepare import open_decoded, prepare
from moco.errors import UserError


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    return tmp_path / "scratch"


def decoded(path: Path, scratch: Path, **changes: object) -> tuple[Manifest, dict[str, DecodedSplit]]:
    config = data_config(path, **changes)
    manifest = prepare(config, scratch, silent)
    return manifest, cache.open_cache(cache.cache_folder(scratch, manifest.digest))


def pillow(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def assert_refused(path: Path, scratch: Path, *words: str, **changes: object) -> str:
    with pytest.raises(UserError) as caught:
        prepare(data_config(path, **changes), scratch, silent)
    message = str(caught.value)
    for word in words:
        assert word in message
    assert "\n" not in message
    assert left_behind(scratch) == []
    return message


def test_memory_maps_hold_what_pillow_decodes(dataset: Path, scratch: Path) -> None:
    manifest, splits = decoded(dataset, scratch)
    for name, split in splits.items():
        assert len(split.images) == manifest.splits[name].count
        for i, image in enumerate(split.images):
            np.testing.assert_array_equal(image, pillow(dataset / name / f"{i}.png"))
    assert splits["train"].labels.tolist() == torch.load(dataset / "train_label_tensor.pt").tolist()
    assert splits["unlabeled"].labels is None
    assert isinstance(splits["train"].images, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        splits["train"].images[0] = 0
    assert left_behind(scratch) == []


def test_equal_pixels_have_equal_digests_and_others_do_not(dataset: Path, scratch: Path) -> None:
    with Image.open(dataset / "unlabeled" / "4.png") as image:
        image.save(dataset / "train" / "2.png", compress_level=1)  # another file, the same pixels
    _, splits = decoded(dataset, scratch)
    assert splits["unlabeled"].digests[4].tolist() == splits["train"].digests[2].tolist()
    assert len(np.unique(splits["unlabeled"].digests, axis=0)) == 40


def test_mean_and_std_are_those_of_the_unlabelled_pixels(dataset: Path, scratch: Path) -> None:
    manifest, splits = decoded(dataset, scratch)
    pixels = splits["unlabeled"].images.reshape(-1, 3) / 255
    np.testing.assert_allclose(manifest.mean, pixels.mean(0), rtol=1e-9)
    np.testing.assert_allclose(manifest.std, pixels.std(0), rtol=1e-9)


def test_many_chunks_in_worker_processes_give_the_same_cache(
    dataset: Path, scratch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, _ = decoded(dataset, scratch)
    monkeypatch.setattr(cache, "CHUNK", 16)
    (dataset / "val" / "9.png").rename(tmp_path / "kept.png")
    (dataset / "val" / "9.png").write_text("not an image")
    (dataset / "unlabeled" / "37.png").rename(tmp_path / "kept too.png")
    (dataset / "unlabeled" / "37.png").write_text("not an image")
    assert_refused(dataset, tmp_path / "other", "2 image(s)", "unlabeled/37.png (not an image)", "val/9.png")
    (tmp_path / "kept.png").rename(dataset / "val" / "9.png")
    (tmp_path / "kept too.png").rename(dataset / "unlabeled" / "37.png")
    found, splits = decoded(dataset, tmp_path / "other")
    assert found == expected
    for i in (0, 15, 16, 39):
        np.testing.assert_array_equal(splits["unlabeled"].images[i], pillow(dataset / "unlabeled" / f"{i}.png"))
    assert cache.damage(cache.cache_folder(tmp_path / "other", found.digest)) is None


@pytest.mark.parametrize("mode", ["L", "P", "1", "CMYK"])
def test_other_modes_are_converted_as_pillow_does(dataset: Path, scratch: Path, mode: str) -> None:
    path = dataset / "unlabeled" / "3.png"
    with Image.open(path) as image:
        other = image.convert(mode)
    other.save(path, "TIFF" if mode == "CMYK" else "PNG")  # a wrong suffix is no reason to refuse an image
    _, splits = decoded(dataset, scratch)
    np.testing.assert_array_equal(splits["unlabeled"].images[3], pillow(path))


SIZES = [(32, 32), (50, 33), (33, 50), (16, 40), (45, 16), (24, 27), (27, 24)]


def test_resize_equals_torchvisions_resize_and_center_crop(dataset: Path, scratch: Path) -> None:
    rng = np.random.default_rng(1)
    for i, size in enumerate(SIZES):
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(dataset / "unlabeled" / f"{i}.png")
    manifest, splits = decoded(dataset, scratch, resize=24)
    assert (manifest.height, manifest.width, manifest.resize) == (24, 24, 24)
    expected = tvt.Compose([tvt.Resize(24), tvt.CenterCrop(24)])
    for i in range(len(SIZES) + 1):
        with Image.open(dataset / "unlabeled" / f"{i}.png") as image:
            np.testing.assert_array_equal(splits["unlabeled"].images[i], np.asarray(expected(image)), err_msg=str(i))


def test_images_need_not_be_square(dataset: Path, scratch: Path) -> None:
    for path in dataset.glob("*/*.png"):
        Image.fromarray(np.full((10, 14, 3), len(path.parent.name), np.uint8)).save(path)
    manifest, splits = decoded(dataset, scratch)
    assert (manifest.height, manifest.width) == (10, 14)
    assert splits["val"].images.shape == (10, 10, 14, 3)


def damaged_png(kind: str) -> bytes:
    buffer = io.BytesIO()
    if kind == "float":
        Image.fromarray(np.full((32, 32), 40000, np.float32)).save(buffer, "TIFF")
        return buffer.getvalue()
    if kind == "animation":
        frames = [Image.new("RGB", (32, 32), color) for color in ("red", "blue", "green")]
        frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:])
        return buffer.getvalue()
    size = 20 if kind == "other size" else 32
    noise = np.random.default_rng(0).integers(0, 256, (size, size + 3 * (size == 20), 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, "PNG")
    content = bytearray(buffer.getvalue())
    if kind == "flipped byte":
        content[len(content) // 2] ^= 0xFF
    return {"truncated": bytes(content[: len(content) // 2]), "text": b"hello", "empty": b""}.get(kind, bytes(content))


@pytest.mark.fault("bad-images")
@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("truncated", "train/6.png (image file is truncated"),
        ("flipped byte", "train/6.png ("),
        ("text", "train/6.png (not an image)"),
        ("empty", "train/6.png (not an image)"),
        ("other size", "train/6.png (23x20 pixels, not 32x32 as the first image (data.resize brings"),
        ("animation", "train/6.png (has 3 frames; save one of them)"),
        ("float", "train/6.png (floats from 40000 to 40000; 0 to 1 is expected; scale all images alike)"),
    ],
)
def test_unusable_image_is_named_with_its_reason(dataset: Path, scratch: Path, kind: str, words: str) -> None:
    (dataset / "train" / "6.png").write_bytes(damaged_png(kind))
    assert_refused(dataset, scratch, "1 image(s) cannot be used: ", words)
    assert [path for path in cache.caches(scratch).iterdir() if path.is_dir()] == []


def test_only_the_first_ten_unusable_images_are_named(dataset: Path, scratch: Path) -> None:
    for i in range(5, 18):
        (dataset / "unlabeled" / f"{i}.png").write_text("no image")
    said: list[str] = []
    with pytest.raises(UserError, match=r"13 image\(s\) cannot be used: unlabeled/5\.png .*, and \d+ more") as caught:
        prepare(data_config(dataset), scratch, said.append)
    assert len(str(caught.value)) <= 300 and caught.value.code == "E-DATA-UNREADABLE"
    assert [line for line in said if "not an image" in line] == [
        f"cannot be used: unlabeled/{i}.png (not an image)" for i in range(5, 15)
    ]


def test_a_pool_without_any_image_is_refused(dataset: Path, scratch: Path) -> None:
    for path in (dataset / "unlabeled").iterdir():
        path.write_text("no image")
    assert_refused(dataset, scratch, "unlabeled: none of the first 100 files is a readable image")


@pytest.mark.fault("vanished")
def test_a_dataset_that_goes_away_while_it_is_decoded_is_one_error(dataset: Path, scratch: Path) -> None:
    """As when a network share is lost: the folder disappears after the first split was decoded."""

    def say(message: str) -> None:
        if message == "decoded 40 images of unlabeled":
            shutil.rmtree(dataset)

    with pytest.raises(UserError, match=r"30 image\(s\) cannot be used: train/0\.png \(not found\).* and \d+ more"):
        prepare(data_config(dataset), scratch, say)
    assert left_behind(scratch) == []


@pytest.mark.fault("full-disk")
def test_too_small_a_disk_is_noticed_before_anything_is_written(dataset: Path, scratch: Path) -> None:
    scratch.mkdir()
    try_mount(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(scratch)])
    try:
        assert_refused(dataset, scratch, "the decoded cache needs 0 MiB, 0 MiB are free; set runtime.scratch")
        assert [path.name for path in scratch.rglob("*")] == [cache.caches(scratch).name]
    finally:
        try_mount(["umount", str(scratch)])


@pytest.mark.fault("full-disk")
def test_a_disk_that_fills_up_meanwhile_is_one_error(dataset: Path, scratch: Path) -> None:
    """240 KiB of pixels fit when building begins; another file then takes the room."""
    scratch.mkdir()
    try_mount(["mount", "-t", "tmpfs", "-o", "size=320k", "tmpfs", str(scratch)])

    def say(message: str) -> None:
        if message == "decoded 40 images of unlabeled":
            (scratch / "other").write_bytes(bytes(160 << 10))

    try:
        with pytest.raises(UserError, match="building the decoded cache failed: No space left on device"):
            prepare(data_config(dataset), scratch, say)
        assert left_behind(scratch) == []
    finally:
        try_mount(["umount", str(scratch)])


def test_folder_and_squashfs_image_share_one_cache(dataset: Path, scratch: Path, tmp_path: Path) -> None:
    need("mksquashfs")
    pack(dataset, tmp_path / "student_dataset.sqsh")
    folder, _ = decoded(dataset, scratch)
    image, _ = decoded(tmp_path / "student_dataset.sqsh", scratch, source="squashfs")
    assert folder.source != image.source
    assert folder.digest == image.digest
    assert len([path for path in cache.caches(scratch).iterdir() if path.is_dir()]) == 1


def test_processes_that_build_at_once_all_succeed_and_agree(dataset: Path, scratch: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    barrier, answers = context.Barrier(2), context.Queue()
    processes = [
        context.Process(target=prepare_in_process, args=(dataset, scratch, barrier, answers)) for _ in range(2)
    ]
    for process in processes:
        process.start()
    found = [answers.get(timeout=120) for _ in processes]
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert found[0] == found[1]
    (tmp_path / "manifest.json").write_text(found[0])
    manifest = load_manifest(tmp_path / "manifest.json")
    said: list[str] = []
    splits = open_decoded(data_config(dataset), manifest, scratch, said.append)
    assert said == []
    np.testing.assert_array_equal(splits["val"].images[9], pillow(dataset / "val" / "9.png"))
    assert left_behind(scratch) == []


def test_another_dataset_does_not_touch_the_first_ones_cache(dataset: Path, scratch: Path, tmp_path: Path) -> None:
    first, _ = decoded(dataset, scratch)
    second, _ = decoded(write_dataset(tmp_path / "second", seed=1), scratch)
    assert first.digest != second.digest
    assert cache.damage(cache.cache_folder(scratch, first.digest)) is None
    assert cache.damage(cache.cache_folder(scratch, second.digest)) is None
