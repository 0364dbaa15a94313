"""Labels for images of the unlabelled pool, from a CSV file with the header `image,label`.

Image and label are joined by the image's name, never by position. In pools of numbered images (the contract's folders
and torchvision's sets) the name is the number, with or without `.png`, and is the row of the decoded pool. In a class
tree it is the path below unlabeled/ (without that, below train/), and the row is found by the content of that file.
A label is the name of a class, else its number. Where the names of classes are numbers themselves, the name is meant.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moco.config import DataConfig
from moco.data.cache import DecodedSplit
from moco.data.decode import ChunkReport, read_image, summarise
from moco.data.manifest import Manifest
from moco.errors import Say, UserError
from moco.params import nearest

HEADER = ["image", "label"]
CLASSES_SHOWN = 5


@dataclass(frozen=True)
class ExtraLabels:
    """Labels joined to images of the pool. rows: M int64 rows of the pool, rising, each once; labels: M int64."""

    rows: np.ndarray
    labels: np.ndarray


def read_extra_labels(
    path: Path, config: DataConfig, manifest: Manifest, splits: dict[str, DecodedSplit], say: Say
) -> ExtraLabels:
    """Reads and checks the file. Raises UserError, naming file and line, for a wrong header, an image that is not in
    the pool, a label out of range, and an image with two labels, whether both stand here or one in train.

    A label that is given again is used once. An image that also stands in val is left out: it would be trained on.
    """
    find = _finder(config, manifest, splits["unlabeled"])
    train, val, classes = splits["train"], splits["val"], manifest.classes
    assert train.labels is not None
    of_train = dict(zip(map(bytes, train.digests), train.labels.tolist(), strict=True))
    of_val = set(map(bytes, val.digests))
    seen: dict[bytes, tuple[int, str]] = {}  # content of an image: label, place
    used: dict[int, int] = {}  # row of the pool: label
    repeated, in_train, in_val = [], [], []
    for line, name, text in _rows(path):
        place = f"{path}:{line}"
        row, label = find(place, name), _label(place, text, classes)
        digest = bytes(splits["unlabeled"].digests[row])
        first, where = seen.setdefault(digest, (label, place))
        if first != label:
            raise UserError(f"{place}: '{name}' has the label {classes[label]} here and {classes[first]} in {where}")
        if (theirs := of_train.get(digest, label)) != label:
            raise UserError(f"{place}: '{name}' has the label {classes[label]} here and {classes[theirs]} in train")
        if where != place:
            repeated.append(place)
        elif digest in of_val:
            in_val.append(place)
        elif digest in of_train:
            in_train.append(place)
        else:
            used[row] = label
    for places, what in (
        (repeated, "say again what stands before them"),
        (in_train, "say again what train says"),
        (in_val, "label an image that also stands in val and are left out"),
    ):
        if places:
            say(f"warning: {len(places)} line(s) {what}, first {places[0]}")
    if not used:
        raise UserError(f"{path}: no label in it that could be used")
    rows = np.array(sorted(used), np.int64)
    return ExtraLabels(rows, np.array([used[row] for row in rows.tolist()], np.int64))


def _rows(path: Path) -> Iterator[tuple[int, str, str]]:
    """(line, image, label) as they stand in the file; empty lines are passed over."""
    if path.is_dir():
        raise UserError(f"{path}: is a folder; train_extra.labels names a CSV file with the header image,label")
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            header = [name.strip() for name in next(reader, [])]
            if header != HEADER:
                raise UserError(f"{path}:1: the header is '{','.join(header)}', image,label is expected")
            for row in reader:
                if len(row) == 2:
                    yield reader.line_num, row[0].strip(), row[1].strip()
                elif row:
                    raise UserError(f"{path}:{reader.line_num}: {len(row)} columns, image,label is expected")
    except FileNotFoundError:
        raise UserError(f"{path}: not found; train_extra.labels names a CSV file with the header image,label") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read as CSV: {error}") from None


def _label(place: str, text: str, classes: list[str]) -> int:
    if text in classes:
        return classes.index(text)
    if re.fullmatch(r"-?[0-9]{1,9}", text):
        if 0 <= int(text) < len(classes):
            return int(text)
        raise UserError(f"{place}: label {text} is out of range; {len(classes)} classes: 0 to {len(classes) - 1}")
    shown = ", ".join(classes[:CLASSES_SHOWN]) + (", …" if len(classes) > CLASSES_SHOWN else "")
    raise UserError(f"{place}: label '{text}' is no class{nearest(text, classes)}; classes: {shown}")


def _finder(config: DataConfig, manifest: Manifest, pool: DecodedSplit) -> Callable[[str, str], int]:
    """find(place, name): row of the pool. Raises UserError where the pool has no such image."""
    if config.source == "classes":
        return _finder_by_content(config, manifest, pool)

    def find(place: str, name: str) -> int:
        number = re.fullmatch(r"(0|[1-9][0-9]{0,9})(\.png)?", name)
        if number is None or int(number[1]) >= len(pool.images):
            last = len(pool.images) - 1
            raise UserError(f"{place}: '{name}' is not in the unlabelled pool, which has 0.png to {last}.png")
        return int(number[1])

    return find


def _finder_by_content(config: DataConfig, manifest: Manifest, pool: DecodedSplit) -> Callable[[str, str], int]:
    """For files that have names of their own: files that came or went since would shift every position."""
    root = Path(config.path)
    folder = root / "unlabeled" if (root / "unlabeled").is_dir() else root / "train"
    rows = {bytes(digest): row for row, digest in enumerate(pool.digests)}

    def find(place: str, name: str) -> int:
        report = ChunkReport(0, 0)
        try:
            image = read_image(str(folder / name), (manifest.height, manifest.width), manifest.resize)
        except ValueError as error:
            raise UserError(f"{place}: '{name}' is not in the unlabelled pool {folder}: {error}") from None
        summarise(report, np.ascontiguousarray(image)[None])
        if report.digests not in rows:
            raise UserError(f"{place}: '{name}' is not in the unlabelled pool as `moco data` found it")
        return rows[report.digests]

    return find
