"""How hard the contrastive task is for each image of the pool."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moco.training import features
from moco.views.views import Views

BLOCK = 4096  # images whose similarities with the negatives are held at a time


def contrastive_losses(
    network: nn.Module, images: np.ndarray, views: Views, *, queue: int, temperature: float, count: int, seed: int,
    batch_size: int, device: torch.device, precision: torch.dtype,
) -> Tensor:  # fmt: skip
    """Return the InfoNCE loss (arXiv 1911.05722, equation 1) of every image, N.

    It is the mean over all ordered pairs of `count` random views of the image. One network with its projection, in
    evaluation mode, makes queries and keys. The negatives are `queue` other images, as many as there are at most, in
    one view. images: N x H x W x 3 uint8.
    """
    generator = torch.Generator().manual_seed(seed)

    def embed() -> Tensor:
        found = features.extract(
            network, images, lambda batch: views(views.to_unit(batch), generator), batch_size=batch_size,
            device=device, precision=precision,
        )  # fmt: skip
        return F.normalize(found, dim=1)

    embedded = [embed() for _ in range(count)]
    others = torch.randperm(len(images), generator=generator)[:queue]
    negatives = embedded[0][others].to(device)
    total = torch.zeros(len(images))
    for first in range(0, len(images), BLOCK):
        parts = [each[first : first + BLOCK].to(device) for each in embedded]
        own = others.to(device) == torch.arange(first, first + len(parts[0]), device=device)[:, None]
        for query in parts:
            # An image is no negative of its own.
            against = (query @ negatives.T / temperature).masked_fill(own, -torch.inf).logsumexp(1)
            for key in parts:
                if key is not query:
                    positive = (query * key).sum(1) / temperature
                    total[first : first + BLOCK] += (torch.logaddexp(positive, against) - positive).cpu()
    return total / (count * (count - 1))
