"""Images that are nearly the same, so that nobody is asked twice about one."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

SIDE = 8  # pixels of the small pictures that are compared
ALIKE = 4.0  # levels of 255 by which two of them may differ on average
BLOCK = 512  # rows compared at a time
PICTURES = 1024  # images made small at a time


def small_pictures(images: np.ndarray) -> Tensor:
    """Return the averages over the fields of an 8 x 8 grid, each channel: N x H x W x 3 uint8 -> N x 192."""
    found = []
    for first in range(0, len(images), PICTURES):
        part = torch.from_numpy(np.array(images[first : first + PICTURES])).permute(0, 3, 1, 2).float()
        found.append(torch.nn.functional.adaptive_avg_pool2d(part, SIDE).flatten(1))
    return torch.cat(found) if found else torch.empty(0, 3 * SIDE * SIDE)


def deduplicate(pictures: Tensor, known: Tensor) -> Tensor:
    """Return N booleans: whether a picture is unlike all known ones and unlike all kept ones before it.

    pictures: N x 192; known: M x 192.
    """
    limit = ALIKE * pictures.shape[1]
    kept = torch.ones(len(pictures), dtype=torch.bool)
    for first in range(0, len(pictures), BLOCK):
        part = pictures[first : first + BLOCK]
        open_rows = kept[first : first + BLOCK]  # a view
        for others in (*known.split(BLOCK), *pictures[:first][kept[:first]].split(BLOCK)):
            if len(others):
                open_rows &= ~(torch.cdist(part, others, p=1) < limit).any(1)
        alike = torch.cdist(part, part, p=1) < limit
        for row in open_rows.nonzero().flatten().tolist():
            if open_rows[row]:
                open_rows[row + 1 :] &= ~alike[row, row + 1 :]
    return kept
