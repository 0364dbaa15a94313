"""SimCLR: Chen et al. 2020 (arXiv 2002.05709). The negatives of an image are the other images of its batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moco.methods.method import Method, ProcessGroup
from moco.methods.projection import with_head

if TYPE_CHECKING:
    from moco.settings.pretrain import PretrainConfig


def nt_xent(a: Tensor, b: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Return the NT-Xent loss (equation 1) and the fraction of views whose positive is nearest of all, both scalars.

    a, b: N x D, unit length, row i of both from the same image. Each of the 2 N views has one positive and 2 N - 2
    negatives. A tie does not count as correct.
    """
    with torch.autocast(a.device.type, enabled=False):  # similarities are divided by a small temperature
        views = torch.cat([a, b])
        similar = (views @ views.T / temperature).fill_diagonal_(-torch.inf)  # 2 N x 2 N
    target = torch.arange(len(views), device=a.device).roll(len(a))
    with torch.no_grad():
        positive = similar.gather(1, target[:, None])
        accuracy = ((similar >= positive).sum(1) == 1).float().mean()
    return F.cross_entropy(similar, target), accuracy


class SimCLR(Method):
    """One encoder for both views. In several processes the negatives are those of the whole batch."""

    def __init__(
        self, encoder: nn.Module, *, dim: int, temperature: float, mlp: bool, peers: ProcessGroup | None = None
    ):
        super().__init__()
        self.query_encoder = with_head(encoder, dim, mlp)
        self.temperature, self.peers = temperature, peers

    @classmethod
    def build(cls, encoder: nn.Module, settings: PretrainConfig, peers: ProcessGroup | None) -> SimCLR:
        """Return the method that the settings ask for."""
        mlp = settings.head == "mlp"
        return cls(encoder, dim=settings.dim, temperature=settings.temperature, mlp=mlp, peers=peers)

    @property
    def encoder(self) -> nn.Module:
        """Return the encoder that is trained and kept."""
        return self.query_encoder

    def loss(self, a: Tensor, b: Tensor, targets: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Return the NT-Xent loss of the batch of all processes, and its accuracy."""
        embedded = [F.normalize(self.encode("query_encoder", view, slot).float()) for slot, view in enumerate((a, b))]
        if self.peers is not None and self.peers.size > 1:
            embedded = [self.peers.gather_with_gradient(each) for each in embedded]
        return nt_xent(embedded[0], embedded[1], self.temperature)
