"""Random views of whole batches, as tensor operations on the training device.

Every image has its own parameters. All of them come from one draw of uniform numbers on the CPU, so that a
seed gives the same views on every device and no device is waited for. Distributions are those of
torchvision's RandomResizedCrop, RandomHorizontalFlip, ColorJitter, RandomGrayscale and GaussianBlur.
The one difference: the order of the four jitter operations is drawn for groups of images, not for each.

Recipes: v1 from MoCo (arXiv 1911.05722, appendix), v2 from SimCLR by way of MoCo v2 (arXiv 2003.04297).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

JITTER_GROUP = 64  # images that share an order; large enough for both cores, small enough for the cache
CROP_ATTEMPTS = 10  # as torchvision: after ten crops that do not fit, the centre is taken
REFERENCE_SIZE = 224  # pixels; blur is stated for this size and scaled to the real one
ENLARGED = 64  # pixels; from here on, looking pixels up is faster than a product of matrices (measured on a CPU)
SMALLEST_SIGMA = 0.3  # pixels; a narrower blur changes no pixel by more than 1 % of its neighbour
COLUMNS = 2 * CROP_ATTEMPTS + 11  # uniform numbers that one view of one image uses
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as PIL and torchvision


@dataclass(frozen=True)
class ViewRecipe:
    """Strengths and probabilities of one view.

    crop_scale: smallest and largest share of the area. brightness, contrast, saturation: the factor is
    uniform in 1 -+ the value. hue: shift in turns, uniform in -+ the value. blur_sigma: smallest and largest
    standard deviation in pixels of an image of 224; scaled to the real size.
    """

    crop_scale: tuple[float, float]
    brightness: float
    contrast: float
    saturation: float
    hue: float
    jitter_probability: float
    grayscale_probability: float
    blur_probability: float
    blur_sigma: tuple[float, float]
    flip_probability: float = 0.5


def recipe(name: str, crop_scale: tuple[float, float], blur_sigma: tuple[float, float]) -> ViewRecipe:
    """`v1`, `v2`, `v2_no_blur` (for very small images) or `crop` (crop and flip alone, for classifiers)."""
    strengths = {
        "v1": (0.4, 0.4, 0.4, 0.4, 1.0, 0.2, 0.0),
        "v2": (0.4, 0.4, 0.4, 0.1, 0.8, 0.2, 0.5),
        "v2_no_blur": (0.4, 0.4, 0.4, 0.1, 0.8, 0.2, 0.0),
        "crop": (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0),
    }[name]
    return ViewRecipe(crop_scale, *strengths, blur_sigma)


def crop_boxes(uniform: Tensor, height: int, width: int, scale: tuple[float, float]) -> Tensor:
    """Boxes (top, left, height, width) in whole pixels, B x 4, from B x (2 * CROP_ATTEMPTS + 2) uniforms.

    RandomResizedCrop's rule with aspect ratios from 3/4 to 4/3, uniform in the logarithm.
    """
    tries = uniform[:, : 2 * CROP_ATTEMPTS].reshape(-1, CROP_ATTEMPTS, 2).double()
    area = height * width * (scale[0] + (scale[1] - scale[0]) * tries[..., 0])
    ratio = torch.exp(math.log(4 / 3) * (2 * tries[..., 1] - 1))
    w, h = torch.sqrt(area * ratio).round(), torch.sqrt(area / ratio).round()  # B x attempts
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    first = fits.float().argmax(1, keepdim=True)  # index of the first that fits
    w, h = w.gather(1, first).squeeze(1), h.gather(1, first).squeeze(1)
    u = uniform[:, 2 * CROP_ATTEMPTS : 2 * CROP_ATTEMPTS + 2].double()
    top, left = (u[:, 0] * (height - h + 1)).floor(), (u[:, 1] * (width - w + 1)).floor()
    none = ~fits.any(1)
    if none.any():
        full_w = min(width, round(height * 4 / 3))
        full_h = min(height, round(width * 4 / 3))
        h[none], w[none] = float(full_h), float(full_w)
        top[none], left[none] = float((height - full_h) // 2), float((width - full_w) // 2)
    return torch.stack([top, left, h, w], 1)


def resampling_matrix(start: Tensor, length: Tensor, inputs: int, outputs: int, flip: Tensor) -> Tensor:
    """Matrices, B x outputs x inputs, that resample the pixels [start, start + length) to `outputs` pixels.

    Bilinear with anti-aliasing: a triangle as wide as the larger of an input and an output pixel, cut off at
    the box and normalised (PIL's and torchvision's resampling). Where `flip` is set the order is reversed.
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
    """Gaussian blur with reflected borders, B x 3 x H x W. sigma: B, pixels. radius: pixels on each side that a pixel
    is made from; those beyond 4 sigma would not be seen.

    Shifted images are added up, weighted, as every image has its own bell."""
    for dimension in (2, 3):
        length = images.shape[dimension]
        reach = min(radius, length - 1)
        distance = torch.arange(-reach, reach + 1, device=images.device, dtype=torch.float32)
        bell = torch.exp(distance.square() * (-0.5 / sigma.float().square()[:, None]))
        bell = (bell / bell.sum(1, keepdim=True))[:, :, None, None, None]
        padding = (0, 0, reach, reach) if dimension == 2 else (reach, reach, 0, 0)
        padded = F.pad(images, padding, mode="reflect")
        images = padded.narrow(dimension, reach, length) * bell[:, reach]
        for shift in range(2 * reach + 1):
            if shift != reach:
                images.addcmul_(padded.narrow(dimension, shift, length), bell[:, shift])
    return images


def _separable(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """rows @ image @ columns^T for every image and channel: B x 3 x H x W -> B x 3 x H' x W'."""
    b, c, h, w = images.shape
    images = torch.bmm(images.reshape(b, c * h, w), columns.transpose(1, 2)).view(b, c, h, -1)
    return torch.matmul(rows[:, None], images)


def _bilinear(images: Tensor, boxes: Tensor, size: int, flip: Tensor) -> Tensor:
    """Boxes enlarged: two pixels by two make one, of the box alone."""
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
    """Boxes (top, left, height, width), B x 4, of images B x 3 x H x W, mirrored where `flip` is set: B x 3 x size x
    size, as PIL and torchvision resample with anti-aliasing."""
    height, width = images.shape[2:]
    if size >= max(height, width, ENLARGED):
        return _bilinear(images, boxes, size, flip)
    rows = resampling_matrix(boxes[:, 0], boxes[:, 2], height, size, torch.zeros_like(flip))
    return _separable(images, rows, resampling_matrix(boxes[:, 1], boxes[:, 3], width, size, flip))


def gray(images: Tensor) -> Tensor:
    """Luminance, B x 1 x H x W."""
    r, g, b = images.unbind(1)
    return (r * LUMA[0]).add_(g, alpha=LUMA[1]).add_(b, alpha=LUMA[2]).unsqueeze(1)


def adjust_brightness(images: Tensor, factor: Tensor) -> Tensor:
    """In place; `factor` is B x 1 x 1 x 1. So are the next two."""
    return images.mul_(factor).clamp_(0, 1)


def adjust_contrast(images: Tensor, factor: Tensor) -> Tensor:
    mean = gray(images).mean((2, 3), keepdim=True)
    return images.mul_(factor).add_(mean * (1 - factor)).clamp_(0, 1)


def adjust_saturation(images: Tensor, factor: Tensor) -> Tensor:
    luminance = gray(images)  # before the images are scaled in place
    return images.mul_(factor).add_(luminance * (1 - factor)).clamp_(0, 1)


def adjust_hue(images: Tensor, turns: Tensor) -> Tensor:
    """Turns the hue in the HSV cone; `turns` is B x 1 x 1 x 1, from -1/2 to 1/2. Value and chroma stay."""
    r, g, b = images.unbind(1)
    value = torch.maximum(torch.maximum(r, g), b)
    chroma = value - torch.minimum(torch.minimum(r, g), b)
    inverse = chroma.clamp(min=1e-8).reciprocal_()  # grey: any number will do, as the differences are 0
    hue = torch.where(  # in sixths of a turn, from -1 to 5
        value == r,
        (g - b).mul_(inverse),
        torch.where(value == g, (b - r).mul_(inverse).add_(2), (r - g).mul_(inverse).add_(4)),
    )
    turns = turns.squeeze(1)
    hue.add_(6 * turns)
    # What a channel lacks to the value is a trapezoid around the circle: 1 up to a sixth from its middle and 0 from two
    # sixths on. The distance from the opposite side, less 1, is that between 0 and 1, up to seven sixths away, so green
    # takes the nearer of its two middles. 1 more is computed, and added to the value: one operation less.
    ceiling = value.add_(chroma)
    middles: tuple[float | Tensor, ...] = (3, torch.where(turns < 0, -1, 5), 1)
    for channel, middle in enumerate(middles):
        lack = (hue - middle).abs_().sub_(3).abs_().clamp_(1, 2)
        torch.addcmul(ceiling, chroma, lack, value=-1, out=images[:, channel])
    return images


_JITTER: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (
    adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue,
)  # fmt: skip


def jitter(
    images: Tensor, factors: Tensor, chosen: Tensor, generator: torch.Generator, first: int = 0,
    total: int | None = None,
) -> Tensor:  # fmt: skip
    """Colour jitter in place. factors: B x 4 (brightness, contrast, saturation, hue in turns), on the images' device.
    chosen: B, bool, on the CPU: the images that are jittered. first, total: the images stand from place `first` on in
    a batch of `total`, and are treated as they would be there."""
    factors = factors[:, :, None, None, None]
    for start in range(-first, (total or len(images)) - first, JITTER_GROUP):
        operations = torch.randperm(4, generator=generator).tolist()  # drawn for the groups of others too
        group = slice(max(start, 0), max(start + JITTER_GROUP, 0))
        rows = chosen[group].nonzero().squeeze(1).to(images.device, non_blocking=True)
        if len(rows):
            part, own = images[group][rows], factors[group][rows]
            for operation in operations:
                _JITTER[operation](part, own[:, operation])
            images[group][rows] = part
    return images


class Views:
    """Makes random views: uint8 B x H x W x 3 -> float32 B x 3 x size x size, normalised, channels-last.

    mean, std: per channel, of images scaled to [0, 1].
    """

    def __init__(
        self, recipe: ViewRecipe, size: int, mean: tuple[float, ...], std: tuple[float, ...], device: torch.device
    ) -> None:  # fmt: skip
        self.recipe, self.size, self.device = recipe, size, device
        scale = 1 / torch.tensor(std, device=device).view(1, 3, 1, 1)
        self.scale, self.shift = scale, -torch.tensor(mean, device=device).view(1, 3, 1, 1) * scale

    def at(self, size: int) -> Views:
        """The same views, of another size."""
        other = copy.copy(self)
        other.size = size
        return other

    def to_unit(self, batch: Tensor) -> Tensor:
        """uint8 B x H x W x 3 -> float B x 3 x H x W in [0, 1], on the device."""
        batch = batch.to(self.device, non_blocking=True)
        return batch.permute(0, 3, 1, 2).contiguous().float().div_(255)

    def normalise(self, images: Tensor) -> Tensor:
        torch.addcmul(self.shift, images, self.scale, out=images)
        return images.contiguous(memory_format=torch.channels_last)

    def plain(self, batch: Tensor) -> Tensor:
        """The images as they are, normalised: what classifiers see at evaluation."""
        return self.normalise(self.to_unit(batch))

    def __call__(self, unit: Tensor, generator: torch.Generator, first: int = 0, total: int | None = None) -> Tensor:
        """One view of each image of `to_unit`'s result, which stays as it is. first, total: as in `augment`."""
        return self.normalise(self.augment(unit, generator, first, total))

    def augment(self, unit: Tensor, generator: torch.Generator, first: int = 0, total: int | None = None) -> Tensor:
        """A view in [0, 1], before normalisation. `generator` is on the CPU.

        first, total: the images stand from place `first` on in a batch of `total`, of which other processes have the
        rest. Views, and the generator afterwards, are those of a process that has the whole batch."""
        b, _, height, width = unit.shape
        r = self.recipe
        uniform = torch.rand(total or b, COLUMNS, generator=generator)[first : first + b]
        boxes = crop_boxes(uniform, height, width, r.crop_scale)
        rest = uniform[:, 2 * CROP_ATTEMPTS + 2 :]  # B x 9
        strengths = torch.tensor([r.brightness, r.contrast, r.saturation, r.hue])
        jittered = rest[:, 0] < r.jitter_probability
        factors = strengths * (2 * rest[:, 1:5] - 1)
        factors[:, :3] = (factors[:, :3] + 1).clamp(min=0)
        grayed = (rest[:, 5] < r.grayscale_probability).nonzero().squeeze(1)
        sigma = r.blur_sigma[0] + (r.blur_sigma[1] - r.blur_sigma[0]) * rest[:, 6]
        sigma *= self.size / REFERENCE_SIZE
        blurred = ((rest[:, 7] < r.blur_probability) & (sigma >= SMALLEST_SIGMA)).nonzero().squeeze(1)
        flipped = rest[:, 8] < r.flip_probability

        def move(values: Tensor) -> Tensor:
            return values.to(self.device, non_blocking=True)

        images = resample(unit, move(boxes.float()), self.size, move(flipped))
        if r.jitter_probability > 0:
            jitter(images, move(factors), jittered, generator, first, total)
        if len(grayed):
            chosen = move(grayed)
            images[chosen] = gray(images[chosen]).expand(-1, 3, -1, -1)
        if len(blurred):
            chosen = move(blurred)
            reach = max(1, math.floor(4 * r.blur_sigma[1] * self.size / REFERENCE_SIZE))
            images[chosen] = blur(images[chosen], move(sigma[blurred]), reach)
        return images
