"""Pictures that go with a run, for people to look at. They decide nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from moco.data.cache import DecodedSplit
from moco.tracking.canvas import shown, writer

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TILE = 72  # pixels of a small image's side, at least
FRAME, GAP, CAPTION = 3, 6, 14  # pixels
RIGHT, WRONG, PLAIN = (40, 160, 70), (200, 50, 40), (120, 120, 120)
MAPPED = 500  # images of the feature map: a second or two
SEED = 0
QUERIES, NEIGHBOURS = 8, 8  # images drawn


@dataclass(frozen=True)
class Tile:
    """image: uint8 H x W x 3, RGB."""

    image: np.ndarray
    caption: str = ""
    colour: tuple[int, int, int] = PLAIN


def grid(rows: Sequence[Sequence[Tile]]) -> Image.Image:
    """Draw framed images in rows, with a caption below each; small ones are enlarged by whole factors."""
    height, width = rows[0][0].image.shape[:2]
    factor = max(1, -(-TILE // max(height, width)))
    size = (width * factor, height * factor)
    captions = max(tile.caption.count("\n") + 1 for row in rows for tile in row)  # lines
    step_x, step_y = size[0] + 2 * FRAME + GAP, size[1] + 2 * FRAME + GAP + CAPTION * captions
    sheet = Image.new("RGB", (step_x * max(map(len, rows)) + GAP, step_y * len(rows) + GAP), "white")
    draw = ImageDraw.Draw(sheet)
    for row, tiles in enumerate(rows):
        for column, tile in enumerate(tiles):
            x, y = GAP + column * step_x, GAP + row * step_y
            draw.rectangle((x, y, x + size[0] + 2 * FRAME - 1, y + size[1] + 2 * FRAME - 1), fill=tile.colour)
            sheet.paste(Image.fromarray(tile.image).resize(size, Image.Resampling.NEAREST), (x + FRAME, y + FRAME))
            words = "\n".join(_drawable(line, max(1, size[0] // 6)) for line in tile.caption.split("\n"))
            draw.text((x + FRAME, y + size[1] + 2 * FRAME), words, fill="black", spacing=0)
    return sheet


def _drawable(line: str, longest: int) -> str:
    """Return a caption's line for Pillow, whose plain font (without FreeType) knows Latin-1 alone."""
    text = shown(line, longest) if line else ""
    if isinstance(ImageFont.load_default(), ImageFont.ImageFont):
        text = text.encode("latin-1", "replace").decode("latin-1")
    return text


def views(images: np.ndarray, augment: Callable[[Tensor, torch.Generator], Tensor], count: int = 6) -> Image.Image:
    """Draw images (uint8 N x H x W x 3), each with `count` of the views that pretraining learns to tell apart.

    augment: of images in [0, 1], N x 3 x H x W.
    """
    generator = torch.Generator().manual_seed(SEED)
    unit = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    made = [augment(unit, generator).clamp(0, 1).mul(255).byte().permute(0, 2, 3, 1).cpu().numpy()
            for _ in range(count)]  # fmt: skip
    rows = []
    for number, image in enumerate(images):
        shown = [_resized(image, made[0].shape[1:3]), *(view[number] for view in made)]
        rows.append([Tile(view, "view" if place else "image") for place, view in enumerate(shown)])
    return grid(rows)


def _resized(image: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    if image.shape[:2] == size:
        return image
    return np.asarray(Image.fromarray(image).resize((size[1], size[0])))


def neighbours(
    queries: np.ndarray, actual: Sequence[str], gallery: np.ndarray, labels: Sequence[str], nearest: np.ndarray
) -> Image.Image:
    """Draw validation images and, beside each, the labelled ones that are nearest in the features.

    A neighbour is framed green where the class is the same. queries: uint8 Q x H x W x 3; nearest: Q x K, rows of the
    gallery.
    """
    rows = []
    for query, own, found in zip(queries, actual, nearest, strict=True):
        tiles = [Tile(gallery[i], labels[i], RIGHT if labels[i] == own else WRONG) for i in found]
        rows.append([Tile(query, own), *tiles])
    return grid(rows)


def mistakes(images: np.ndarray, said: Sequence[str], columns: int = 6) -> Image.Image:
    """Draw images (uint8 N x H x W x 3) that were classified wrongly, with what was said of each."""
    tiles = [Tile(image, words, WRONG) for image, words in zip(images, said, strict=True)]
    return grid([tiles[first : first + columns] for first in range(0, len(tiles), columns)])


def flat_map(features: np.ndarray) -> np.ndarray:
    """Return a map N x 2 of the features N x D by t-SNE (van der Maaten and Hinton 2008).

    A few images are shown by their first two principal components.
    """
    if len(features) < 50:
        centred = features - features.mean(0)
        _, _, directions = np.linalg.svd(centred, full_matrices=False)
        return np.asarray(centred @ directions[:2].T)
    from sklearn.manifold import TSNE

    return np.asarray(TSNE(init="pca", perplexity=30, max_iter=300, random_state=SEED).fit_transform(features))


def draw_map(features: np.ndarray, labels: np.ndarray, classes: list[str]) -> Callable[[Path], None]:
    """Return what writes a map of some validation images as a PNG. features: N x D; labels: N."""
    return writer(lambda: _map(features, labels, [shown(name) for name in classes]))


def _map(features: np.ndarray, labels: np.ndarray, classes: list[str]) -> Figure:
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    chosen = np.random.default_rng(SEED).permutation(len(features))[:MAPPED]
    points = flat_map(features[chosen].astype(np.float64))
    figure = Figure(figsize=(8, 6.5), layout="constrained")
    axes = figure.subplots()
    used = labels[chosen]
    colours = colormaps["tab10" if len(classes) <= 10 else "tab20" if len(classes) <= 20 else "nipy_spectral"]
    for number, name in enumerate(classes):
        of_class = points[used == number]
        axes.scatter(
            of_class[:, 0],
            of_class[:, 1],
            color=colours(number if len(classes) <= 20 else number / len(classes)),
            s=14,
            label=f" {name}",  # as the legend leaves out what begins with _
        )
    if len(classes) <= 20:
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    axes.set(xticks=[], yticks=[], title=f"features of {len(chosen)} validation images")
    return figure


def draw_curves(history: list[dict[str, object]], names: Sequence[str]) -> Callable[[Path], None]:
    """Return what writes metrics over the steps, one below the other, as a PNG. history: lines of the metric log."""
    return writer(lambda: _curves(history, names))


def _curves(history: list[dict[str, object]], names: Sequence[str]) -> Figure:
    from matplotlib.figure import Figure

    lines = {name: [(line["step"], line["metrics"][name]) for line in history if name in line["metrics"]]  # type: ignore[index, operator]
             for name in names}  # fmt: skip
    known = {name: points for name, points in lines.items() if points}
    height = 2.6 * max(len(known), 1)
    figure = Figure(figsize=(8, height))  # inches; a layout that fits itself would draw everything twice
    figure.subplots_adjust(left=0.11, right=0.98, bottom=0.5 / height, top=1 - 0.15 / height, hspace=0.3)
    for axes, (name, points) in zip(
        figure.subplots(max(len(known), 1), 1, squeeze=False)[:, 0], known.items(), strict=False
    ):
        axes.plot(*zip(*points, strict=True), marker="." if len(points) < 60 else "")
        axes.set(xlabel="step", ylabel=name.replace("_", " "))
        axes.grid(alpha=0.3)
    return figure


def of_features(
    train: DecodedSplit, val: DecodedSplit, train_features: Tensor, val_features: Tensor, names: list[str]
) -> dict[str, Callable[[Path], None]]:
    """Return what draws the neighbours in train of some images of val, and a map of more, by the picture's name.

    train_features, val_features: N x D each, those of train first.
    """
    theirs, labels = train.labels, val.labels
    if theirs is None or labels is None:
        return {}

    def draw_neighbours(path: Path) -> None:
        known = F.normalize(train_features[: len(theirs)], dim=1)
        near = (F.normalize(val_features[:QUERIES], dim=1) @ known.T).topk(min(NEIGHBOURS, len(known)), 1)
        actual, called = ([names[label] for label in part] for part in (labels[:QUERIES], theirs))
        neighbours(val.images[:QUERIES], actual, train.images, called, near.indices.numpy()).save(path, "png")

    return {
        "neighbours": draw_neighbours,
        "features": draw_map(val_features.numpy(), labels, names),
    }
