"""Pictures for people: drawn with matplotlib, without a display, whatever the environment says."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from moco.files import write_atomically
from moco.tracking.canvas import shown, writer

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAMES_UP_TO = 40  # classes; with more, names would not be readable
NUMBERS_UP_TO = 20


def confusion_figure(confusion: np.ndarray, classes: list[str], path: Path) -> None:
    """Write confusion.png. confusion: C x C counts, true class by row. Colours are shares of the true class."""
    write_atomically(path, writer(lambda: _confusion(confusion, [shown(name) for name in classes])))


def _confusion(confusion: np.ndarray, classes: list[str]) -> Figure:
    from matplotlib.figure import Figure

    shares = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    side = min(4 + 0.4 * len(classes), 14)
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    if len(classes) <= NAMES_UP_TO:
        axes.set_xticks(range(len(classes)), classes, rotation=60, ha="right")
        axes.set_yticks(range(len(classes)), classes)
    if len(classes) <= NUMBERS_UP_TO:
        for (row, column), share in np.ndenumerate(shares):
            if share >= 0.005:
                colour = "white" if share > 0.5 else "black"
                axes.text(column, row, f"{share:.0%}", ha="center", va="center", color=colour, fontsize=7)
    accuracy = confusion.trace() / max(confusion.sum(), 1)
    axes.set(xlabel="predicted", ylabel="actual", title=f"{accuracy:.1%} of {confusion.sum()} images right")
    figure.colorbar(image, label="share of the actual class", shrink=0.8)
    return figure


def reliability_figure(count: np.ndarray, confidence: np.ndarray, accuracy: np.ndarray, path: Path) -> None:
    """Write accuracy against confidence, per bin; on the diagonal a classifier is as sure as it is right."""
    write_atomically(path, writer(lambda: _reliability(count, confidence, accuracy)))


def _reliability(count: np.ndarray, confidence: np.ndarray, accuracy: np.ndarray) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 5), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="gray", linewidth=1)
    used = count > 0
    sizes = 15 + 300 * count[used] / count.sum()
    axes.scatter(confidence[used], accuracy[used], s=sizes, alpha=0.8)
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="confidence", ylabel="accuracy", title="calibration on val")
    return figure
