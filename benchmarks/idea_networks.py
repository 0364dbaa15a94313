"""Networks that ideas.py tries beside small_resnet, all with `fc` as the last layer."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from moco.encoders.small_resnet import SmallBlock, SmallResNet


def as_small_resnet(network: nn.Module) -> None:
    """Weights are drawn as there, those of replaced layers too."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


class NoPool(SmallBlock):
    """A block at the resolution of its input."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.pool = nn.Identity()  # type: ignore[assignment]


class PatchStem(SmallResNet):
    """The first convolution halves the resolution (4x4 at stride 2) and has the width of the first stage."""

    def __init__(self, num_classes: int, width: int, stages: int) -> None:
        super().__init__(num_classes, width, stages, pyramid=True)
        self.conv1 = nn.Conv2d(3, 2 * width, 4, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(2 * width)
        self.layers[0] = NoPool(2 * width, 2 * width)
        as_small_resnet(self)


class PlainStage(SmallBlock):
    """One convolution without a shortcut."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, convolutions=1)
        self.shortcut, self.bn_shortcut = nn.Identity(), nn.Identity()  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn1(self.conv1(self.pool(x))))


class PlainNet(SmallResNet):
    def __init__(self, num_classes: int, width: int, stages: int) -> None:
        super().__init__(num_classes, width, stages, pyramid=True)
        self.layers = nn.Sequential(*(PlainStage(width << s, width << (s + 1)) for s in range(stages)))
        as_small_resnet(self)


NETWORKS: dict[str, Callable[[int, int], nn.Module]] = {
    "patch_stem": lambda width, stages: PatchStem(1, width, stages),
    "plain": lambda width, stages: PlainNet(1, width, stages),
}
