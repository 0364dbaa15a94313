"""Images drawn from a seed: textured shapes whose class cannot be told from raw pixels.

A class is a pair of shape and texture. Position, size, rotation, the colours of object, texture and
background, background structure, lighting and noise are drawn anew for every image, so that neither the
colour of a pixel nor its place says anything about the class.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from moco.errors import Say, UserError
from moco.files import working_folder
from moco.settings.data import GeneratedConfig

SHAPES = ("disc", "square", "triangle", "cross")
TEXTURES = ("stripes", "checks", "dots")
CLASSES = tuple(f"{shape}-{texture}" for shape in SHAPES for texture in TEXTURES)
VERSION = 1  # raise it when the drawing changes: folders of another version are not reused
OVERSAMPLING = 2
BATCH = 250
CHROMA = 0.08  # largest distance of a channel from gray


def _uniform(rng: np.random.Generator, low: float, high: float, shape: tuple[int, ...]) -> np.ndarray:
    """Return uniform random numbers in single precision, which takes half the time of numpy's default."""
    return np.asarray(rng.random(shape, dtype=np.float32) * np.float32(high - low) + np.float32(low))


def _colour(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Return muted colours: any brightness, little chroma, so that colour jitter leaves little to recognise."""
    lightness = _uniform(rng, 0.1, 0.9, (*shape[:-1], 1))
    return np.asarray(np.clip(lightness + _uniform(rng, -CHROMA, CHROMA, shape), 0, 1))


def _inside(shape: np.ndarray, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Return whether (u, v), in units of the object's radius, lies in the shape. shape: B x 1 x 1."""
    triangle = np.maximum(v - 0.5, np.maximum(-0.5 * v + 0.866 * u, -0.5 * v - 0.866 * u) - 0.5)
    arms = np.minimum(np.maximum(np.abs(u) - 1.0, np.abs(v) - 0.38), np.maximum(np.abs(u) - 0.38, np.abs(v) - 1.0))
    distance = np.choose(shape, [np.hypot(u, v) - 0.9, np.maximum(np.abs(u), np.abs(v)) - 0.8, triangle * 0.8, arms])
    return np.asarray(distance < 0)


def _pattern(texture: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return which of two tones a point has; x and y in periods of the texture. texture: B x 1 x 1."""
    sx, sy = np.sin(2 * np.pi * x), np.sin(2 * np.pi * y)
    dots = np.hypot(x - np.round(x), y - np.round(y)) < 0.3
    return np.asarray(np.choose(texture, [sx > 0, sx * sy > 0, dots]))


def _background(rng: np.random.Generator, n: int, grid: np.ndarray) -> np.ndarray:
    """Draw a slope between two colours and three soft blobs: n x S x S x 3."""
    a, b = _colour(rng, (2, n, 1, 1, 3))
    angle = _uniform(rng, 0, 2 * np.pi, (n, 1, 1))
    slope = (np.cos(angle) * grid[0] + np.sin(angle) * grid[1]) * 0.7 + 0.5
    image: np.ndarray = a + (b - a) * np.clip(slope, 0, 1)[..., None]
    for _ in range(3):
        centre = _uniform(rng, -0.5, 0.5, (2, n, 1, 1))
        width = _uniform(rng, 0.05, 0.25, (n, 1, 1))
        blob = np.exp(-((grid[0] - centre[0]) ** 2 + (grid[1] - centre[1]) ** 2) / (2 * width**2))
        image = image + (_colour(rng, (n, 1, 1, 3)) - image) * (0.7 * blob)[..., None]
    return image


def draw(rng: np.random.Generator, classes: np.ndarray, size: int) -> np.ndarray:
    """Draw images of the given classes: len(classes) x size x size x 3, uint8."""
    n = len(classes)
    fine, coarse = _grid(size * OVERSAMPLING), _grid(size)
    shape, texture = (classes // len(TEXTURES))[:, None, None], (classes % len(TEXTURES))[:, None, None]
    radius = _uniform(rng, 0.36, 0.5, (n, 1, 1))
    centre = _uniform(rng, -1, 1, (2, n, 1, 1)) * (0.5 - 0.85 * radius)
    turn = _uniform(rng, -0.3, 0.3, (n, 1, 1))
    dx, dy = fine[0] - centre[0], fine[1] - centre[1]
    u = (np.cos(turn) * dx + np.sin(turn) * dy) / radius
    v = (np.cos(turn) * dy - np.sin(turn) * dx) / radius
    mask = _inside(shape, u, v)
    period = _uniform(rng, 0.1, 0.16, (n, 1, 1)) / radius  # 0.1 to 0.16 of the image's width
    phase = _uniform(rng, 0, 1, (2, n, 1, 1))
    tone = mask & _pattern(texture, u / period + phase[0], v / period + phase[1])
    covered, toned = _shrink(mask), _shrink(tone)  # shares of each pixel
    first = _colour(rng, (n, 1, 1, 3))
    step = _uniform(rng, 0.35, 0.6, (n, 1, 1, 1)) * np.where(first.mean(-1, keepdims=True) > 0.5, -1, 1)
    step = np.clip(first + step + _uniform(rng, -CHROMA, CHROMA, (n, 1, 1, 3)), 0, 1) - first
    background = _background(rng, n, coarse)
    image = background + (first - background) * covered + step * toned
    light = _uniform(rng, 0, 2 * np.pi, (n, 1, 1))
    shade = 1 + _uniform(rng, 0, 1, (n, 1, 1)) * (np.cos(light) * coarse[0] + np.sin(light) * coarse[1])
    image = image * (shade * _uniform(rng, 0.6, 1.1, (n, 1, 1)))[..., None]
    image = image + 0.03 * rng.standard_normal(image.shape, dtype=np.float32)
    return np.asarray((np.clip(image, 0, 1) * 255).round(), np.uint8)


def _grid(size: int) -> np.ndarray:
    """Return x and y of the pixel centres, in [-0.5, 0.5]: 2 x size x size."""
    axis = ((np.arange(size) + 0.5) / size - 0.5).astype(np.float32)
    return np.stack(np.meshgrid(axis, axis, indexing="xy"))


def _shrink(mask: np.ndarray) -> np.ndarray:
    """Shrink B x fine x fine booleans to B x size x size x 1, the share that is set."""
    n, fine, _ = mask.shape
    size = fine // OVERSAMPLING
    parts = mask.reshape(n, size, OVERSAMPLING, size, OVERSAMPLING)
    total = sum(parts[:, :, i, :, j].astype(np.float32) for i in range(OVERSAMPLING) for j in range(OVERSAMPLING))
    return np.asarray(total / OVERSAMPLING**2)[..., None]


def _write_split(folder: Path, seed: tuple[int, int], classes: np.ndarray, size: int) -> None:
    folder.mkdir(parents=True)
    for first in range(0, len(classes), BATCH):
        rng = np.random.default_rng((*seed, first))
        for i, image in enumerate(draw(rng, classes[first : first + BATCH], size)):
            Image.fromarray(image).save(folder / f"{first + i}.png", compress_level=1)


def generated_place(config: GeneratedConfig, parent: Path) -> Path:
    """Return where the folder `dataset` (or, where `pack` is set, the squashfs image) of these settings lies."""
    settings = json.dumps({"version": VERSION, **asdict(config)}, sort_keys=True)
    place = parent / f"generated-{hashlib.sha256(settings.encode()).hexdigest()[:12]}"
    return place / ("student_dataset.sqsh" if config.pack else "dataset")


def generate(config: GeneratedConfig, parent: Path, say: Say) -> Path:
    """Return the folder `dataset` of these settings, or a squashfs image that holds it, where `pack` is set.

    The first call draws the images, into parent/KEY. Later calls find them there. Raises UserError where the disk is
    full or mksquashfs is missing.
    """
    result = generated_place(config, parent)
    place = result.parent
    if result.exists():
        return result
    if config.pack and shutil.which("mksquashfs") is None:
        raise UserError("data.generated.pack needs mksquashfs; install squashfs-tools or set it to false")
    say(f"drawing {config.unlabeled} images of {config.size} pixels, {len(CLASSES)} classes, into {place}")
    parent.mkdir(parents=True, exist_ok=True)
    try:
        with working_folder(parent, ".generating-") as work:
            _write_dataset(work / "dataset", config)
            if config.pack:
                image = work / "student_dataset.sqsh"
                pack(work / "dataset", image)
                shutil.rmtree(work / "dataset")
            work.chmod(0o755)
            work.rename(place)
            work.mkdir()  # the context manager removes it
    except OSError as error:
        if not result.exists():  # else another process was faster
            raise UserError(f"{place}: images cannot be written: {error.strerror}") from None
    return result


def _write_dataset(folder: Path, config: GeneratedConfig) -> None:
    count = len(CLASSES)
    for number, (name, labels) in enumerate(
        (
            ("unlabeled", np.arange(config.unlabeled) % count),
            ("train", np.arange(config.train_per_class * count) % count),
            ("val", np.arange(config.val_per_class * count) % count),
        )
    ):
        _write_split(folder / name, (config.seed, number), labels, config.size)
        if name != "unlabeled":
            torch.save(torch.from_numpy(labels.astype(np.int64)), folder / f"{name}_label_tensor.pt")
    (folder / "classes.txt").write_text("\n".join(CLASSES) + "\n", encoding="utf-8")


def pack(dataset: Path, image: Path) -> None:
    """Write a squashfs image whose root holds the folder `dataset`. Raises UserError where mksquashfs fails."""
    done = subprocess.run(
        ["mksquashfs", str(dataset), str(image), "-keep-as-directory", "-noappend", "-quiet",
         "-no-progress", "-all-root"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode != 0:
        raise UserError(f"{image}: mksquashfs failed: {done.stderr.strip().splitlines()[-1:]}")
