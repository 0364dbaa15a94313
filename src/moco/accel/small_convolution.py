"""Convolutions of small images as products of matrices, where a CPU is faster at those.

The last stages of a ResNet see images of a few pixels and hundreds of channels. There the library's convolutions take
up to six times as long as the matrix product that they amount to, above all in the backward pass; on larger images, and
3x3 ones without matrix tiles, they are faster (benchmarks/README.md).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from moco.accel.processor import has_bf16_tiles

POINTS = 12 * 12  # pixels of the input: up to here the product is at least as fast as a 1x1 convolution
WINDOWS = 4 * 4  # pixels of the output: the same beside a 3x3 convolution, in bf16 on a processor with tiles


class SmallConv2d(nn.Conv2d):
    """nn.Conv2d, the same weights and the same result but for rounding; trains faster on small channels-last images.

    In evaluation it is nn.Conv2d: a classifier that is handed in gives the same bits where this class is not."""

    def forward(self, x: Tensor) -> Tensor:
        """Return N x C' x H' x W' for images, N x C x H x W."""
        if not self.training or x.device.type != "cpu" or not x.is_contiguous(memory_format=torch.channels_last):
            return super().forward(x)
        stride, (height, width) = self.stride[0], x.shape[2:]
        rows = x.permute(0, 2, 3, 1)
        if self.kernel_size == (1, 1) and height * width <= POINTS:
            rows = rows[:, ::stride, ::stride]
        elif self.kernel_size == (3, 3) and -(-height // stride) * -(-width // stride) <= WINDOWS and _in_tiles(x):
            rows = _Windows.apply(rows, stride)
        else:
            return super().forward(x)
        # As a matrix: of a batch of strided rows `linear` would make one product for each image.
        product = F.linear(rows.flatten(0, 2), self.weight.permute(0, 2, 3, 1).flatten(1), self.bias)
        return product.view(*rows.shape[:3], self.out_channels).permute(0, 3, 1, 2)


class _Windows(torch.autograd.Function):
    """N x H x W x C, padded by a pixel -> N x H' x W' x 9 C: what each output pixel of a 3x3 convolution sees.

    Its gradient is summed into one tensor; left to autograd, every shift would fill one of its own (2 to 4 times as
    long, benchmarks/README.md)."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, stride: int) -> Tensor:
        ctx.stride, ctx.shape = stride, rows.shape
        return torch.cat(_shifted(F.pad(rows, (0, 0, 1, 1, 1, 1)), stride), 3)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        n, height, width, channels = ctx.shape
        padded = gradient.new_zeros(n, height + 2, width + 2, channels)
        for place, part in zip(_shifted(padded, ctx.stride), gradient.split(channels, 3), strict=True):
            place.add_(part)
        return padded[:, 1:-1, 1:-1], None


def _shifted(padded: Tensor, stride: int) -> list[Tensor]:
    """Return the nine views of N x H + 2 x W + 2 x C that the weights of a 3x3 convolution meet: N x H' x W' x C each.

    They share the memory of `padded`.
    """
    height, width = padded.shape[1] - 2, padded.shape[2] - 2
    return [padded[:, i : i + height : stride, j : j + width : stride] for i in range(3) for j in range(3)]


def _in_tiles(x: Tensor) -> bool:
    """Return whether products with x will be computed tile by tile."""
    chosen = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    return chosen is torch.bfloat16 and has_bf16_tiles()


def use_small_convolutions(network: nn.Module) -> nn.Module:
    """Replace in place those convolutions of the network that can be products by SmallConv2d. Names stay."""
    kinds = ((1, 1), (0, 0)), ((3, 3), (1, 1))  # kernel and padding
    for layer in network.modules():
        if type(layer) is nn.Conv2d and (layer.kernel_size, layer.padding) in kinds:
            usual = layer.groups == 1 and layer.dilation == (1, 1) and layer.padding_mode == "zeros"
            if usual and layer.stride[0] == layer.stride[1]:
                layer.__class__ = SmallConv2d
    return network
