"""Label files in all their forms, read into lines that say which image has which label.

A file names images of the unlabelled pool: CSV with a header that has `image` and `label` (a reply to a request has
more columns), or JSON lines with these keys. A folder brings images of its own: one for each class, or a dataset in the
contract's layout whose train/ has more images than ours. A folder of CSV and JSON-lines files is all of them.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moco.data.class_tree import images_below, shown
from moco.data.sources import numbered_images, read_labels
from moco.errors import Say, UserError
from moco.files import refuse_irregular
from moco.params import nearest

SUFFIXES = (".csv", ".jsonl", ".ndjson")
FORMS = (
    "a CSV or JSON-lines file with image and label, a folder of such files, a folder per class, "
    "or a dataset with more labels in train/"
)


@dataclass(frozen=True)
class Line:
    """place: FILE:LINE, or the image's file. name: of an image of the pool; or file: an image of its own. label: as
    it stands there, '' where there is none yet. content: hexadecimal digest of the image's pixels, '' where the
    file does not have it. numbered: the label is a class's number, whatever classes are called."""

    place: str
    name: str
    label: str
    content: str = ""
    file: str | None = None
    numbered: bool = False


def read_table(path: Path) -> list[Line]:
    """All lines of a CSV or JSON-lines file. Raises UserError where it is none, and for a line that cannot be
    understood."""
    refuse_irregular(path)
    return list(_file(path))


def read_lines(path: Path, say: Say) -> list[Line]:
    """All lines, in the order in which they stand. Raises UserError where the path is none of these forms, and for a
    line that cannot be understood."""
    if not path.exists():
        raise UserError(f"{path}: not found; train_extra.labels names {FORMS}")
    if not path.is_dir():
        return read_table(path)
    try:
        entries = sorted(shown(path))
    except OSError as error:
        raise UserError(f"{path}: cannot be listed: {error.strerror}") from None
    if (path / "train_label_tensor.pt").exists():
        return list(_dataset(path))
    tables = [entry for entry in entries if entry.suffix.lower() in SUFFIXES]
    folders = [entry for entry in entries if entry.is_dir()]
    if tables and folders:
        raise UserError(
            f"{path}: both label files and folders in it ({tables[0].name}, {folders[0].name}); keep one kind"
        )
    if tables:
        return [line for table in tables for line in _file(table)]
    if folders:
        return [line for folder in folders for line in _class(folder, say)]
    raise UserError(f"{path}: no labels in it; train_extra.labels names {FORMS}")


def _file(path: Path) -> Iterator[Line]:
    try:
        yield from (_csv if path.suffix.lower() not in SUFFIXES[1:] else _json)(path)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        kind = "JSON lines" if path.suffix.lower() in SUFFIXES[1:] else "CSV"
        raise UserError(f"{path}: cannot be read as {kind}: {error}") from None


def _csv(path: Path) -> Iterator[Line]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        header = [name.strip() for name in next(reader, [])]
        missing = [name for name in ("image", "label") if header.count(name) != 1]
        if missing:
            hint = nearest(missing[0], [name for name in header if name])
            raise UserError(
                f"{path}:1: no column '{missing[0]}'{hint} in the header '{','.join(header)}'; image,label is expected"
            )
        for row in reader:
            if not row:
                continue
            if len(row) != len(header):
                wanted = ",".join(header)
                raise UserError(f"{path}:{reader.line_num}: {len(row)} columns, {wanted} is expected")
            cells = dict(zip(header, row, strict=True))
            label, content = (cells.get(name, "").strip() for name in ("label", "content"))
            # Files' names may begin or end with a space.
            yield Line(f"{path}:{reader.line_num}", cells["image"], label, content)


def _json(path: Path) -> Iterator[Line]:
    with path.open(encoding="utf-8-sig") as file:
        for number, text in enumerate(file, 1):
            if not text.strip():
                continue
            place = f"{path}:{number}"
            try:
                row = json.loads(text)
            except ValueError as error:
                raise UserError(f"{place}: not JSON: {error}") from None
            if not isinstance(row, dict) or not {"image", "label"} <= row.keys():
                raise UserError(
                    f'{place}: an object with image and label is expected, {{"image": "17.png", "label": 3}}'
                )
            label, content = (_text(place, row, key).strip() for key in ("label", "content"))
            yield Line(place, _text(place, row, "image"), label, content)


def _text(place: str, row: dict[str, Any], key: str) -> str:
    value = row.get(key)
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise UserError(f"{place}: {key} is {json.dumps(value)}; text or a whole number is expected")
    return str(value)


def _class(folder: Path, say: Say) -> Iterator[Line]:
    for path in images_below(folder, say):
        yield Line(path, path, folder.name, file=path)


def _dataset(folder: Path) -> Iterator[Line]:
    paths = [str(path) for path in numbered_images(folder / "train")]
    for path, label in zip(paths, read_labels(folder / "train_label_tensor.pt", len(paths), "train"), strict=True):
        yield Line(path, path, str(label), file=path, numbered=True)
