"""extra_labels.pth: the extra labels that a classifier was trained on, kept beside it for stages that train it further.

The file that people write may have more answers by then.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moco.data.batches import gather
from moco.data.cache import DecodedSplit
from moco.data.decode import digests_of
from moco.errors import UserError
from moco.weights import load_weights

EXTRA_LABELS = "extra_labels.pth"
CONTENT = "train_extra.content"  # a setting of classifiers with extra labels: which they are


def content(digests: np.ndarray, labels: np.ndarray) -> str:
    """Return a digest of images and labels. digests: M x 16 uint8; labels: M int64."""
    return hashlib.sha256(digests.tobytes() + labels.astype("<i8").tobytes()).hexdigest()


def packed(extra: DecodedSplit, pool: DecodedSplit) -> dict[str, Any]:
    """Return what the file holds: images of the pool by their digests, all others as they are."""
    known = set(map(bytes, pool.digests))
    own = [row for row, digest in enumerate(extra.digests) if bytes(digest) not in known]
    arrays = {"digests": extra.digests, "labels": extra.known_labels, "own": extra.images[own]}
    return {"format": 1, **{name: torch.from_numpy(array.copy()) for name, array in arrays.items()}}


def read_extra(folder: Path, pool: DecodedSplit, settings: dict[str, str]) -> DecodedSplit | None:
    """Return the extra labels of the classifier in the folder; None where it was made without any.

    settings: the classifier's. Raises UserError where the file is missing, damaged or another one, or the pool has
    changed.
    """
    if CONTENT not in settings:
        return None
    path, hint = folder / EXTRA_LABELS, "run `moco train_extra` again"
    found = load_weights(path, hint)
    try:
        digests, labels, own = (found[name].numpy() for name in ("digests", "labels", "own"))
        rows = {bytes(digest): row for row, digest in enumerate(pool.digests)}
        places = np.array([rows.get(bytes(digest), -1) for digest in digests], np.int64)
        inside = places >= 0
        if digests_of(own) != digests[~inside].tobytes():
            raise ValueError("the pool has changed")
        images = np.empty((len(places), *pool.images.shape[1:]), np.uint8)
        images[inside] = gather(pool.images, places[inside])
        images[~inside] = own
    except (KeyError, TypeError, ValueError, IndexError, AttributeError):
        raise UserError(f"{path}: not of this data; {hint}") from None
    if content(digests, labels) != settings[CONTENT]:
        raise UserError(f"{path}: not the labels that the classifier beside it was trained on; {hint}")
    return DecodedSplit(images, labels, digests)
