"""What views are made of: resampling, colour and blur of whole batches, each image by its own parameters.

Images are B x 3 x H x W, in [0, 1].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

ENLARGED = 64  # pixels; from here on, looking pixels up is faster than a product of matrices (measured on a CPU)
CACHED = 1 << 17  # pixels of which an operation's images fit a processor's cache (measured)
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as PIL and torchvision


def resampling_matrix(start: Tensor, length: Tensor, inputs: int, outputs: int, flip: Tensor) -> Tensor:
    """Return matrices, B x outputs x inputs, that resample the pixels [start, start + length) to `outputs` pixels.

    Resampling is bilinear with anti-aliasing: a triangle as wide as the larger of an input and an output pixel, cut off
    at the box and normalised (PIL's and torchvision's resampling). Where `flip` is set the order is reversed.
    """
    device = start.device
    start, length = start.float()[:, None, None], length.float()[:, None, None]
    scale = length / outputs
    o = torch.arange(outputs, device=device, dtype=torch.float32)[None, :, None]
    o = torch.where(flip[:, None, None], outputs - 1 - o, o)
    x = torch.arange(inputs, device=device, dtype=torch.float32)[None, None, :] - start  # place in the box
    distance = (x + 0.5 - (o + 0.5) * scale).abs_().div_(scale.clamp(min=1))
    weight = (1 - distance).clamp_(min=0)
    weight.mul_((x >= 0) & (x < length))
    return weight.div_(weight.sum(2, keepdim=True))


def blur(images: Tensor, sigma: Tensor, radius: int) -> Tensor:
    """Return the images under a Gaussian blur with reflected borders, B x 3 x H x W.

    sigma: B, pixels. radius: pixels on each side that a pixel is made from; those beyond 4 sigma are left out, as they
    would not be seen, so a larger radius changes nothing. Shifted images are added up, weighted, as every image has its
    own bell.
    """
    sigma = sigma.float()[:, None]
    high, wide = (min(radius, length - 1) for length in images.shape[2:])
    images = F.pad(images, (wide, wide, high, high), mode="reflect")
    for dimension, reach in ((2, high), (3, wide)):
        distance = torch.arange(-reach, reach + 1, device=images.device)
        bell = torch.exp(distance.square() * (-0.5 / sigma.square())) * (distance.abs() <= 4 * sigma)
        bell = (bell / bell.sum(1, keepdim=True))[:, :, None, None, None]
        length = images.shape[dimension] - 2 * reach
        blurred = images.narrow(dimension, reach, length) * bell[:, reach]
        for shift in range(2 * reach + 1):
            if shift != reach:
                blurred.addcmul_(images.narrow(dimension, shift, length), bell[:, shift])
        images = blurred
    return images


def _separable(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Return rows @ image @ columns^T for every image and channel: B x 3 x H x W -> B x 3 x H' x W'."""
    b, c, h, w = images.shape
    images = torch.bmm(images.reshape(b, c * h, w), columns.transpose(1, 2)).view(b, c, h, -1)
    return torch.matmul(rows[:, None], images)


def _bilinear(images: Tensor, boxes: Tensor, size: int, flip: Tensor) -> Tensor:
    """Return the boxes enlarged: each pixel is made from two by two pixels of the box alone."""
    height, width = images.shape[2:]

    def places(start: Tensor, length: Tensor, pixels: int, mirrored: Tensor) -> Tensor:
        o = torch.arange(size, device=images.device, dtype=torch.float32)[None, :]
        o = torch.where(mirrored[:, None], size - 1 - o, o)
        x = (o + 0.5) * (length / size)[:, None] - 0.5
        x = torch.minimum(x.clamp(min=0), length[:, None] - 1) + start[:, None]
        return x * 2 / max(pixels - 1, 1) - 1  # as grid_sample counts

    top, left, h, w = boxes.float().unbind(1)
    y, x = places(top, h, height, torch.zeros_like(flip)), places(left, w, width, flip)
    grid = torch.stack([x[:, None, :].expand(-1, size, -1), y[:, :, None].expand(-1, -1, size)], 3).clamp_(-1, 1)
    # Not padding_mode="border", which Apple's MPS does not have in all versions: nothing lies beyond the border now.
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=True)


def resample(images: Tensor, boxes: Tensor, size: int, flip: Tensor) -> Tensor:
    """Return boxes of images at another size, as PIL and torchvision resample with anti-aliasing: B x 3 x size x size.

    boxes: (top, left, height, width), B x 4, of images B x 3 x H x W. A view is mirrored where `flip` is set.
    """
    height, width = images.shape[2:]
    if size >= max(height, width, ENLARGED):
        return _bilinear(images, boxes, size, flip)
    rows = resampling_matrix(boxes[:, 0], boxes[:, 2], height, size, torch.zeros_like(flip))
    return _separable(images, rows, resampling_matrix(boxes[:, 1], boxes[:, 3], width, size, flip))


def images_at_once(images: Tensor) -> int:
    """Return how many images operations on single pixels should be done for together."""
    return max(1, CACHED // images[0, 0].numel()) if images.device.type == "cpu" else len(images)


def gray(images: Tensor) -> Tensor:
    """Return the luminance, B x 1 x H x W."""
    r, g, b = images.unbind(1)
    return (r * LUMA[0]).add_(g, alpha=LUMA[1]).add_(b, alpha=LUMA[2]).unsqueeze(1)


def adjust_brightness(images: Tensor, factor: Tensor) -> Tensor:
    """Multiply the images by a factor in place; `factor` is B x 1 x 1 x 1."""
    return images.mul_(factor).clamp_(0, 1)


def adjust_contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Move the images away from their mean luminance, or towards it, in place; `factor` is B x 1 x 1 x 1."""
    mean = gray(images.mean((2, 3), keepdim=True))
    return images.mul_(factor).add_(mean * (1 - factor)).clamp_(0, 1)


def adjust_saturation(images: Tensor, factor: Tensor) -> Tensor:
    """Move the images away from their luminance, or towards it, in place; `factor` is B x 1 x 1 x 1."""
    return torch.lerp(gray(images), images, factor, out=images).clamp_(0, 1)


def adjust_hue(images: Tensor, turns: Tensor) -> Tensor:
    """Turn the hue in the HSV cone in place; `turns` is B x 1 x 1 x 1, from -1/2 to 1/2. Value and chroma stay.

    No case is told from another, as comparing and choosing take a processor many times as long as arithmetic.
    """
    r, g, b = images.unbind(1)
    value, least = torch.maximum(r, g), torch.minimum(r, g)
    torch.maximum(value, b, out=value)
    torch.minimum(least, b, out=least)
    chroma = value - least
    # In sixths of a turn, from -3 to 3, red at 0: 1 + (g + b - r - least) / chroma on the side of green, and the same
    # below 0 on that of blue. Grey may be divided by any number, as it has nothing to divide. What is no longer needed
    # gives its memory, as the fewer there is the more of it stays in the cache.
    hue = (g + b).sub_(r).sub_(least)
    side, divisor = torch.sub(g, b, out=least), torch.clamp(chroma, min=1e-8, out=r)
    hue.div_(divisor).add_(1).copysign_(side)
    turns = turns.squeeze(1)
    hue.add_(6 * turns)
    # What a channel lacks to the value is a trapezoid around the circle: 1 up to a sixth from its middle and 0 from two
    # sixths on. The distance from the opposite side, less 1, is that between 0 and 1. Hues reach from -6 to 3 or from
    # -3 to 6, so red takes the nearer of its two opposites. 1 more is computed, and added to the value: one operation
    # less.
    red = turns.ge(0).float().mul_(6).sub_(3)
    opposites = torch.stack([red, torch.full_like(red, -1), torch.full_like(red, 1)], 1)
    lack = torch.sub(hue[:, None], opposites, out=images).abs_().sub_(3).abs_().clamp_(1, 2)
    torch.addcmul(value.add_(chroma)[:, None], chroma[:, None], lack, value=-1, out=images)
    return images


# Brightness, contrast, saturation, hue.
ADJUSTMENTS: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (
    adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue,
)  # fmt: skip


def jitter(images: Tensor, factors: Tensor, chosen: Tensor, orders: Sequence[tuple[slice, list[int]]]) -> Tensor:
    """Jitter the colours of the chosen images in place.

    factors: B x 4 (brightness, contrast, saturation, hue in turns), on the images' device. chosen: B, bool, on the CPU:
    the images that are jittered. orders: the images that share an order, and which order.
    """
    factors = factors[:, :, None, None, None]
    for group, operations in orders:
        rows = chosen[group].nonzero().squeeze(1).add_(group.start)
        for part in rows.split(images_at_once(images)):
            place = part.to(images.device, non_blocking=True)
            own, values = images.index_select(0, place), factors.index_select(0, place)
            for operation in operations:
                ADJUSTMENTS[operation](own, values[:, operation])
            images.index_copy_(0, place, own)
    return images


# Every order of the four is found in this one from left to right, hue in the middle: where the others are neutral, a
# batch whose images have different orders goes through it as a whole.
_THREE = (0, 1, 2, 0, 1, 0, 2)  # holds each order of brightness, contrast and saturation
ALL_ORDERS = (*_THREE, 3, *_THREE)
NEUTRAL = (1.0, 1.0, 1.0, 0.0)


def positions(order: Sequence[int]) -> list[int]:
    """Return the indices in ALL_ORDERS at which the operations of an order are done, in the order's own order."""
    found, at = [], 0
    for operation in order:
        at = ALL_ORDERS.index(operation, at)
        found.append(at)
        at += 1
    return found


def jitter_all(images: Tensor, factors: Tensor) -> Tensor:
    """Do what `jitter` does, in place, without any choice.

    factors: B x len(ALL_ORDERS), neutral where an operation is left out. All this can be one graph on a GPU, though it
    has 15 operations for every image where `jitter` has 4.
    """
    factors = factors[:, :, None, None, None]
    for place, operation in enumerate(ALL_ORDERS):
        ADJUSTMENTS[operation](images, factors[:, place])
    return images
