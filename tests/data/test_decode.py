"""Files of every kind that is read."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from moco.data.decode import read_image


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
