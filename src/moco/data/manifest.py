"""The manifest: what a dataset holds, by content. A DVC output that every later stage depends on."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from moco.errors import UserError

FORMAT = 2
EDITED = "digest and content disagree"
SPLITS = ("unlabeled", "train", "val")


# What copies within a split mean for what is measured with it.
REPEATED = {
    "train": "copies of held-out images are not learned from while they decide",
    "val": "they count as often, so that intervals are too narrow",
}


@dataclass(frozen=True)
class SplitSummary:
    """count: images. pixels: sha256 over the digests of all images, in order. labels: sha256, or None."""

    count: int
    pixels: str
    labels: str | None
    per_class: list[int] | None


@dataclass(frozen=True)
class Manifest:
    """height, width: pixels. mean, std: per channel over the unlabeled images, scaled to [0, 1].
    settings: those of section `data` that decide the content, by dotted name. left_out: numbers of the unlabeled
    images that could not be used, counted in the source; excluded: [number, row of val] of those that also stand in val
    and were taken out for it. duplicates_train_val, classes_twice, val_in_pool: images of val that also stand in train,
    of train that stand in two classes, of val in the pool (taken out or not). repeated: images of train and of val that
    stand in the same split before. decoding: version of the rules by which
    files became pixels. adjusted: how many images of each split are not decoded as they are stored, by the names of
    decode.ADJUSTED."""

    source: dict[str, Any]
    settings: dict[str, Any]
    height: int
    width: int
    resize: int | None
    classes: list[str]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    splits: dict[str, SplitSummary]
    duplicates_train_val: int
    left_out: list[int] = field(default_factory=list)
    excluded: list[list[int]] = field(default_factory=list)
    classes_twice: int = 0
    val_in_pool: int = 0
    repeated: dict[str, int] = field(default_factory=dict)
    decoding: int = 1
    adjusted: dict[str, dict[str, int]] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """Return the sha256 of the content.

        Where the content comes from plays no part: a folder and the squashfs image made of it share one decoded cache.
        """
        content = {"format": FORMAT, "size": [self.height, self.width], "classes": self.classes} | {
            name: [split.count, split.pixels, split.labels] for name, split in self.splits.items()
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    @property
    def pool_size(self) -> int:
        """Return the number of images of the pool in the source, used or not."""
        return self.splits["unlabeled"].count + len(self.left_out) + len(self.excluded)

    def pool_numbers(self) -> np.ndarray:
        """Return the number in the source of each row of the decoded unlabeled images, rising."""
        gone = np.array([*self.left_out, *(number for number, _ in self.excluded)], np.int64)
        return np.setdiff1d(np.arange(self.pool_size), gone, assume_unique=True)

    def pool_is_train(self) -> bool:
        """Return whether the pool has no images of its own, so that all of train stands in it."""
        return self.source.get("pool") == "train"

    def notes(self) -> list[str]:
        """Return what must be known of the data wherever a number that was measured with it is shown."""
        said = []
        if self.pool_is_train():
            said.append("the pool is train's images, so pretraining sees the held-out ones too")
        if self.duplicates_train_val:
            said.append(f"{self.duplicates_train_val} image(s) of val also stand in train: scores on val are too high")
        if self.classes_twice:
            said.append(f"{self.classes_twice} image(s) of train stand in two classes")
        for name, count in self.repeated.items():
            if count:
                said.append(f"{count} image(s) of {name} repeat another one of {name}: {REPEATED[name]}")
        if missing := self.classes_without_val():
            names = ", ".join(missing)[:80]
            said.append(f"{len(missing)} class(es) have no image in val, which says nothing of them: {names}")
        if self.excluded:
            said.append(f"{len(self.excluded)} image(s) of the pool also stand in val and were taken out of the pool")
        elif self.val_in_pool:
            said.append(f"{self.val_in_pool} image(s) of the pool also stand in val: pretraining sees them")
        return said

    def classes_without_val(self) -> list[str]:
        """Return the names of the classes that no image of val has."""
        val = self.splits.get("val")
        counts = [] if val is None else val.per_class or []
        return [name for name, count in zip(self.classes, counts, strict=False) if not count]

    def to_json(self) -> str:
        """Return the text of the manifest's file, with its format and digest."""
        return json.dumps({"format": FORMAT, "digest": self.digest, **asdict(self)}, indent=2) + "\n"


def parse_manifest(text: str) -> Manifest:
    """Return the manifest of a file's text. Raises ValueError where it is none, or was edited by hand."""
    try:
        tree = json.loads(text)
        tree.pop("format")
        digest = tree.pop("digest")
        tree["splits"] = {name: SplitSummary(**split) for name, split in tree["splits"].items()}
        tree["mean"], tree["std"] = tuple(tree["mean"]), tuple(tree["std"])
        manifest = Manifest(**tree)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError("not a manifest") from error
    if manifest.digest != digest:
        raise ValueError(EDITED)
    return manifest


def load_manifest(path: Path) -> Manifest:
    """Read a manifest. Raises UserError where the file is missing, not a manifest or edited by hand."""
    try:
        return parse_manifest(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: not found; run `moco data` (or `dvc repro data`) first") from None
    except ValueError as error:
        found = EDITED if str(error) == EDITED else "not a manifest of this version"
        raise UserError(f"{path}: {found}; run `moco data` again") from None
