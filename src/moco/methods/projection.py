"""The projection that a contrastive loss acts on, in place of an encoder's last layer."""

from __future__ import annotations

from torch import Tensor, nn

from moco.encoders.encoder import feature_width, last_width
from moco.encoders.small_resnet import SmallResNet


def with_head(encoder: nn.Module, dim: int, mlp: bool) -> nn.Module:
    """Replace the last layer by the projection: linear (MoCo v1), or two layers with ReLU (MoCo v2, SimCLR).

    The projection sees the last stage alone: where the contrastive loss acts on earlier stages too, these lose what
    makes them worth having.
    """
    width = last_width(encoder)
    linear = nn.Linear(width, dim)
    head = nn.Sequential(nn.Linear(width, width), nn.ReLU(inplace=True), linear) if mlp else linear
    encoder.fc = head if width == feature_width(encoder) else nn.Sequential(LastFeatures(width), head)
    if isinstance(encoder, SmallResNet):
        encoder.skip_auxiliary_features = True
    return encoder


class LastFeatures(nn.Module):
    """Of N x D features the last `width`, which in training may be all there are."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, features: Tensor) -> Tensor:
        """Return N x width for features N x D."""
        return features[:, -self.width :]
