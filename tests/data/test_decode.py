"""Images of more than 8 bits a channel, which would lose what they hold, are refused whatever they are opened as."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from moco.data.decode import read_image


def png(path: Path, bits: int, color: int, channels: int) -> None:
    """A PNG file of 4 x 4 pixels, which Pillow cannot write with 16 bits a channel."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b"".join(b"\0" + bytes(range(4 * channels * bits // 8)) for _ in range(4))
    header = struct.pack(">IIBBBBB", 4, 4, bits, color, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) +
                     chunk(b"IEND", b""))  # fmt: skip


@pytest.mark.parametrize(("color", "channels"), [(0, 1), (2, 3), (4, 2), (6, 4)])
def test_sixteen_bits_a_channel_are_refused_in_a_png(color: int, channels: int, tmp_path: Path) -> None:
    path = tmp_path / "0.png"
    png(path, 8, color, channels)
    assert read_image(str(path), None, None).shape == (4, 4, 3)
    png(path, 16, color, channels)
    with pytest.raises(ValueError, match="more than 8 bits a channel"):
        read_image(str(path), None, None)


@pytest.mark.parametrize("largest", [255, 65535])
def test_sixteen_bits_a_channel_are_refused_in_a_ppm(largest: int, tmp_path: Path) -> None:
    path = tmp_path / "0.png"
    path.write_bytes(f"P6\n4 4\n{largest}\n".encode() + bytes(48 * (1 if largest == 255 else 2)))
    if largest == 255:
        assert read_image(str(path), None, None).shape == (4, 4, 3)
    else:
        with pytest.raises(ValueError, match="more than 8 bits a channel"):
            read_image(str(path), None, None)


@pytest.mark.parametrize("kind", ["png", "jpeg", "bmp", "webp", "ppm", "tiff", "gif"])
def test_eight_bits_are_read_from_every_kind(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "0.png"
    Image.fromarray(np.full((300, 300, 3), 90, np.uint8)).save(path, kind)
    assert abs(int(read_image(str(path), None, None).mean()) - 90) < 3


def test_sixteen_bits_a_pixel_are_read_from_a_bmp(tmp_path: Path) -> None:
    """5, 6 and 5 bits: fewer than 8 a channel."""
    head = struct.pack("<IiiHHIIiiII", 40, 4, 4, 1, 16, 3, 32, 0, 0, 0, 0) + struct.pack("<III", 0xF800, 0x07E0, 0x1F)
    size = 14 + len(head) + 32
    path = tmp_path / "0.png"
    path.write_bytes(b"BM" + struct.pack("<IHHI", size, 0, 0, 14 + len(head)) + head + b"\x00\xf8" * 16)
    assert read_image(str(path), None, None)[0, 0].tolist() == [255, 0, 0]
