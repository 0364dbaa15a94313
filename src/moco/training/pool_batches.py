"""Images without labels beside those with them: consistency training by pseudo-labels, for `finetune`."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moco.data.batches import EpochSampler, gather
from moco.views.views import Views


class PoolBatches:
    """Batches of the pool, by the step's number alone, and their loss.

    images: N x H x W x 3 uint8; count: of a batch, at most N; weak, strong: views of an image; confidence: what the
    network must be sure of at least.
    """

    def __init__(
        self, images: np.ndarray, count: int, seed: int, weak: Views, strong: Views, confidence: float
    ) -> None:
        self.images, self.weak, self.strong, self.confidence = images, weak, strong, confidence
        self.sampler = EpochSampler(np.arange(len(images)), count, seed)
        self.next = -1
        self.rows: Iterator[np.ndarray] = iter(())

    def read(self, number: int) -> Tensor:
        """Return the batch of a step, uint8, count x H x W x 3.

        It is the same for the same step, whether those before it were read or not.
        """
        epoch, batch = divmod(number, self.sampler.batches_per_epoch)
        if number != self.next or batch == 0:
            self.rows = self.sampler.epoch(epoch, batch)
        self.next = number + 1
        return torch.from_numpy(gather(self.images, next(self.rows)))

    def views(self, number: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return (weak, strong) views of the same images, count x 3 x H x W each."""
        images = self.weak.to_unit(self.read(number))
        return self.weak(images, generator), self.strong(images, generator)

    def targets(self, network: nn.Module, weak: Tensor) -> tuple[Tensor, Tensor]:
        """Return (labels, 1.0 where the network is sure of the label and 0.0 elsewhere), count each."""
        with torch.no_grad():
            chance, label = F.softmax(network(weak).float(), 1).max(1)
        return label, (chance >= self.confidence).float()


def pseudo_label_loss(outputs: Tensor, labels: Tensor, sure: Tensor) -> Tensor:
    """Return FixMatch's loss on images without labels (arXiv 2001.07685, equation 4).

    It is the mean over all of them; those that the network is not sure of count 0. outputs: B x C, of strong views.
    """
    return (F.cross_entropy(outputs.float(), labels, reduction="none") * sure).mean()
