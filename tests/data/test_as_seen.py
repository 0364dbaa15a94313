"""Pixels are those that a person sees: upright, on white where they are transparent, of 8 bits by stated rules."""

from __future__ import annotations

import io
import struct
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_helpers import data_config, need, silent
from image_helpers import (
    ALPHA,
    LEVELS,
    RED,
    RESCALED,
    STORED,
    TRANSPARENT,
    chunk,
    oriented,
    picture,
    png,
    rgba,
    saved,
)
from PIL import Image, features

from conftest import write_dataset
from moco.data.as_seen import as_seen
from moco.data.decode import read_adjusted, read_image
from moco.data.generated import pack
from moco.data.manifest import Manifest
from moco.data.prepare import open_decoded, prepare
from moco.encoders.architecture import Architecture
from moco.errors import UserError
from moco.exchange.submission import render
from moco.settings.eval import EvalConfig

EXACT: dict[str, dict[str, object]] = {"PNG": {}, "TIFF": {}, "WEBP": {"lossless": True}}
NEARLY: dict[str, dict[str, object]] = {"JPEG": {"quality": 100, "subsampling": 0}, "AVIF": {"quality": 100}}


def read(tmp_path: Path, content: bytes) -> tuple[np.ndarray, set[str]]:
    (tmp_path / "image").write_bytes(content)
    return read_adjusted(str(tmp_path / "image"), None, None)


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("kind", [*EXACT, *NEARLY])
def test_pictures_stand_upright(tmp_path: Path, kind: str, orientation: int) -> None:
    if kind == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    found, done = read(tmp_path, oriented(picture(), orientation, kind, **{**EXACT, **NEARLY}[kind]))
    assert found.shape == (10, 14, 3)
    assert np.abs(found.astype(int) - picture()).max() <= (0 if kind in EXACT else 12)
    assert done == ({"oriented"} if orientation != 1 else set())


def test_orientation_that_stands_behind_the_pixels_counts(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[274] = 6
    rows = [bytes(row.reshape(-1)) for row in np.ascontiguousarray(STORED[6](picture()))]
    found, _ = read(tmp_path, png(8, 2, rows, 10, after=chunk(b"eXIf", exif.tobytes()[6:])))
    np.testing.assert_array_equal(found, picture())


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0", b"garbage", b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12"]
)
def test_a_damaged_exif_block_turns_nothing(tmp_path: Path, exif: bytes) -> None:
    buffer = io.BytesIO()
    Image.fromarray(picture()).save(buffer, "WEBP", lossless=True, exif=exif)
    found, done = read(tmp_path, buffer.getvalue())
    np.testing.assert_array_equal(found, picture())
    assert done == set()


@pytest.mark.parametrize("source", ["folder", "squashfs"])
def test_a_dataset_of_turned_pictures_is_that_of_upright_ones_and_says_so(tmp_path: Path, source: str) -> None:
    """The first image decides the size: it lies on its side as well."""
    upright = write_dataset(tmp_path / "upright", unlabeled=16, train=8, val=8, classes=4)
    turned = write_dataset(tmp_path / "turned/dataset", unlabeled=16, train=8, val=8, classes=4)
    rng = np.random.default_rng(0)
    for path in sorted(upright.glob("*/*.png")):
        pixels = rng.integers(0, 256, (10, 14, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(path)
        orientation = (int(path.stem) + 5) % 8 + 1
        turned.joinpath(*path.parts[-2:]).write_bytes(oriented(pixels, orientation, "PNG"))
    expected = prepare(data_config(upright), tmp_path / "scratch", silent)
    place = turned
    if source == "squashfs":
        need("mksquashfs")
        pack(turned, tmp_path / "turned.sqsh")
        place = tmp_path / "turned.sqsh"
    said: list[str] = []
    found = prepare(data_config(place, source), tmp_path / "scratch", said.append)
    assert (found.height, found.width) == (10, 14) and found.digest == expected.digest
    assert found.adjusted == {"unlabeled": {"oriented": 14}, "train": {"oriented": 7}, "val": {"oriented": 7}}
    assert expected.adjusted == {"unlabeled": {}, "train": {}, "val": {}}
    assert "images turned as EXIF says: 14 of unlabeled, 7 of train, 7 of val" in said


@pytest.mark.parametrize("kind", TRANSPARENT)
def test_transparent_pixels_lie_on_white(tmp_path: Path, kind: str) -> None:
    content, expected = TRANSPARENT[kind]
    found, done = read(tmp_path, content)
    assert np.abs(found[0].astype(int) - expected).max() <= 1, found[0]
    if 64 not in content:
        assert found[0].tolist() == expected, "nothing is in between"
    assert "composited" in done


@pytest.mark.parametrize(("mode", "stored"), [("RGBa", "RGBA"), ("La", "LA"), ("PA", "PA")])
def test_modes_of_images_in_memory(mode: str, stored: str) -> None:
    image = rgba().convert("LA") if stored == "LA" else rgba()
    if stored == "PA":
        image = Image.merge("PA", [Image.new("P", (3, 1)), Image.fromarray(ALPHA)])
        image.putpalette(RED)
    found = np.asarray(as_seen(image.convert(mode)))[0].astype(int)
    red = 76 if stored == "LA" else 255
    expected = LEVELS if stored != "LA" else [[255] * 3, [255 - 179 // 4] * 3, [red] * 3]
    assert np.abs(found - expected).max() <= 2, found


def test_images_that_could_be_transparent_and_are_not_keep_every_value(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 4)).astype(np.uint8)
    pixels[..., 3] = 255
    found, done = read(tmp_path, saved(Image.fromarray(pixels, "RGBA")))
    np.testing.assert_array_equal(found, pixels[..., :3])
    assert done == set()


def test_hidden_colours_do_not_tell_two_cut_outs_apart(tmp_path: Path) -> None:
    """What lies under transparent pixels is in no digest: the same picture is the same image."""
    first, second = (np.full((4, 4, 4), value, np.uint8) for value in (10, 200))
    first[:2], second[:2] = 77, 77
    first[2:, :, 3] = second[2:, :, 3] = 0
    a, b = (read(tmp_path, saved(Image.fromarray(pixels, "RGBA")))[0] for pixels in (first, second))
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("kind", RESCALED)
def test_more_than_eight_bits_become_eight_by_one_rule(tmp_path: Path, kind: str) -> None:
    content, expected = RESCALED[kind]
    found, done = read(tmp_path, content)
    assert found[0, :, 0].tolist() == found[0, :, 2].tolist() == expected
    assert done == {"rescaled"}


@pytest.mark.fault("bad-images")
@pytest.mark.parametrize(
    ("values", "words"),
    [
        (np.array([[-1, 5]], np.int32), "values from -1 to 5; 0 to 65535 is expected"),
        (np.array([[0, 65536]], np.int32), "values from 0 to 65536; 0 to 65535 is expected"),
        (np.array([[0, 255]], np.float32), "floats from 0 to 255; 0 to 1 is expected"),
        (np.array([[0, np.nan]], np.float32), "floats from nan to nan; 0 to 1 is expected"),
    ],
)
def test_values_outside_of_the_rule_are_refused(tmp_path: Path, values: np.ndarray, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        read(tmp_path, saved(Image.fromarray(values), "TIFF"))


@pytest.mark.fault("bad-images")
def test_a_transparent_colour_of_which_pillow_keeps_half_is_refused(tmp_path: Path) -> None:
    key = chunk(b"tRNS", struct.pack(">3H", 1, 2, 3))
    with pytest.raises(ValueError, match="16 bits a channel and a transparent colour"):
        read(tmp_path, png(16, 2, [bytes(18)], 3, before=key))


@pytest.mark.parametrize(("values", "dark"), [([4095, 4095], 2), ([4095, 65535], 1), ([65535, 40000], 0)])
def test_wide_images_that_are_nearly_black_are_counted(tmp_path: Path, values: list[int], dark: int) -> None:
    dataset = write_dataset(tmp_path / "dataset", unlabeled=4, train=4, val=4, classes=2)
    for number, value in enumerate(values):
        image = np.full((32, 32), value, np.uint16)
        image[5, 7] = 65535  # a hot pixel, as cameras of 12 bits have
        Image.fromarray(image).save(dataset / f"train/{number}.png")
    said: list[str] = []
    assert prepare(data_config(dataset), tmp_path / "scratch", said.append).adjusted["train"] == {"rescaled": 2}
    told = [line for line in said if "nearly black" in line]
    assert [line.split()[1:4] for line in told] == ([[str(dark), "of", "2"]] if dark else [])
    assert "images of more than 8 bits a channel brought to 8: 2 of train" in said


def test_heic_is_read_where_the_library_is_there(tmp_path: Path) -> None:
    heif = pytest.importorskip("pillow_heif")
    heif.register_heif_opener()
    content = saved(Image.fromarray(picture(64, 96)), "HEIF", quality=100, chroma=444)
    found, _ = read(tmp_path, content)
    assert np.abs(found.astype(int) - picture(64, 96)).max() < 30


@pytest.mark.fault("bad-images")
@pytest.mark.parametrize(
    ("head", "words"),
    [
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(99), r"HEIC: pip install pillow-heif, or convert it to PNG"),
        (b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(99), "JPEG 2000 is not read; convert it to PNG"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"II*\0" + bytes(99), "damaged, or of a kind that Pillow does not read"),
        (b"hello", "^not an image$"),
    ],
)
def test_what_is_not_read_is_called_by_its_name(
    tmp_path: Path, head: bytes, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)  # as where it is not installed
    with pytest.raises(ValueError, match=words):
        read(tmp_path, head)


@pytest.mark.fault("bad-images")
def test_images_beyond_the_limit_say_how_to_allow_them(tmp_path: Path) -> None:
    (tmp_path / "0.png").write_bytes(saved(Image.new("1", (40, 30))))
    with pytest.raises(ValueError, match=r"^1200 pixels, and data\.max_pixels is 500: make it smaller, or raise that$"):
        read_image(str(tmp_path / "0.png"), None, 8, largest=500)
    assert read_image(str(tmp_path / "0.png"), None, 8, largest=1200).shape == (8, 8, 3)


def test_cmyk_of_photoshop_is_not_inverted(tmp_path: Path) -> None:
    """Ink values are stored upside down there, as a marker says."""
    for color in ((255, 0, 0), (255, 255, 255), (0, 0, 128)):
        content = saved(Image.new("RGB", (16, 16), color).convert("CMYK"), "JPEG", quality=100)
        found, _ = read(tmp_path, content)
        assert b"Adobe" in content and np.abs(found.astype(int) - color).max() < 6


CONFIG = EvalConfig(batch_size=4, calibration_bins=5, team_id=7, team_name="blue", email_address="a@b.example")
SCORED = {f"orientation {n}": oriented(picture(32, 24), n, "PNG") for n in STORED}
SCORED |= {f"TIFF {n}": oriented(picture(32, 24), n, "TIFF") for n in (3, 6)}
SCORED |= {kind: content for kind, (content, _) in TRANSPARENT.items()}
SCORED |= {kind: content for kind, (content, _) in RESCALED.items()}


@pytest.mark.parametrize("resize", [None, 16])
def test_the_scorers_transform_makes_the_pixels_that_were_trained_on(tmp_path: Path, resize: int | None) -> None:
    """A scorer hands over what Image.open gives; submission.py has no help of ours."""
    manifest = Manifest(
        settings={}, source={}, height=32, width=24, resize=resize, classes=["cat", "dog"],
        mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), splits={}, duplicates_train_val=0,
    )  # fmt: skip
    scope: dict[str, Any] = {"__name__": "submission"}
    text = render(Architecture("small_resnet", "small", 4, 2), manifest, CONFIG)
    assert "moco" not in text
    exec(compile(text, "submission.py", "exec"), scope)
    for kind, content in SCORED.items():
        (tmp_path / "image").write_bytes(content)
        expected = read_image(str(tmp_path / "image"), None, resize)
        with Image.open(tmp_path / "image") as image:
            found = scope["eval_transform"](image)
        assert torch.equal((found * 255).round().byte().permute(1, 2, 0), torch.from_numpy(expected.copy())), kind


def test_a_manifest_of_other_rules_is_refused(tmp_path: Path) -> None:
    """Else stages would go on with the pixels that a former version decoded."""
    config = data_config(write_dataset(tmp_path / "dataset", unlabeled=4, train=4, val=4, classes=2))
    manifest = prepare(config, tmp_path / "scratch", silent)
    assert len(open_decoded(config, manifest, tmp_path / "scratch", silent)["val"].images) == 4
    with pytest.raises(UserError, match="moco data") as caught:
        open_decoded(config, replace(manifest, decoding=1), tmp_path / "scratch", silent)
    assert caught.value.code == "E-DATA-DECODING"
