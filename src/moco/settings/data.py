"""Section `data`: where images come from."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Literal

from moco.settings.kinds import Count, CountOrZero, Range, Seed, setting


@dataclass(frozen=True, kw_only=True)
class GeneratedConfig:
    """Images that the project draws (moco/data/generated.py), of 12 classes."""

    seed: Seed = setting(0, "of the drawing")
    size: Annotated[int, Range(32, 256)] = setting(48, "pixels")
    unlabeled: Count = setting(8000, "images")
    train_per_class: Annotated[int, Range(2)] = setting(20, "labels for each class: few, as this project is for")
    val_per_class: Count = setting(150, "images for each class, for the report alone")
    pack: bool = setting(False, "pack them as student_dataset.sqsh and read them from there (needs squashfs-tools)")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where images come from."""

    source: Literal["generated", "squashfs", "folder", "classes", "cifar10", "stl10"] = setting(
        "generated", "generated | squashfs | folder | classes | cifar10 | stl10"
    )
    path: str = setting("build", "generated: where to draw; squashfs: the .sqsh file; else the folder of the dataset")
    mounted: str = setting(
        "/dataset", 'squashfs: use this folder instead where it exists (a mounted overlay); "": never'
    )
    copy_to_scratch: bool = setting(False, "squashfs: copy the file to node-local scratch before it is opened")
    download: bool = setting(False, "cifar10, stl10: download the files into `path` when they are missing")
    classes: Annotated[int, Range(2)] | None = setting(
        None, "number of classes; null: from classes.txt or the folders, else from the labels of train"
    )
    resize: Annotated[int, Range(8, 1024)] | None = setting(
        None, "pixels: resize the shorter side to this and cut out the central square; null: leave images as they are"
    )
    labelled: Count | None = setting(
        None, "use this many labels of train, chosen at random once, with every class in proportion; null: all"
    )
    unreadable: CountOrZero = setting(
        0, "up to this many unreadable images of unlabeled are reported and skipped; more are an error, and so is any "
        "in train or val",
    )  # fmt: skip
    exclude_val: bool = setting(
        True,
        "take images of the pool that also stand in val out of the pool, and report them; false: report alone",
        before=True,
    )
    max_pixels: Count = setting(
        178956970, "of one image; larger ones are refused, since a small file can fill the memory this way"
    )
    generated: GeneratedConfig = dataclasses.field(default_factory=GeneratedConfig)
