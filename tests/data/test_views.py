"""The tensor views against torchvision's own operations, number by number and draw by draw."""

from __future__ import annotations

import math

import pytest
import torch
import torchvision.transforms.functional as tvf
from scipy.stats import ks_2samp
from torch import Tensor
from torchvision.transforms import RandomResizedCrop

from moco.views import pixels, views
from moco.views.views import CROP_ATTEMPTS

DRAWS = 3000
RATIOS = (3 / 4, 4 / 3)


def torchvision_boxes(height: int, width: int, scale: tuple[float, float], draws: int) -> Tensor:
    torch.manual_seed(11)
    image = torch.empty(1, height, width)
    boxes = [RandomResizedCrop.get_params(image, list(scale), list(RATIOS)) for _ in range(draws)]
    return torch.tensor(boxes, dtype=torch.float64)


def our_boxes(height: int, width: int, scale: tuple[float, float], draws: int) -> Tensor:
    uniform = torch.rand(draws, 2 * CROP_ATTEMPTS + 2, generator=torch.Generator().manual_seed(5))
    return views.crop_boxes(uniform, height, width, scale)


@pytest.mark.parametrize(
    ("height", "width", "scale"), [(96, 96, (0.2, 1.0)), (32, 48, (0.08, 0.5)), (60, 30, (0.5, 1.0))]
)
def test_crop_boxes_have_the_distribution_of_random_resized_crop(
    height: int, width: int, scale: tuple[float, float]
) -> None:
    theirs, ours = torchvision_boxes(height, width, scale, DRAWS), our_boxes(height, width, scale, DRAWS)

    def measures(boxes: Tensor) -> dict[str, Tensor]:
        top, left, h, w = boxes.unbind(1)
        return {"area": h * w, "ratio": w / h, "top": top, "left": left, "height": h, "width": w}

    expected = measures(theirs)
    for name, values in measures(ours).items():
        # 0.05 is beyond the 99.9 % quantile of the statistic of two samples of 3,000
        assert ks_2samp(values.numpy(), expected[name].numpy()).statistic < 0.05, name


def test_crop_boxes_lie_inside_the_image() -> None:
    top, left, h, w = our_boxes(20, 33, (0.01, 1.0), DRAWS).unbind(1)
    assert min(top.min(), left.min()) == 0
    assert min(h.min(), w.min()) >= 1
    assert (top + h).max() == 20
    assert (left + w).max() == 33


@pytest.mark.parametrize(("height", "width"), [(10, 100), (100, 10), (40, 40), (30, 36)])
def test_a_crop_that_never_fits_falls_back_to_the_centre_as_in_torchvision(height: int, width: int) -> None:
    expected = torchvision_boxes(height, width, (3.0, 4.0), 1)
    torch.testing.assert_close(our_boxes(height, width, (3.0, 4.0), 3), expected.expand(3, -1))


def test_the_fallback_touches_only_the_images_without_a_fit() -> None:
    uniform = torch.full((2, 2 * CROP_ATTEMPTS + 2), 0.5)
    uniform[0, : 2 * CROP_ATTEMPTS : 2] = 0.999  # the whole of a 10 x 100 image, in no allowed ratio
    uniform[1, : 2 * CROP_ATTEMPTS : 2] = 0.0
    boxes = views.crop_boxes(uniform, 10, 100, (0.05, 1.0))
    assert boxes[0].tolist() == [0, 43, 10, 13]
    assert boxes[1, 2:].tolist() == [7, 7]


BOXES = ((0, 0, 48, 40), (3, 5, 20, 17), (10, 2, 3, 30), (47, 39, 1, 1), (5, 5, 32, 32))


@pytest.mark.parametrize("size", [8, 9, 32, 70])
@pytest.mark.parametrize("flip", [False, True])
def test_resampling_equals_torchvisions_antialiased_resized_crop(size: int, flip: bool) -> None:
    images = torch.rand(len(BOXES), 3, 48, 40, generator=torch.Generator().manual_seed(0))
    boxes = torch.tensor(BOXES)
    expected = torch.cat(
        [tvf.resized_crop(images[i : i + 1], *box, [size, size], antialias=True) for i, box in enumerate(BOXES)]
    )
    expected = tvf.hflip(expected) if flip else expected
    found = pixels.resample(images, boxes, size, torch.full((len(BOXES),), flip))
    torch.testing.assert_close(found, expected, atol=1e-5 if size >= pixels.ENLARGED else 2e-6, rtol=0)


def colours() -> Tensor:
    """Noise, grays, black, white, pure colours and ties between channels."""
    images = torch.rand(4, 3, 12, 12, generator=torch.Generator().manual_seed(1))
    images[1] = images[1, :1]
    corners = [[r, g, b] for r in (0.0, 0.5, 1.0) for g in (0.0, 0.5, 1.0) for b in (0.0, 0.5, 1.0)]
    images[2, :, :2, :12] = torch.tensor(corners[:24]).T.reshape(3, 2, 12)
    images[3] = images[3].round()
    return images


def broadcast(value: float) -> Tensor:
    return torch.full((4, 1, 1, 1), value)


# torchvision's weight of red is 0.2989, ours (as PIL's) 0.299
LUMA_TOLERANCE = 4e-4


@pytest.mark.parametrize("factor", [0.0, 0.6, 1.0, 1.4, 3.0])
@pytest.mark.parametrize("name", ["adjust_brightness", "adjust_contrast", "adjust_saturation"])
def test_colour_adjustment_equals_torchvisions(name: str, factor: float) -> None:
    expected = getattr(tvf, name)(colours(), factor)
    found = getattr(pixels, name)(colours(), broadcast(factor))
    torch.testing.assert_close(found, expected, atol=LUMA_TOLERANCE, rtol=0)


@pytest.mark.parametrize("turns", [-0.5, -0.1, 0.0, 0.07, 0.25, 0.5])
def test_hue_equals_torchvisions(turns: float) -> None:
    found = pixels.adjust_hue(colours(), broadcast(turns))
    torch.testing.assert_close(found, tvf.adjust_hue(colours(), turns), atol=5e-6, rtol=0)


def test_hue_leaves_gray_pixels_exactly_as_they_are() -> None:
    gray = colours()[1:2]
    assert torch.equal(pixels.adjust_hue(gray.clone(), torch.full((1, 1, 1, 1), 0.3)), gray)


def test_each_image_gets_its_own_factor() -> None:
    factors = torch.tensor([0.5, 0.8, 1.2, 1.5]).view(4, 1, 1, 1)
    for name in ("adjust_brightness", "adjust_contrast", "adjust_saturation"):
        found = getattr(pixels, name)(colours(), factors)
        for i in range(4):
            expected = getattr(tvf, name)(colours()[i], float(factors[i]))
            torch.testing.assert_close(found[i], expected, atol=LUMA_TOLERANCE, rtol=0)


def test_gray_equals_torchvisions_grayscale() -> None:
    expected = tvf.rgb_to_grayscale(colours())
    torch.testing.assert_close(pixels.gray(colours()), expected, atol=2e-4, rtol=0)


@pytest.mark.parametrize("sigma", [0.3, 0.5, 1.0, 2.0])
def test_blur_equals_torchvisions_gaussian_blur_with_a_wide_kernel(sigma: float) -> None:
    images = colours()
    expected = tvf.gaussian_blur(images, [23, 23], [sigma, sigma])
    widths, reach = torch.full((len(images),), sigma), views.reach(sigma)
    found = pixels.blur(images, widths, reach)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    cut_off = tvf.gaussian_blur(images, [2 * reach + 1] * 2, [sigma, sigma])
    torch.testing.assert_close(found, cut_off, atol=2e-6, rtol=0)
    shared = pixels.blur(images, widths, 11)  # by a reach that is the widest image's
    torch.testing.assert_close(shared, found, atol=3e-7, rtol=0)


def test_a_blur_reaches_as_far_as_the_image_does() -> None:
    """In either direction, as reflected borders are no wider than the image."""
    images = colours()[:, :, :3, :2]
    found = pixels.blur(images, torch.full((len(images),), 2.0), 8)
    torch.testing.assert_close(found, tvf.gaussian_blur(images, [3, 5], [2.0, 2.0]), atol=2e-6, rtol=0)


def test_jitter_applies_all_four_operations_in_a_drawn_order() -> None:
    factors = torch.tensor([[0.7, 1.3, 0.6, 0.1]]).expand(4, -1)
    names = ("adjust_brightness", "adjust_contrast", "adjust_saturation", "adjust_hue")
    orders = set()
    for seed in range(6):
        order = torch.randperm(4, generator=torch.Generator().manual_seed(seed)).tolist()
        orders.add(tuple(order))
        expected = colours()
        for operation in order:
            expected = getattr(tvf, names[operation])(expected, float(factors[0, operation]))
        found = pixels.jitter(colours(), factors, torch.ones(4, dtype=torch.bool), [(slice(0, 4), order)])
        torch.testing.assert_close(found, expected, atol=6e-4, rtol=0)
    assert len(orders) > 3
    assert math.isclose(float(factors[0, 3]), 0.1, rel_tol=1e-6)
