"""BatchNorm of a GPU's training steps as Triton kernels: all parts of a batch at once, in few passes over the images.

PyTorch's own kernels for channels-last images reach a sixth of the memory's rate where they take statistics, are
started for each part, and the parts are put together by one more copy (benchmarks/README.md). Here images are read
twice and written once in the forward pass, images and gradients read twice in the backward pass, and sums have a fixed
order: the same bits each time. Statistics are sums around the mean of some first rows, so that nothing is lost where a
mean is large beside its deviation (Chan, Golub and LeVeque 1983, "Algorithms for computing the sample variance").

This file imports triton, which comes with PyTorch's builds for GPUs alone.

Shapes: S parts of R rows (an image has H x W of them) of C channels; K chunks of rows, each summed by one program.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

TILE = 4096  # numbers that a program holds at once
CHANNELS = 64  # of them side by side
PROGRAMS = 1024  # to start, where there is work for so many: some for each multiprocessor
MOST_CHUNKS = 512


@triton.jit  # type: ignore[untyped-decorator]
def _tile(start, last, part, rows, channels, height: tl.constexpr, width: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the indices of height x width numbers of a part, and which of them exist."""
    row = start + tl.arange(0, height)
    channel = tl.program_id(0) * width + tl.arange(0, width)
    places = (part.to(tl.int64) * rows + row)[:, None] * channels + channel[None, :]
    return places, (row < last)[:, None] & (channel < channels)[None, :]


@triton.jit  # type: ignore[untyped-decorator]
def _sum_images(images, means, squares, rows, channels, length, height: tl.constexpr, width: tl.constexpr):  # type: ignore[no-untyped-def]
    """Compute the mean of each chunk of `length` rows, and the sum of squares around it: S x K x C each."""
    chunk, part = tl.program_id(1), tl.program_id(2)
    first = chunk * length
    last = tl.minimum(first + length, rows)
    places, there = _tile(first, last, part, rows, channels, height, width)
    values = tl.load(images + places, mask=there, other=0.0).to(tl.float32)
    near = tl.sum(values, 0) / tl.minimum(last - first, height).to(tl.float32)
    sums = tl.zeros((height, width), tl.float32)
    products = tl.zeros((height, width), tl.float32)
    for start in range(first, last, height):
        places, there = _tile(start, last, part, rows, channels, height, width)
        values = tl.load(images + places, mask=there, other=0.0).to(tl.float32)
        values = tl.where(there, values - near[None, :], 0.0)
        sums += values
        products += values * values
    count = (last - first).to(tl.float32)
    off = tl.sum(sums, 0) / count
    channel = tl.program_id(0) * width + tl.arange(0, width)
    place = (part * tl.num_programs(1) + chunk) * channels + channel
    tl.store(means + place, near + off, mask=channel < channels)
    tl.store(squares + place, tl.sum(products, 0) - off * off * count, mask=channel < channels)


@triton.jit  # type: ignore[untyped-decorator]
def _statistics(  # type: ignore[no-untyped-def]
    means, squares, mean_of, scale_of, running_mean, running_var, parts, chunks, rows, channels, length, momentum, eps,
    most: tl.constexpr, width: tl.constexpr,
):  # fmt: skip
    """Compute mean and 1 / deviation of every part, S x C each, from those of its chunks.

    The running statistics move.
    """
    channel = tl.program_id(0) * width + tl.arange(0, width)
    chunk = tl.arange(0, most)
    counts = tl.maximum(tl.minimum(rows - chunk * length, length), 0).to(tl.float32)[:, None]
    there = (chunk < chunks)[:, None] & (channel < channels)[None, :]
    all_means = tl.zeros((width,), tl.float32)
    all_variances = tl.zeros((width,), tl.float32)
    for part in range(parts):
        places = (part * chunks + chunk)[:, None] * channels + channel[None, :]
        found = tl.load(means + places, mask=there, other=0.0)
        mean = tl.sum(found * counts, 0) / rows
        apart = tl.where(there, found - mean[None, :], 0.0)
        square = tl.sum(tl.load(squares + places, mask=there, other=0.0) + apart * apart * counts, 0)
        tl.store(mean_of + part * channels + channel, mean, mask=channel < channels)
        scale = 1.0 / tl.sqrt_rn(square / rows + eps)
        tl.store(scale_of + part * channels + channel, scale, mask=channel < channels)
        all_means += mean
        all_variances += square / (rows - 1)
    before = tl.load(running_mean + channel, mask=channel < channels)
    tl.store(running_mean + channel, before + momentum * (all_means / parts - before), mask=channel < channels)
    before = tl.load(running_var + channel, mask=channel < channels)
    tl.store(running_var + channel, before + momentum * (all_variances / parts - before), mask=channel < channels)


@triton.jit  # type: ignore[untyped-decorator]
def _normalise(  # type: ignore[no-untyped-def]
    images, result, mean_of, scale_of, weight, bias, rows, channels, length, height: tl.constexpr, width: tl.constexpr
):  # fmt: skip
    chunk, part = tl.program_id(1), tl.program_id(2)
    channel = tl.program_id(0) * width + tl.arange(0, width)
    known = channel < channels
    mean = tl.load(mean_of + part * channels + channel, mask=known)
    scale = tl.load(scale_of + part * channels + channel, mask=known) * tl.load(weight + channel, mask=known)
    shift = tl.load(bias + channel, mask=known)
    first = chunk * length
    last = tl.minimum(first + length, rows)
    for start in range(first, last, height):
        places, there = _tile(start, last, part, rows, channels, height, width)
        values = tl.load(images + places, mask=there, other=0.0).to(tl.float32)
        values = (values - mean[None, :]) * scale[None, :] + shift[None, :]
        tl.store(result + places, values.to(result.dtype.element_ty), mask=there)


@triton.jit  # type: ignore[untyped-decorator]
def _sum_gradients(  # type: ignore[no-untyped-def]
    images, gradients, mean_of, sums, products, rows, channels, length, height: tl.constexpr, width: tl.constexpr
):  # fmt: skip
    """Sum the gradients over each chunk, and the gradients times (images - mean): S x K x C each."""
    chunk, part = tl.program_id(1), tl.program_id(2)
    channel = tl.program_id(0) * width + tl.arange(0, width)
    mean = tl.load(mean_of + part * channels + channel, mask=channel < channels)
    first = chunk * length
    last = tl.minimum(first + length, rows)
    plain = tl.zeros((height, width), tl.float32)
    weighed = tl.zeros((height, width), tl.float32)
    for start in range(first, last, height):
        places, there = _tile(start, last, part, rows, channels, height, width)
        gradient = tl.load(gradients + places, mask=there, other=0.0).to(tl.float32)
        values = tl.load(images + places, mask=there, other=0.0).to(tl.float32)
        plain += gradient
        weighed += gradient * (values - mean[None, :])
    place = (part * tl.num_programs(1) + chunk) * channels + channel
    tl.store(sums + place, tl.sum(plain, 0), mask=channel < channels)
    tl.store(products + place, tl.sum(weighed, 0), mask=channel < channels)


@triton.jit  # type: ignore[untyped-decorator]
def _gradients_of_weights(  # type: ignore[no-untyped-def]
    sums, products, scale_of, of_weight, of_bias, mean_gradient, mean_product, parts, chunks, rows, channels,
    most: tl.constexpr, width: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of weight and bias, C each, and two means for each part, S x C each.

    These are the means of the gradients, and of the gradients times the normalised images.
    """
    channel = tl.program_id(0) * width + tl.arange(0, width)
    chunk = tl.arange(0, most)
    there = (chunk < chunks)[:, None] & (channel < channels)[None, :]
    all_sums = tl.zeros((width,), tl.float32)
    all_products = tl.zeros((width,), tl.float32)
    for part in range(parts):
        places = (part * chunks + chunk)[:, None] * channels + channel[None, :]
        place = part * channels + channel
        plain = tl.sum(tl.load(sums + places, mask=there, other=0.0), 0)
        weighed = tl.sum(tl.load(products + places, mask=there, other=0.0), 0)
        weighed *= tl.load(scale_of + place, mask=channel < channels)
        tl.store(mean_gradient + place, plain / rows, mask=channel < channels)
        tl.store(mean_product + place, weighed / rows, mask=channel < channels)
        all_sums += plain
        all_products += weighed
    tl.store(of_bias + channel, all_sums, mask=channel < channels)
    tl.store(of_weight + channel, all_products, mask=channel < channels)


@triton.jit  # type: ignore[untyped-decorator]
def _gradients_of_images(  # type: ignore[no-untyped-def]
    images, gradients, result, mean_of, scale_of, weight, mean_gradient, mean_product, rows, channels, length,
    height: tl.constexpr, width: tl.constexpr,
):  # fmt: skip
    chunk, part = tl.program_id(1), tl.program_id(2)
    channel = tl.program_id(0) * width + tl.arange(0, width)
    known, place = channel < channels, part * channels + channel
    mean, scale = tl.load(mean_of + place, mask=known), tl.load(scale_of + place, mask=known)
    plain = tl.load(mean_gradient + place, mask=known)
    slope = tl.load(mean_product + place, mask=known) * scale
    scale *= tl.load(weight + channel, mask=known)
    first = chunk * length
    last = tl.minimum(first + length, rows)
    for start in range(first, last, height):
        places, there = _tile(start, last, part, rows, channels, height, width)
        values = tl.load(images + places, mask=there, other=0.0).to(tl.float32)
        gradient = tl.load(gradients + places, mask=there, other=0.0).to(tl.float32)
        gradient = (gradient - plain[None, :] - (values - mean[None, :]) * slope[None, :]) * scale[None, :]
        tl.store(result + places, gradient.to(result.dtype.element_ty), mask=there)


class _Plan:
    """How images N x C x H x W in S parts are shared out: sizes of tiles, length of chunks, programs."""

    def __init__(self, x: Tensor, parts: int) -> None:
        self.parts, self.channels = parts, x.shape[1]
        self.rows = x.numel() // (parts * self.channels)
        width = min(CHANNELS, triton.next_power_of_2(self.channels))
        self.tile = {"height": TILE // width, "width": width}
        columns = triton.cdiv(self.channels, width)
        wanted = max(1, min(MOST_CHUNKS, PROGRAMS // (parts * columns)))
        self.length = triton.cdiv(triton.cdiv(self.rows, wanted), self.tile["height"]) * self.tile["height"]
        self.chunks = triton.cdiv(self.rows, self.length)
        self.grid = columns, self.chunks, parts
        # What gathers the chunks' sums holds all of them at once, so fewer channels.
        most = triton.next_power_of_2(self.chunks)
        few = max(1, min(width, TILE // most))
        self.gathering = {"most": most, "width": few}
        self.gatherers = (triton.cdiv(self.channels, few),)

    def floats(self, like: Tensor, chunks: bool = False) -> Tensor:
        return like.new_empty((self.parts, self.chunks if chunks else 1, self.channels), dtype=torch.float32)


class _BatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, running_mean: Tensor, running_var: Tensor, parts: int,
        momentum: float, eps: float,
    ) -> Tensor:  # fmt: skip
        plan = _Plan(x, parts)
        means, squares, mean, scale = (plan.floats(x, chunks) for chunks in (True, True, False, False))
        sizes = plan.rows, plan.channels, plan.length
        _sum_images[plan.grid](x, means, squares, *sizes, **plan.tile)
        _statistics[plan.gatherers](
            means, squares, mean, scale, running_mean, running_var, parts, plan.chunks, *sizes, momentum, eps,
            **plan.gathering,
        )  # fmt: skip
        result = torch.empty_like(x)
        _normalise[plan.grid](x, result, mean, scale, weight, bias, *sizes, **plan.tile)
        ctx.save_for_backward(x, weight, mean, scale)
        ctx.plan = plan
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, scale = ctx.saved_tensors
        plan: _Plan = ctx.plan
        gradient = gradients[0].contiguous(memory_format=torch.channels_last)
        sums, products, plain, weighed = (plan.floats(x, chunks) for chunks in (True, True, False, False))
        sizes = plan.rows, plan.channels, plan.length
        _sum_gradients[plan.grid](x, gradient, mean, sums, products, *sizes, **plan.tile)
        of_weight, of_bias = torch.empty_like(weight), torch.empty_like(weight)
        _gradients_of_weights[plan.gatherers](
            sums, products, scale, of_weight, of_bias, plain, weighed, plan.parts, plan.chunks, *sizes[:2],
            **plan.gathering,
        )  # fmt: skip
        of_images = torch.empty_like(x)
        _gradients_of_images[plan.grid](
            x, gradient, of_images, mean, scale, weight, plain, weighed, *sizes, **plan.tile
        )
        return of_images, of_weight, of_bias, None, None, None, None, None


def batch_norm(
    x: Tensor, weight: Tensor, bias: Tensor, running_mean: Tensor, running_var: Tensor, *, parts: int, momentum: float,
    eps: float,
) -> Tensor:  # fmt: skip
    """Normalise each of `parts` equal, consecutive parts of the images by its own mean and variance.

    x: channels-last images, N x C x H x W. weight, bias, running_mean, running_var: float32, C each. The running
    statistics move in place towards the mean of the parts' statistics. Each part must have two rows or more.
    """
    with torch.cuda.device_of(x):  # triton takes the current one
        result: Tensor = _BatchNorm.apply(x, weight, bias, running_mean, running_var, parts, momentum, eps)
    return result
