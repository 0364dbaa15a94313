"""A network whose last layer stands apart, for libraries that put it elsewhere."""

from __future__ import annotations

from torch import Tensor, nn


class HeadApart(nn.Module):
    """A body that returns features, N x `width`, and the last layer `fc`."""

    def __init__(self, body: nn.Module, width: int, num_outputs: int) -> None:
        super().__init__()
        self.body = body
        self.fc = nn.Linear(width, num_outputs)

    def forward(self, images: Tensor) -> Tensor:
        """Return N x `num_outputs` for images, N x 3 x H x W."""
        outputs: Tensor = self.fc(self.body(images))
        return outputs
