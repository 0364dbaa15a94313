"""Decodes image files into a flat file of bytes. Runs in worker processes, so it must not import torch."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import stat
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

from moco.data.squashfs_reader import SquashfsImage
from moco.memory import full_memory

DIGEST_BYTES = 16
# Pillow knows more, by content whatever the name: one of them starts a PostScript interpreter.
FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "PPM", "TIFF", "GIF")
WRONG_MODES = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")  # more than 8 bits a channel


@dataclass(frozen=True)
class Chunk:
    """Consecutive images of one split. `size`: (height, width) that every image must have in the end.

    resize: edge in pixels to which the shorter side is brought before a square is cut from the centre.
    files: paths, or with a squashfs `image` the inode references of files in it.
    """

    index: int
    first: int
    files: tuple[str | int, ...]
    size: tuple[int, int]
    resize: int | None
    output: str
    image: Path | None = None


@dataclass
class ChunkReport:
    """What was found in a chunk: checksum and digests of the pixels, channel sums, and problems by image."""

    index: int
    first: int
    crc: int = 0
    digests: bytes = b""
    sums: tuple[int, int, int] = (0, 0, 0)
    squares: tuple[int, int, int] = (0, 0, 0)
    problems: list[tuple[int, str]] = field(default_factory=list)


def resize_and_crop(image: Image.Image, edge: int) -> Image.Image:
    """Shorter side to `edge` (bilinear), then the centre square: torchvision's Resize and CenterCrop."""
    width, height = image.size
    portrait = width <= height
    size = (edge, int(edge * height / width)) if portrait else (int(edge * width / height), edge)
    image = image.resize(size, Image.Resampling.BILINEAR) if size != image.size else image
    left, top = round((size[0] - edge) / 2.0), round((size[1] - edge) / 2.0)
    return image.crop((left, top, left + edge, top + edge))


def read_image(
    file: str | int, size: tuple[int, int] | None, resize: int | None, packed: SquashfsImage | None = None
) -> np.ndarray:
    """H x W x 3, uint8. `file`: a path, or an inode reference in `packed`. Raises ValueError with the reason where
    the file is not such an image."""
    try:
        source: str | BinaryIO = io.BytesIO(packed.read(int(file))) if packed else str(file)
        if not packed and not stat.S_ISREG(Path(str(file)).stat().st_mode):  # a pipe would be waited for, for ever
            raise ValueError("not a regular file")
        with Image.open(source, formats=FORMATS) as image:
            if image.mode in WRONG_MODES:
                raise ValueError(f"mode {image.mode} has more than 8 bits a channel")
            if _deep(image):
                raise ValueError("has more than 8 bits a channel")
            frames = getattr(image, "n_frames", 1)
            if frames > 1 and image.format != "MPO":  # what phones write: a photograph and its preview
                raise ValueError(f"has {frames} frames")
            found = (image.height, image.width)
            if size is not None and resize is None and found != size:
                raise ValueError(
                    f"{found[1]}x{found[0]} pixels, not {size[1]}x{size[0]} as the first image "
                    "(data.resize brings all to one size)"
                )
            rgb = image.convert("RGB")
            return np.asarray(resize_and_crop(rgb, resize) if resize else rgb)
    except FileNotFoundError:
        raise ValueError("not found") from None
    except UnidentifiedImageError:
        raise ValueError("not an image") from None
    except Image.DecompressionBombError:
        raise ValueError("declares an absurd size") from None
    except ValueError:
        raise
    except Exception as error:  # a damaged file can bring about anything in a decoder
        if full_memory(error):
            raise
        reason = f"cannot be decoded: {type(error).__name__} {error}"
        if isinstance(error, (OSError, SyntaxError, EOFError)):  # the second is PIL's for broken PNG chunks
            reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error)
        raise ValueError(reason) from None


def _deep(image: Image.Image) -> bool:
    """Whether a file of more than 8 bits a channel was opened as one of 8, which drops the rest."""
    tiles = getattr(image, "tile", [])  # of files alone
    arguments = [a for tile in tiles for a in (tile[3] if isinstance(tile[3], tuple) else (tile[3],))]
    if image.format == "PPM":
        return any(isinstance(a, int) and a > 255 for a in arguments)  # the largest value
    return image.format != "BMP" and any(isinstance(a, str) and ";16" in a for a in arguments)  # there 16 a pixel


def digests_of(images: np.ndarray) -> bytes:
    """Of the pixels of each of N x H x W x 3 uint8, one after the other: N x DIGEST_BYTES."""
    return b"".join(hashlib.blake2b(image.data, digest_size=DIGEST_BYTES).digest() for image in images)


def summarise(report: ChunkReport, images: np.ndarray) -> None:
    """Fills in checksum, digests and sums of N x H x W x 3 uint8."""
    report.crc = zlib.crc32(images.data)
    report.digests = digests_of(images)
    counts = [np.bincount(images[..., c].reshape(-1), minlength=256).astype(np.int64) for c in range(3)]
    values = np.arange(256, dtype=np.int64)
    report.sums = tuple(int((n * values).sum()) for n in counts)  # type: ignore[assignment]
    report.squares = tuple(int((n * values**2).sum()) for n in counts)  # type: ignore[assignment]


def decode_chunk(chunk: Chunk) -> ChunkReport:
    """Decodes a chunk and writes it at its place in the output file, which must exist. Raises UserError where there is
    no memory for an image."""
    report = ChunkReport(chunk.index, chunk.first)
    images = np.zeros((len(chunk.files), *chunk.size, 3), np.uint8)
    with SquashfsImage(chunk.image) if chunk.image else contextlib.nullcontext() as packed:
        for i, file in enumerate(chunk.files):
            try:
                images[i] = read_image(file, chunk.size, chunk.resize, packed)
            except ValueError as error:
                report.problems.append((chunk.first + i, str(error)))
            except (MemoryError, OSError, RuntimeError) as error:
                if full := full_memory(error):
                    raise full.reading(f"image {chunk.first + i} of {Path(chunk.output).stem}", "decoded") from None
                raise
    summarise(report, images)
    write_at(chunk.output, chunk.first * images[0].nbytes, images)
    return report


def write_at(path: str, offset: int, images: np.ndarray) -> None:
    """Writes the bytes of an array at an offset of an existing file."""
    with Path(path).open("r+b") as file:
        file.seek(offset)
        file.write(images.data)


def copy_array(array: np.ndarray, resize: int | None, output: Path, chunk: int) -> Iterator[ChunkReport]:
    """Yield the reports of an array's images (N x H x W x 3), so many at a time, and write them to the output."""
    for n, first in enumerate(range(0, len(array), chunk)):
        part = np.ascontiguousarray(array[first : first + chunk])
        if resize is not None:
            part = np.stack([np.asarray(resize_and_crop(Image.fromarray(image), resize)) for image in part])
        report = ChunkReport(n, first)
        summarise(report, part)
        write_at(str(output), first * part[0].nbytes, part)
        yield report
