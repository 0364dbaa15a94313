"""A residual network for small images on CPUs.

This file imports nothing but torch: its text is copied into the `submission.py` that is handed in beside
the weights, so that the weights can be loaded where this package is not installed.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class SmallBlock(nn.Module):
    """One or two 3x3 convolutions beside a 1x1 shortcut, at half the resolution of the input.

    The average pooling comes first, not a strided convolution: the backward pass of strided convolutions is
    slow on CPUs (measured: the network trains 1.4 times faster with the pooling).
    Input: N x `inputs` x H x W. Output: N x `outputs` x H/2 x W/2.
    """

    def __init__(self, inputs: int, outputs: int, convolutions: int = 2) -> None:
        super().__init__()
        self.convolutions = convolutions
        self.pool = nn.AvgPool2d(2)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        if convolutions == 2:
            self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
            self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, bias=False)
        self.bn_shortcut = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """Return N x `outputs` x H/2 x W/2 for N x `inputs` x H x W."""
        x = self.pool(x)
        y = self.bn1(self.conv1(x))
        if self.convolutions == 2:
            y = self.bn2(self.conv2(self.relu(y)))
        return self.relu(y + self.bn_shortcut(self.shortcut(x)))  # type: ignore[no-any-return]


def pool_2x2(x: Tensor) -> Tensor:
    """Return the averages over the quarters of N x C x H x W, N x 4 C.

    In odd sizes the quarters share the middle, as in adaptive pooling, which Apple's MPS does not have for those sizes.
    """
    h, w = (x.shape[2] + 1) // 2, (x.shape[3] + 1) // 2
    halves = x[:, :, :h].mean(2), x[:, :, -h:].mean(2)  # N x C x W each
    return torch.stack([part.mean(2) for half in halves for part in (half[:, :, :w], half[:, :, -w:])], 2).flatten(1)


class SmallResNet(nn.Module):
    """Stem, one residual block per stage, averages, linear layer.

    The stem keeps the resolution with stride 1 (images up to about 40 pixels) and halves it with stride 2.
    Each stage halves the resolution; the first doubles the width of the stem, and so on.
    Features are the last stage's average over the image. With `pyramid` those of the stages between the first and the
    last stand before it, averaged over the quarters of the image: what a classifier wants and contrast does not keep.
    Input: N x 3 x H x W. Output: N x `num_classes`. `last_width` is the width of the last stage, `feature_width` that
    before the linear layer; in training with `skip_auxiliary_features` that layer gets the last stage's features only.
    """

    def __init__(
        self, num_classes: int, width: int = 24, stages: int = 4, stem_stride: int = 1, pyramid: bool = False,
        convolutions: int = 2,
    ) -> None:  # fmt: skip
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, stride=stem_stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.layers = nn.Sequential(
            *(SmallBlock(width << stage, width << (stage + 1), convolutions) for stage in range(stages))
        )
        self.last_width = width << stages
        self.between = range(1, stages - 1) if pyramid else range(0)  # places of the stages whose quarters are used
        self.skip_auxiliary_features = False  # as contrast does, which then need not wait for the quarters
        self.feature_width = self.last_width + sum(4 * width << (place + 1) for place in self.between)
        self.fc = nn.Linear(self.feature_width, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Return N x `num_classes` for images, N x 3 x H x W."""
        x = self.relu(self.bn1(self.conv1(x)))
        features = []
        for place, layer in enumerate(self.layers):
            x = layer(x)
            if place in self.between and not (self.training and self.skip_auxiliary_features):
                features.append(pool_2x2(x))
        return self.fc(torch.cat([*features, x.mean((2, 3))], 1))  # type: ignore[no-any-return]
