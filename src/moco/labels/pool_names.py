"""Names and, for drawn images, labels of what is in the unlabelled pool."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from moco.data.cache import DecodedSplit
from moco.data.class_tree import class_tree, pool_folder
from moco.data.decode import ChunkReport, read_image, summarise
from moco.data.generated import CLASSES
from moco.data.manifest import Manifest
from moco.errors import Say, UserError
from moco.settings.data import DataConfig


def pool_names(rows: np.ndarray, config: DataConfig, manifest: Manifest, pool: DecodedSplit, say: Say) -> list[str]:
    """Return the names of the given rows as label files have them.

    A name is `17.png`, or in a class tree the path below the pool's folder. Raises UserError where the files of a class
    tree are no longer those that were decoded.
    """
    numbers = manifest.pool_numbers()
    if config.source != "classes":
        return [f"{number}.png" for number in numbers[rows].tolist()]
    root = Path(config.path)
    paths = class_tree(root, say).splits["unlabeled"].paths or []
    folder, found, size = pool_folder(root), [], (manifest.height, manifest.width)
    for row in rows.tolist():
        report = ChunkReport(0, 0)
        try:
            image = read_image(paths[numbers[row]], size, manifest.resize, largest=config.max_pixels)
            summarise(report, np.ascontiguousarray(image)[None])
        except (IndexError, ValueError):
            pass
        if report.digests != bytes(pool.digests[row]):
            raise UserError(f"{folder}: its files have changed since `moco data` decoded them; run `moco data` again")
        found.append(str(Path(paths[numbers[row]]).relative_to(folder)))
    return found


def drawn_labels(rows: np.ndarray, config: DataConfig) -> np.ndarray:
    """Return the labels that the generator drew for the given rows of its pool.

    Raises ValueError for images of another source, whose true labels nobody knows.
    """
    if config.source != "generated":
        raise ValueError(f"{config.source}: nobody knows the truth of these images")
    return rows % len(CLASSES)
