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
from dataclasses import dataclass

import torch
from torch import Tensor

from moco.views.pixels import ALL_ORDERS, NEUTRAL, blur, gray, images_at_once, jitter, jitter_all, positions, resample

JITTER_GROUP = 64  # images that share an order; large enough for both cores, small enough for the cache
CROP_ATTEMPTS = 10  # as torchvision: after ten crops that do not fit, the centre is taken
REFERENCE_SIZE = 224  # pixels; blur is stated for this size and scaled to the real one
SMALLEST_SIGMA = 0.3  # pixels; a narrower blur changes no pixel by more than 1 % of its neighbour
COLUMNS = 2 * CROP_ATTEMPTS + 11  # uniform numbers that one view of one image uses


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
    """Return the recipe of a name: `v1`, `v2`, `v2_no_blur` (for very small images) or `crop`.

    `crop` has crop and flip alone, for classifiers.
    """
    strengths = {
        "v1": (0.4, 0.4, 0.4, 0.4, 1.0, 0.2, 0.0),
        "v2": (0.4, 0.4, 0.4, 0.1, 0.8, 0.2, 0.5),
        "v2_no_blur": (0.4, 0.4, 0.4, 0.1, 0.8, 0.2, 0.0),
        "crop": (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0),
    }[name]
    return ViewRecipe(crop_scale, *strengths, blur_sigma)


def crop_boxes(uniform: Tensor, height: int, width: int, scale: tuple[float, float]) -> Tensor:
    """Return boxes (top, left, height, width) in whole pixels, B x 4, from B x (2 * CROP_ATTEMPTS + 2) uniforms.

    This is RandomResizedCrop's rule with aspect ratios from 3/4 to 4/3, uniform in the logarithm.
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


def reach(sigma: float) -> int:
    """Return how many pixels on each side a blur of this width is made from."""
    return max(1, math.floor(4 * sigma))


@dataclass(frozen=True)
class ViewParameters:
    """The random parameters of one view of B images, on the CPU.

    boxes: B x 4 (top, left, height, width). factors: B x 4, of the jitter. orders: the images that share an order of
    its operations, and which. sigma: B, pixels. The others, B: which images an operation is for."""

    boxes: Tensor
    flipped: Tensor
    jittered: Tensor
    factors: Tensor
    orders: list[tuple[slice, list[int]]]
    grayed: Tensor
    blurred: Tensor
    sigma: Tensor

    def packed(self) -> Tensor:
        """Return all parameters as numbers, B x (8 + len(ALL_ORDERS)); what is not for an image is neutral."""
        neutral = torch.tensor([NEUTRAL[operation] for operation in ALL_ORDERS])
        factors = neutral.repeat(len(self.boxes), 1)
        for group, order in self.orders:
            factors[group, positions(order)] = self.factors[group, order]
        factors = torch.where(self.jittered[:, None], factors, neutral)
        chosen = torch.stack([self.flipped, self.grayed, self.blurred], 1).float()
        sigma = self.sigma.clamp(min=SMALLEST_SIGMA)[:, None]
        return torch.cat([self.boxes, chosen, sigma, factors], 1)


class Views:
    """Makes random views: uint8 B x H x W x 3 -> float32 B x 3 x size x size, normalised, channels-last.

    mean, std: per channel, of images scaled to [0, 1].
    """

    def __init__(
        self, recipe: ViewRecipe, size: int, mean: tuple[float, ...], std: tuple[float, ...], device: torch.device
    ) -> None:  # fmt: skip
        self.recipe, self.size, self.device = recipe, size, device
        self.scale = 1 / torch.tensor(std, device=device)
        self.shift = -torch.tensor(mean, device=device) * self.scale

    def at(self, size: int) -> Views:
        """Return the same views, of another size."""
        other = copy.copy(self)
        other.size = size
        return other

    def to_unit(self, batch: Tensor) -> Tensor:
        """Return images as float in [0, 1], on the device: uint8 B x H x W x 3 -> B x 3 x H x W."""
        batch = batch.to(self.device, non_blocking=True).permute(0, 3, 1, 2)
        return torch.empty(batch.shape, device=self.device).copy_(batch).div_(255)

    def normalise(self, images: Tensor) -> Tensor:
        """Return images in [0, 1] normalised by mean and standard deviation, channels-last.

        Channels-last images change in place.
        """
        images = images.contiguous(memory_format=torch.channels_last)
        rows = images.permute(0, 2, 3, 1).flatten(2)  # B x H x 3 W; the same memory: long rows are faster than channels
        scale, shift = self.scale.repeat(images.shape[3]), self.shift.repeat(images.shape[3])
        torch.addcmul(shift, rows, scale, out=rows)
        return images

    def plain(self, batch: Tensor) -> Tensor:
        """Return the images as they are, normalised: what classifiers see at evaluation."""
        return self.normalise(self.to_unit(batch))

    def __call__(self, unit: Tensor, generator: torch.Generator, first: int = 0, total: int | None = None) -> Tensor:
        """Return one view of each image of `to_unit`'s result, which stays as it is. first, total: as in `augment`."""
        return self.normalise(self.augment(unit, generator, first, total))

    def augment(self, unit: Tensor, generator: torch.Generator, first: int = 0, total: int | None = None) -> Tensor:
        """Return a view of each image in [0, 1], before normalisation. `generator` is on the CPU.

        first, total: the images stand from index `first` on in a batch of `total`, of which other processes have the
        rest. Views (but for the rounding of a blur) and the generator afterwards are those of a process that has the
        whole batch.
        """
        drawn = self.draw(unit, generator, first, total)

        def move(values: Tensor) -> Tensor:
            return values.to(self.device, non_blocking=True)

        images = resample(unit, move(drawn.boxes), self.size, move(drawn.flipped))
        if drawn.orders:
            jitter(images, move(drawn.factors), drawn.jittered, drawn.orders)
        if len(grayed := drawn.grayed.nonzero().squeeze(1)):
            chosen = move(grayed)
            images.index_copy_(0, chosen, gray(images.index_select(0, chosen)).expand(-1, 3, -1, -1))
        blurred = drawn.blurred.nonzero().squeeze(1)
        blurred = blurred[drawn.sigma[blurred].argsort()]  # narrow ones together, as they take less
        for part in blurred.split(images_at_once(images)) if len(blurred) else ():
            chosen, sigma = move(part), drawn.sigma[part]
            images.index_copy_(0, chosen, blur(images.index_select(0, chosen), move(sigma), reach(sigma[-1].item())))
        return images

    def draw(
        self, unit: Tensor, generator: torch.Generator, first: int = 0, total: int | None = None
    ) -> ViewParameters:
        """Draw the parameters by which `augment` changes B images of `to_unit`."""
        b, _, height, width = unit.shape
        r, whole = self.recipe, total or len(unit)
        uniform = torch.rand(whole, COLUMNS, generator=generator)[first : first + b]
        orders = []
        if r.jitter_probability > 0:
            for start in range(-first, whole - first, JITTER_GROUP):
                order = torch.randperm(4, generator=generator).tolist()  # drawn for the groups of others too
                if start + JITTER_GROUP > 0 and start < b:
                    orders.append((slice(max(start, 0), min(start + JITTER_GROUP, b)), order))
        rest = uniform[:, 2 * CROP_ATTEMPTS + 2 :]  # B x 9
        strengths = torch.tensor([r.brightness, r.contrast, r.saturation, r.hue])
        factors = strengths * (2 * rest[:, 1:5] - 1)
        factors[:, :3] = (factors[:, :3] + 1).clamp(min=0)
        sigma = r.blur_sigma[0] + (r.blur_sigma[1] - r.blur_sigma[0]) * rest[:, 6]
        sigma *= self.size / REFERENCE_SIZE
        return ViewParameters(
            boxes=crop_boxes(uniform, height, width, r.crop_scale).float(),
            flipped=rest[:, 8] < r.flip_probability,
            jittered=rest[:, 0] < r.jitter_probability,
            factors=factors,
            orders=orders,
            grayed=rest[:, 5] < r.grayscale_probability,
            blurred=(rest[:, 7] < r.blur_probability) & (sigma >= SMALLEST_SIGMA),
            sigma=sigma,
        )

    def augment_branchless(self, unit: Tensor, table: Tensor) -> Tensor:
        """Do what `augment` does by `ViewParameters.packed`, on the device.

        Every operation is done for every image.
        """
        boxes, (flipped, grayed, blurred), sigma = table[:, :4], table[:, 4:7].bool().unbind(1), table[:, 7]
        images = resample(unit, boxes, self.size, flipped)
        if self.recipe.jitter_probability > 0:
            jitter_all(images, table[:, 8:])
        if self.recipe.grayscale_probability > 0:
            images = torch.where(grayed[:, None, None, None], gray(images), images)
        if self.recipe.blur_probability > 0:
            widest = reach(self.recipe.blur_sigma[1] * self.size / REFERENCE_SIZE)
            images = torch.where(blurred[:, None, None, None], blur(images, sigma, widest), images)
        return images
