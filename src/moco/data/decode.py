"""Decodes image files into a flat file of bytes. Runs in worker processes, so it must not import torch."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import io
import os
import re
import stat
import warnings
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

from moco.data import as_seen
from moco.data.image_kinds import CONVERT, HEAD, UNREAD_SUFFIXES, is_heic, why_not_read
from moco.data.squashfs_reader import SquashfsImage
from moco.out_of_memory import full_memory

try:
    from PIL.AvifImagePlugin import SUPPORTED as AVIF
except ImportError:  # Pillow before 11.3
    AVIF = False

warnings.filterwarnings("ignore", module=r"PIL\.")  # of damaged EXIF blocks, of large images: nobody knows which ones
DIGEST_BYTES = 16
# Version of the rules by which files become pixels, in the manifest: raise it when they change.
DECODING = 2
LARGEST = 178_956_970  # pixels of an image, as Pillow has it by default
# Pillow knows more, by content whatever the name: one of them starts a PostScript interpreter.
FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "PPM", "TIFF", "GIF", *(("AVIF",) if AVIF else ()))
# An image of more than 8 bits whose values stay below DARK of 255, all but a few that a hot pixel makes, probably holds
# 12 bits or fewer in 16.
DARK, BRIGHT_SHARE = 32, 0.001
TOO_LARGE = "{} pixels, and data.max_pixels is {}: make it smaller, or raise that"
ADJUSTED = {
    "oriented": "turned as EXIF says",
    "composited": "with transparent parts put on white",
    "rescaled": "of more than 8 bits a channel brought to 8",
}


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
    largest: int = LARGEST


@dataclass
class ChunkReport:
    """What was found in a chunk: checksum and digests of the pixels, channel sums, and problems by image.

    adjusted: how many images were, by the names of ADJUSTED. dark: how many of those that were rescaled are nearly
    black."""

    index: int
    first: int
    crc: int = 0
    digests: bytes = b""
    sums: tuple[int, int, int] = (0, 0, 0)
    squares: tuple[int, int, int] = (0, 0, 0)
    problems: list[tuple[int, str]] = field(default_factory=list)
    adjusted: Counter[str] = field(default_factory=Counter)
    dark: int = 0


def resize_and_crop(image: Image.Image, edge: int) -> Image.Image:
    """Resize the shorter side to `edge` (bilinear), then crop the centre square.

    This is torchvision's Resize and CenterCrop.
    """
    width, height = image.size
    portrait = width <= height
    size = (edge, int(edge * height / width)) if portrait else (int(edge * width / height), edge)
    image = image.resize(size, Image.Resampling.BILINEAR) if size != image.size else image
    left, top = round((size[0] - edge) / 2.0), round((size[1] - edge) / 2.0)
    return image.crop((left, top, left + edge, top + edge))


def read_image(
    file: str | int,
    size: tuple[int, int] | None,
    resize: int | None,
    packed: SquashfsImage | None = None,
    largest: int = LARGEST,
) -> np.ndarray:
    """Return the image of a file as a person sees it, H x W x 3, uint8. See `read_adjusted`."""
    return read_adjusted(file, size, resize, packed, largest)[0]


def read_adjusted(
    file: str | int,
    size: tuple[int, int] | None,
    resize: int | None,
    packed: SquashfsImage | None = None,
    largest: int = LARGEST,
) -> tuple[np.ndarray, set[str]]:
    """Return the image of a file as a person sees it, H x W x 3, uint8, and what had to be done (ADJUSTED).

    file: a path, or an inode reference in `packed`. size: (height, width) that it must have; None: any. largest: more
    pixels than that are refused. Raises ValueError with the reason where the file is not such an image."""
    try:
        source = io.BytesIO(packed.read(int(file))) if packed else _file(str(file))
        with source, _open(source, largest) as image:
            frames = getattr(image, "n_frames", 1)
            if frames > 1 and image.format != "MPO":  # what phones write: a photograph and its preview
                raise ValueError(f"has {frames} frames; save one of them")
            if size is not None and resize is None and size not in (image.size, image.size[::-1]):
                raise ValueError(_other_size(image.size, size))  # before it takes any memory
            rgb, done = as_seen.adjusted(image)
            if size is not None and resize is None and rgb.size != size[::-1]:
                raise ValueError(_other_size(rgb.size, size))
            return np.asarray(resize_and_crop(rgb, resize) if resize else rgb), done
    except FileNotFoundError:
        raise ValueError("a link that leads nowhere" if Path(str(file)).is_symlink() else "not found") from None
    except ValueError:
        raise
    except Exception as error:  # a damaged file can bring about anything in a decoder
        if full_memory(error):
            raise
        reason = f"cannot be decoded: {type(error).__name__} {error}"
        if isinstance(error, (OSError, SyntaxError, EOFError)):  # the second is PIL's for broken PNG chunks
            reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error)
        raise ValueError(reason) from None


def _file(path: str) -> BinaryIO:
    """Open a regular file. Raises ValueError for anything else, OSError where it cannot be read."""
    kind = os.stat(path).st_mode  # noqa: PTH116 - half the time of Path's
    if stat.S_ISDIR(kind):
        if Path(path).is_symlink():
            raise ValueError("a link to a folder, which is not followed")
        os.scandir(path).close()  # says why it cannot be listed
        raise ValueError("a folder")
    if not stat.S_ISREG(kind):  # a pipe would be waited for, for ever
        raise ValueError("not a regular file")
    if path.lower().endswith(UNREAD_SUFFIXES):  # camera raws look like TIFF, of which Pillow reads the small preview
        raise ValueError(f"{os.path.splitext(path)[1]} files are not read; {CONVERT}")  # noqa: PTH122
    return open(path, "rb")  # noqa: PTH123


def _open(source: BinaryIO, largest: int) -> Image.Image:
    """Return the image of which a file holds the bytes, not decoded yet. Raises ValueError where it is none of those
    that are read, or has more pixels than `largest`."""
    Image.MAX_IMAGE_PIXELS = largest  # Pillow warns of more, and refuses more than the double
    try:
        image = Image.open(source, formats=FORMATS)
        if (pixels := image.width * image.height) > largest:
            raise ValueError(TOO_LARGE.format(pixels, largest))
        return image
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        declared = re.findall(r"\d+", str(error))[:1]  # it was not opened
        raise ValueError(TOO_LARGE.format(*declared, largest)) from None
    except UnidentifiedImageError:
        source.seek(0)
        head = source.read(HEAD)
        if is_heic(head) and _reads_heic():
            source.seek(0)
            return Image.open(source, formats=("HEIF",))
        raise ValueError(why_not_read(head)) from None


def _reads_heic() -> bool:
    """Return whether the package pillow-heif is installed; Pillow then reads HEIC."""
    with contextlib.suppress(ImportError):
        importlib.import_module("pillow_heif").register_heif_opener()
        return True
    return False


def _other_size(found: tuple[int, int], wanted: tuple[int, int]) -> str:
    """Say which (width, height) an image has instead of (height, width)."""
    return (
        f"{found[0]}x{found[1]} pixels, not {wanted[1]}x{wanted[0]} as the first image "
        "(data.resize brings all to one size)"
    )


def digests_of(images: np.ndarray) -> bytes:
    """Return the digests of the pixels of each of N x H x W x 3 uint8, one after the other: N x DIGEST_BYTES."""
    return b"".join(hashlib.blake2b(image.data, digest_size=DIGEST_BYTES).digest() for image in images)


def summarise(report: ChunkReport, images: np.ndarray) -> None:
    """Fill in the checksum, digests and sums of N x H x W x 3 uint8."""
    report.crc = zlib.crc32(images.data)
    report.digests = digests_of(images)
    counts = [np.bincount(images[..., c].reshape(-1), minlength=256).astype(np.int64) for c in range(3)]
    values = np.arange(256, dtype=np.int64)
    report.sums = tuple(int((n * values).sum()) for n in counts)  # type: ignore[assignment]
    report.squares = tuple(int((n * values**2).sum()) for n in counts)  # type: ignore[assignment]


def decode_chunk(chunk: Chunk) -> ChunkReport:
    """Decode a chunk and write it at its place in the output file, which must exist.

    Raises UserError where there is no memory for an image.
    """
    report = ChunkReport(chunk.index, chunk.first)
    images = np.zeros((len(chunk.files), *chunk.size, 3), np.uint8)
    with SquashfsImage(chunk.image) if chunk.image else contextlib.nullcontext() as packed:
        for i, file in enumerate(chunk.files):
            try:
                images[i], done = read_adjusted(file, chunk.size, chunk.resize, packed, chunk.largest)
                if done:
                    report.adjusted.update(done)
                    if "rescaled" in done:
                        report.dark += bool((images[i] >= DARK).mean() < BRIGHT_SHARE)
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
    """Write the bytes of an array at an offset of an existing file."""
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
