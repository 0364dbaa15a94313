"""Pictures show what they claim to: looked at pixel by pixel, not only for being there."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import Moco, write_params
from moco.tracking import pictures
from moco.tracking.pictures import PLAIN, RIGHT, WRONG, Tile


def colours(image: Image.Image) -> set[tuple[int, ...]]:
    return {colour for _, colour in image.convert("RGB").getcolors(1 << 24)}  # type: ignore[union-attr, misc]


def tint(value: int) -> tuple[int, int, int]:
    """No grey, as letters have."""
    return (value, 0, 250)


def flat(value: int) -> np.ndarray:
    return np.full((24, 24, 3), tint(value), np.uint8)


def count(pixels: np.ndarray, colour: tuple[int, int, int]) -> int:
    return int((pixels == colour).all(2).sum())


def test_a_grid_enlarges_frames_and_names_its_images() -> None:
    image = np.zeros((24, 24, 3), np.uint8)
    image[0, 0] = (1, 2, 3)
    sheet = pictures.grid([[Tile(image, "", RIGHT), Tile(flat(9), "", WRONG)], [Tile(flat(7))]])
    pixels = np.asarray(sheet)
    assert count(pixels, (1, 2, 3)) == 9, "24 pixels are shown as 72"
    assert count(pixels, tint(7)) == 72 * 72
    assert {RIGHT, WRONG, PLAIN} <= colours(sheet)
    named = pictures.grid([[Tile(flat(200), "a name\nand more")]])
    assert (np.asarray(named) < 100).all(2).sum() > 20, "letters"


def test_neighbours_are_framed_by_whether_their_class_is_the_same() -> None:
    gallery = np.stack([flat(10), flat(20), flat(30)])
    sheet = pictures.neighbours(flat(40)[None], ["cat"], gallery, ["cat", "dog", "cat"], np.array([[2, 1]]))
    pixels = np.asarray(sheet)
    for value, shown in ((40, True), (30, True), (20, True), (10, False)):
        assert (count(pixels, tint(value)) == 72 * 72) is shown
    green = np.argwhere((pixels == RIGHT).all(2))[:, 1].mean()
    red = np.argwhere((pixels == WRONG).all(2))[:, 1].mean()
    assert green < red, "in the order of nearness"


def test_views_are_those_of_the_recipe() -> None:
    def halve(unit: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        return unit / torch.tensor([2, 1, 1]).view(1, 3, 1, 1)

    pixels = np.asarray(pictures.views(np.stack([flat(200), flat(100)]), halve, count=3))
    assert count(pixels, tint(200)) == 72 * 72 and count(pixels, tint(50)) == 3 * 72 * 72
    assert count(pixels, tint(100)) == 4 * 72 * 72


@pytest.mark.parametrize("number", [20, pytest.param(80, marks=pytest.mark.slow)])
def test_a_map_keeps_what_is_apart_apart(tmp_path: Path, number: int) -> None:
    labels = np.arange(number) % 2
    features = np.random.default_rng(0).normal(size=(number, 16)) + 40 * labels[:, None]
    points = pictures.flat_map(features)
    assert points.shape == (number, 2)
    centres = np.stack([points[labels == label].mean(0) for label in (0, 1)])
    nearest = np.linalg.norm(points[:, None] - centres, axis=2).argmin(1)
    assert (nearest == labels).all()
    pictures.draw_map(features, labels, ["a", "b"])(tmp_path / "map.png")
    assert {(31, 119, 180), (255, 127, 14)} <= colours(Image.open(tmp_path / "map.png")), "one colour a class"


def test_every_stage_leaves_its_pictures_with_the_run(moco: Moco, project: Path) -> None:
    write_params(project, tracking__pictures=True)
    for stage in ("data", "pretrain", "train", "eval"):
        assert moco(stage).returncode == 0
    found = {f"{path.parts[-4]}/{path.name}": path for path in (project / "runs").glob("*/*/artifacts/*.png")}
    assert {"pretrain/views.png", "pretrain/curves.png", "train/neighbours.png", "train/features.png",
            "train/curves.png", "eval/confusion.png", "eval/mistakes.png"} <= set(found)  # fmt: skip
    for path in found.values():
        picture = Image.open(path)
        assert min(picture.size) > 100 and len(colours(picture)) > 20, path


def test_a_picture_that_cannot_be_drawn_is_a_warning(moco: Moco, project: Path) -> None:
    from moco.settings.tracking import TrackingConfig
    from moco.tracking.metric_log import read_events
    from moco.tracking.run import Run

    def fail(path: Path) -> None:
        raise ValueError("no such colour")

    said: list[str] = []
    with Run(
        project / "run", "train", TrackingConfig(uri="", experiment="e", registered_model="m"), said.append
    ) as record:
        record.picture("map", fail)
    assert said == ["warning: map.png could not be drawn: no such colour"]
    assert list(read_events(record.path)) == []
