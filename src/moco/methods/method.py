"""What a method of self-supervision is to the training step, and which methods there are.

To add one: write a file beside this one with a class that has these members, and name it in `methods`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from moco.settings.pretrain import PretrainConfig


class ProcessGroup(Protocol):
    """The processes that share a batch; each has an equal, consecutive part of it, in the order of ranks."""

    @property
    def rank(self) -> int:
        """Return the number of this process, from 0."""

    @property
    def size(self) -> int:
        """Return how many processes there are."""

    def gather(self, part: Tensor) -> Tensor:
        """Return the parts of all along the first dimension, without gradient."""

    def gather_with_gradient(self, part: Tensor) -> Tensor:
        """Return the parts of all along the first dimension; gradients flow back to every process's own part."""


class Encode(Protocol):
    """A faster call of an encoder. Of two calls before the backward pass of the first, one takes another slot."""

    def __call__(self, images: Tensor, slot: int = 0) -> Tensor:
        """Return the encoder's outputs for images, B x 3 x H x W."""


class Method(nn.Module):
    """An encoder with a projection, and the loss that trains both. The step calls `targets`, then `loss` for each
    micro-batch, then `update` once the optimizer has taken its step.

    quick: faster calls of encoders that stand for the usual ones, by the name of the attribute; see Encode.
    """

    momentum_encoder = False  # whether `update` uses its momentum

    def __init__(self) -> None:
        super().__init__()
        self.quick: dict[str, Encode] = {}

    @property
    def encoder(self) -> nn.Module:
        """Return the encoder that is trained and kept, with its projection as `fc`."""
        raise NotImplementedError

    def targets(self, a: Tensor, b: Tensor, generator: torch.Generator | None, parts: int = 1) -> list[Tensor]:
        """Return what the loss compares with, computed without gradient for a whole batch: each B x D; [] for none.

        a, b: two views of B images, B x 3 x H x W each. generator: on the CPU. parts: micro-batches that the images go
        through the network in.
        """
        return []

    def loss(self, a: Tensor, b: Tensor, targets: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Return the mean loss of some images of the batch and the fraction whose positive is found, both scalars.

        targets: of `targets`, the rows that belong to these images.
        """
        raise NotImplementedError

    def update(self, targets: Tensor | None, momentum: float) -> None:
        """Do what follows the optimizer's step. targets: those of all processes, one after the other; None for none."""

    def encode(self, name: str, images: Tensor, slot: int = 0) -> Tensor:
        """Return the outputs of the encoder with this attribute name. slot: another one for each call of a step."""
        if name in self.quick:
            return self.quick[name](images, slot)
        outputs: Tensor = getattr(self, name)(images)
        return outputs


Build = Callable[[nn.Module, "PretrainConfig", ProcessGroup | None], Method]


def methods() -> dict[str, Build]:
    """Return how to build each method: from an encoder, the settings and the processes that share a batch."""
    from moco.methods.momentum_contrast import MomentumContrast
    from moco.methods.simclr import SimCLR

    return {"moco_v2": MomentumContrast.build, "simclr": SimCLR.build}
