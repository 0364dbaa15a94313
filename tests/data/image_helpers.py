"""Image files of kinds that Pillow does not write, and the ways in which EXIF says that a picture lies."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

# How a picture is stored for each of EXIF's orientations: the camera was held so.
STORED: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda upright: upright,
    2: lambda upright: upright[:, ::-1],
    3: lambda upright: upright[::-1, ::-1],
    4: lambda upright: upright[::-1],
    5: lambda upright: upright.transpose(1, 0, 2),
    6: lambda upright: np.rot90(upright, 1),
    7: lambda upright: upright[::-1, ::-1].transpose(1, 0, 2),
    8: lambda upright: np.rot90(upright, -1),
}


def oriented(upright: np.ndarray, orientation: int, kind: str, **options: object) -> bytes:
    """Return a file of that kind which holds the picture as a camera stores it, with EXIF's word on how it lies."""
    exif = Image.Exif()
    exif[274] = orientation
    buffer = io.BytesIO()
    image = Image.fromarray(np.ascontiguousarray(STORED[orientation](upright)))
    image.save(buffer, kind, exif=exif, **options)
    return buffer.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    """Return a chunk of a PNG file."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(bits: int, color: int, rows: list[bytes], width: int, *, before: bytes = b"", after: bytes = b"") -> bytes:
    """Return a PNG file of any depth and colour type. before, after: chunks around the pixels."""
    header = struct.pack(">IIBBBBB", width, len(rows), bits, color, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row for row in rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + before + chunk(b"IDAT", pixels) + after + chunk(b"IEND", b"")


def picture(height: int = 10, width: int = 14) -> np.ndarray:
    """Slopes of three colours, of which no two corners are alike."""
    y, x = np.mgrid[:height, :width]
    return np.stack([y * 200 // height, x * 200 // width, (x + 2 * y) * 4], 2).astype(np.uint8)


RED, WHITE = [255, 0, 0], [255, 255, 255]
ALPHA = np.array([[0, 64, 255]], np.uint8)
KEY16 = chunk(b"tRNS", struct.pack(">H", 40000))


def saved(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def rgba() -> Image.Image:
    """Red all over; clear, a quarter there, and opaque."""
    return Image.fromarray(np.dstack([np.full((1, 3, 3), RED, np.uint8), ALPHA]), "RGBA")


def palette(transparency: bytes | int) -> bytes:
    image = Image.fromarray(np.array([[0, 1, 2]], np.uint8), "P")
    image.putpalette([*RED, *RED, *RED])
    return saved(image, transparency=transparency)


LEVELS = [WHITE, [255, 191, 191], RED]  # of rgba() on white
GRAY = [WHITE, [191] * 3, [0] * 3]
TRANSPARENT: dict[str, tuple[bytes, list[list[int]]]] = {
    "RGBA": (saved(rgba()), LEVELS),
    "RGBA WebP": (saved(rgba(), "WEBP", lossless=True, exact=True), LEVELS),
    "RGBA TIFF": (saved(rgba(), "TIFF"), LEVELS),
    "LA": (saved(Image.merge("LA", [Image.new("L", (3, 1)), Image.fromarray(ALPHA)])), GRAY),
    "palette": (palette(bytes([0, 64, 255])), LEVELS),
    "palette, one colour": (palette(1), [RED, WHITE, RED]),
    "GIF": (saved(Image.fromarray(np.array([[0, 1, 1]], np.uint8), "P"), "GIF", transparency=1),
            [[0] * 3, WHITE, WHITE]),
    "RGB with a key": (png(8, 2, [bytes([*RED, 1, 2, 3, *RED])], 3, before=chunk(b"tRNS", struct.pack(">3H", *RED))),
                       [WHITE, [1, 2, 3], WHITE]),
    "L with a key": (png(8, 0, [bytes([7, 8, 7])], 3, before=chunk(b"tRNS", b"\0\x07")), [WHITE, [8] * 3, WHITE]),
    "4 bits with a key": (png(4, 0, [b"\x12\x30"], 3, before=chunk(b"tRNS", b"\0\x02")), [[17] * 3, WHITE, [51] * 3]),
    "2 bits with a key": (png(2, 0, [b"\x18"], 3, before=chunk(b"tRNS", b"\0\x01")), [[0] * 3, WHITE, [170] * 3]),
    "1 bit with a key": (png(1, 0, [b"\x40"], 3, before=chunk(b"tRNS", b"\0\0")), [WHITE, WHITE, WHITE]),
    "16 bits with a key": (png(16, 0, [struct.pack(">3H", 40000, 40001, 0)], 3, before=KEY16),
                           [WHITE, [156] * 3, [0] * 3]),
    "16 bits LA": (png(16, 4, [struct.pack(">6H", 0, 0, 0, 64 << 8, 0, 65535)], 3), GRAY),
    "16 bits RGBA": (png(16, 6, [struct.pack(">12H", 65535, 0, 0, 0, 65535, 0, 0, 64 << 8, 65535, 0, 0, 65535)], 3),
                     LEVELS),
}  # fmt: skip


VALUES = np.array([[0, 255, 256, 40000, 65535]], np.uint16)
UPPER = [0, 0, 1, 156, 255]
WIDE = struct.pack(">5H", *VALUES[0].tolist())
RESCALED: dict[str, tuple[bytes, list[int]]] = {
    "gray PNG": (png(16, 0, [WIDE], 5), UPPER),
    "gray TIFF": (saved(Image.fromarray(VALUES), "TIFF"), UPPER),
    "white is zero": (saved(Image.fromarray(VALUES), "TIFF", tiffinfo={262: 0}), [255 - value for value in UPPER]),
    "32 bits": (saved(Image.fromarray(VALUES.astype(np.int32)), "TIFF"), UPPER),
    "PGM": (b"P5 5 1 65535\n" + WIDE, UPPER),
    "PGM of 12 bits": (b"P5 2 1 4095\n" + struct.pack(">2H", 0, 4095), [0, 255]),
    "PPM": (b"P6 1 1 65535\n" + struct.pack(">3H", 65535, 65535, 65535), [255]),
    "colour PNG": (png(16, 2, [b"".join(struct.pack(">3H", v, v, v) for v in VALUES[0].tolist())], 5), UPPER),
    "float": (saved(Image.fromarray(np.array([[0, 0.25, 0.5, 1]], np.float32)), "TIFF"), [0, 64, 128, 255]),
}
