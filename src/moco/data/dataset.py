"""A dataset, whatever its source: splits of images, some with labels."""

from __future__ import annotations

from collections.abc import Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moco.errors import present


@dataclass
class Split:
    """Images of one split: files (`paths`) or an array (N x H x W x 3, uint8), and int64 labels or None.

    folder: what messages leave out of paths; without it they say the last names alone.
    image, inodes: with them the files lie in this squashfs image, at these inode references."""

    name: str
    paths: list[str] | None = None
    array: np.ndarray | None = None
    labels: np.ndarray | None = None
    folder: Path | None = None
    image: Path | None = None
    inodes: list[int] | None = None

    def keep(self, numbers: np.ndarray) -> None:
        """Keep these images alone, in this order, with their labels."""
        self.paths = None if self.paths is None else [self.paths[number] for number in numbers]
        self.inodes = None if self.inodes is None else [self.inodes[number] for number in numbers]
        self.array = None if self.array is None else self.array[numbers]
        self.labels = None if self.labels is None else self.labels[numbers]

    @property
    def files(self) -> Sequence[str | int]:
        """Return the images as `decode.read_image` takes them."""
        return self.inodes if self.inodes is not None else self.paths or []

    def __len__(self) -> int:
        items: Sized | None = self.paths if self.array is None else self.array
        return len(present(items, "images of this split"))

    def image_name(self, index: int) -> str:
        """Return how a message names the image: its path within the split's folder, or its number."""
        if not self.paths:
            return f"{self.name}[{index}]"
        path = Path(self.paths[index])
        return f"{self.name}/{path.relative_to(self.folder) if self.folder else path.name}"


@dataclass
class Dataset:
    """`classes`: the names where the source has them. `origin`: what the manifest says of the source."""

    splits: dict[str, Split]
    classes: list[str] | None
    origin: dict[str, Any]
