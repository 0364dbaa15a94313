"""Momentum contrast: He et al. 2020 (MoCo, arXiv 1911.05722), Chen et al. 2020 (MoCo v2, arXiv 2003.04297).

Shapes: B images in a batch (in this process), G in all processes together (B where there is one), D the width of an
embedding, K the length of the queue.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moco.methods.method import Method, ProcessGroup
from moco.methods.projection import with_head

if TYPE_CHECKING:
    from moco.settings.pretrain import PretrainConfig


class Contrast(NamedTuple):
    """What one forward pass gives for this process's images.

    The fields are the loss (scalar), the accuracy of picking the positive (scalar, no gradient), and the keys (B or 2 B
    x D, unit length) that are to be enqueued once the step is taken.
    """

    loss: Tensor
    accuracy: Tensor
    keys: Tensor


TIE = 1e-5  # cosine similarities that differ by less, as products of float32 do by rounding, are equal


def info_nce(queries: Tensor, keys: Tensor, queue: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Return the mean InfoNCE loss and the fraction of queries whose positive has the largest logit.

    Each query has one positive, and the queue gives the negatives (MoCo, equation 1). queries, keys: B x D, unit
    length, row i of both from the same image. queue: K x D, unit length. A tie, which rounding may hide, does not count
    as correct: collapsed features have only ties.
    """
    with torch.autocast(queries.device.type, enabled=False):  # similarities are divided by a small temperature
        queries = queries / temperature  # of B x D numbers, where the logits are B x K
        positive = (queries * keys).sum(1, keepdim=True)  # B x 1
        negative = queries @ queue.T  # B x K
        logits = torch.cat([positive, negative], 1)
    target = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
    with torch.no_grad():
        accuracy = (positive - negative.amax(1, keepdim=True) > TIE / temperature).float().mean()
    return F.cross_entropy(logits, target), accuracy


class MomentumContrast(Method):
    """A query encoder, its exponential moving average (the key encoder) and a queue of keys.

    A step is: `contrast = model(a, b)`; `contrast.loss.backward()`; the optimizer's step;
    `model.update(contrast.keys, momentum)`. The queue and the key encoder change only in `update`, in
    place, after the backward pass: nothing has to be cloned (algorithm 1 of the paper has this order too).
    With peers, all of them enqueue the same keys in the same order; keys are for the caller to gather, and gradients
    to average.
    """

    momentum_encoder = True
    queue: Tensor
    cursor: Tensor

    def __init__(
        self, encoder: nn.Module, *, dim: int, queue_length: int, temperature: float, mlp: bool,
        symmetric: bool, shuffle: bool, peers: ProcessGroup | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.query_encoder = with_head(encoder, dim, mlp)
        self.key_encoder = copy.deepcopy(self.query_encoder).requires_grad_(False)
        self.temperature = temperature
        self.symmetric = symmetric
        self.shuffle = shuffle
        self.peers = peers
        self.register_buffer("queue", F.normalize(torch.randn(queue_length, dim), dim=1))
        self.register_buffer("cursor", torch.zeros((), dtype=torch.long))

    @classmethod
    def build(cls, encoder: nn.Module, settings: PretrainConfig, peers: ProcessGroup | None) -> MomentumContrast:
        """Return the method that the settings ask for."""
        return cls(
            encoder, dim=settings.dim, queue_length=settings.queue, temperature=settings.temperature,
            mlp=settings.head == "mlp", symmetric=settings.loss == "symmetric", shuffle=settings.shuffle, peers=peers,
        )  # fmt: skip

    @property
    def encoder(self) -> nn.Module:
        """Return the query encoder, which is trained and kept."""
        return self.query_encoder

    @torch.no_grad()
    def encode_keys(self, images: Tensor, generator: torch.Generator | None, parts: int = 1) -> Tensor:
        """Return the keys of images, B x D.

        With `shuffle` the order is shuffled on the way in and restored on the way out, over all processes, so that
        query and key of an image meet different BatchNorm statistics (section 3.3 of the paper). parts: the number of
        parts in which the images go through the encoder, each with statistics of its own.
        """

        def encode(x: Tensor) -> Tensor:
            return torch.cat(
                [F.normalize(self.encode("key_encoder", part).float(), dim=1) for part in x.tensor_split(parts)]
            )

        def move(places: Tensor) -> Tensor:
            return places.to(images.device, non_blocking=True)

        if not self.shuffle:
            return encode(images)
        everything = self._gather(images.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)  # as channels-last images lie
        # Drawn on the CPU: the same order on every device and in every process, and no wait for the device.
        order = torch.randperm(len(everything), generator=generator)
        back = torch.argsort(order)
        own = self._own(len(images))
        return self._gather(encode(everything[move(order[own])]))[move(back[own])]

    def _gather(self, part: Tensor) -> Tensor:
        return part if self.peers is None else self.peers.gather(part)

    def _own(self, count: int) -> slice:
        """Return where this process's `count` images stand in the whole batch."""
        first = 0 if self.peers is None else self.peers.rank * count
        return slice(first, first + count)

    def encode_queries(self, images: Tensor, slot: int = 0) -> Tensor:
        """Return the queries of a batch, B x D, unit length, with gradient.

        slot: another one for each call of a step.
        """
        return F.normalize(self.encode("query_encoder", images, slot).float(), dim=1)

    def forward(self, a: Tensor, b: Tensor, generator: torch.Generator | None = None) -> Contrast:
        """Return loss, accuracy and keys for two views of the same images.

        a, b: the views, B x 3 x H x W each. generator: on the CPU, for shuffling. An asymmetric loss takes the queries
        from a and the keys from b. A symmetric loss does both ways, and the losses are averaged.
        """
        keys = self.targets(a, b, generator)
        loss, accuracy = self.loss(a, b, keys)
        return Contrast(loss, accuracy, torch.cat(keys))

    def targets(self, a: Tensor, b: Tensor, generator: torch.Generator | None, parts: int = 1) -> list[Tensor]:
        """Return the keys of b, and for a symmetric loss those of a."""
        return [self.encode_keys(view, generator, parts) for view in ((b, a) if self.symmetric else (b,))]

    def loss(self, a: Tensor, b: Tensor, targets: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Return loss and accuracy of some images of the batch; targets: their keys."""
        loss, accuracy = info_nce(self.encode_queries(a), targets[0], self.queue, self.temperature)
        if not self.symmetric:
            return loss, accuracy
        loss_b, accuracy_b = info_nce(self.encode_queries(b, 1), targets[1], self.queue, self.temperature)
        return (loss + loss_b) / 2, (accuracy + accuracy_b) / 2

    @torch.no_grad()
    def update(self, targets: Tensor | None, momentum: float) -> None:
        """Move the key encoder towards the query encoder (equation 2) and enqueue keys.

        targets: the keys of all peers, one after the other. The queue is that of one process: all keys of b, then all
        of a.
        """
        torch._foreach_lerp_(list(self.key_encoder.parameters()), list(self.query_encoder.parameters()), 1.0 - momentum)
        views, size = 2 if self.symmetric else 1, 1 if self.peers is None else self.peers.size
        if targets is None:
            raise ValueError("there are no keys to enqueue")
        self.enqueue(targets.view(size, views, -1, targets.shape[1]).transpose(0, 1).flatten(0, 2))

    @torch.no_grad()
    def enqueue(self, keys: Tensor) -> None:
        """Overwrite the oldest keys; the queue is a ring, so neither length need divide the other."""
        length = len(self.queue)
        keys = keys[-length:]
        places = (self.cursor + torch.arange(len(keys), device=keys.device)) % length
        self.queue.index_copy_(0, places, keys.to(self.queue.dtype))
        self.cursor.add_(len(keys)).remainder_(length)
