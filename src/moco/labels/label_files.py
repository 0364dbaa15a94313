"""Label files in all their forms, read into lines that say which image has which label.

A file names images of the unlabelled pool: a table with a header that has `image` and `label` (a reply to a request has
more columns), with commas, semicolons or tabs, as UTF-8, UTF-16 or what old programs for Windows write; JSON lines, or
JSON as a list of objects or an object of columns. A folder brings images of its own: one for each class, or a dataset
in the contract's layout whose train/ has more images than ours. A folder of label files is all of them.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moco.csv_files import unguarded
from moco.data.listing import images_below, shown, subfolders
from moco.data.sources import numbered_images, read_labels
from moco.errors import Say, UserError, first_of, quoted
from moco.files import refuse_irregular
from moco.settings.reading import nearest

JSON = (".json", ".jsonl", ".ndjson")
SUFFIXES = (".csv", ".tsv", *JSON)  # of a folder's label files; a single file may have any name
WORKBOOKS = (".xlsx", ".xls", ".ods", ".numbers")
SEPARATORS = ",;\t"
MARKS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"),
         (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))  # fmt: skip
PACKED = {b"PK\x03\x04": "a workbook", b"\xd0\xcf\x11\xe0": "a workbook", b"\x1f\x8b": "a compressed file"}
FORMS = (
    "a CSV or JSON file with image and label, a folder of such files, a folder per class, "
    "or a dataset with more labels in train/"
)


@dataclass(frozen=True)
class Line:
    """One line of a label file, or one file of a folder.

    place: FILE:LINE, or the image's file. name: of an image of the pool; or file: an image of its own. label: as it
    stands there, '' where there is none yet. content: hexadecimal digest of the image's pixels, '' where the file does
    not have it. numbered: the label is a class's number, whatever classes are called.
    """

    place: str
    name: str
    label: str
    content: str = ""
    file: str | None = None
    numbered: bool = False


@dataclass(frozen=True)
class Table:
    """A CSV file. rows: of as many cells as the header; numbers: the line of the file in which each ends."""

    path: Path
    header: list[str]
    rows: list[list[str]]
    numbers: list[int]

    def lines(self) -> list[Line]:
        """Return the rows as lines."""
        image, label = self.header.index("image"), self.header.index("label")
        content = self.header.index("content") if "content" in self.header else None
        # Files' and classes' names may begin or end with a space.
        return [
            Line(
                f"{self.path}:{number}", row[image], row[label] if row[label].strip() else "",
                "" if content is None else row[content].strip(),
            )
            for number, row in zip(self.numbers, self.rows, strict=True)
        ]  # fmt: skip


def read_lines(path: Path, say: Say) -> list[Line]:
    """Return all lines, in the order in which they stand.

    Raises UserError where the path is none of these forms, and for a line that cannot be understood.
    """
    if not path.exists():
        raise UserError(f"{path}: not found; train_extra.labels names {FORMS}", "E-LABEL-MISSING")
    if not path.is_dir():
        return _file(path, say)
    entries = sorted(shown(path))
    if (path / "train_label_tensor.pt").exists():
        return list(_dataset(path))
    tables = [entry for entry in entries if entry.suffix.lower() in (*SUFFIXES, *WORKBOOKS) and not entry.is_dir()]
    folders = subfolders(path)
    if tables and folders:
        raise UserError(
            f"{path}: both label files and folders in it ({tables[0].name}, {folders[0].name}); keep one kind",
            "E-LABEL-MIXED",
        )
    if not tables and not folders:
        raise UserError(f"{path}: no labels in it; train_extra.labels names {FORMS}", "E-LABEL-MISSING")
    kept = tables or folders
    if other := [entry.name for entry in entries if entry not in kept]:
        kind = "label files by their names" if tables else "folder of a class"
        say(f"warning: {len(other)} file(s) in {path} are no {kind} and are left out: {first_of(other)}")
    if tables:
        return [line for table in tables for line in _file(table, say)]
    return [line for folder in folders for line in _class(folder, say)]


def read_table(path: Path, say: Say) -> Table:
    """Return what a CSV file holds, without the guards of `moco.csv_files` and without rows that are empty.

    Raises UserError where it is none, has no columns `image` and `label`, or a row has other columns than the header.
    """
    refuse_irregular(path)
    text = _text_of(path, say)
    if named := re.match(r"sep=(.)\r?\n", text):  # for Excel
        text = text[named.end() :]
    separator = named[1] if named else _separator(text)
    reader, found, numbers = csv.reader(io.StringIO(text, newline=""), strict=True, delimiter=separator), [], []
    offset = 1 if named else 0
    try:
        header = [unguarded(name.strip()) for name in next(reader, [])]
        _check_header(f"{path}:{1 + offset}", header)
        for row in reader:
            if not any(cell.strip() for cell in row):
                continue
            if any(cell.strip() for cell in row[len(header) :]) or len(row) < len(header):
                raise UserError(
                    f"{path}:{reader.line_num + offset}: {len(row)} columns, the {len(header)} of the header are "
                    f"expected, which are separated by {separator!r}: {quoted(','.join(header))}",
                    "E-LABEL-ROW",
                )
            found.append([unguarded(cell) for cell in row[: len(header)]])
            numbers.append(reader.line_num + offset)
    except csv.Error as error:
        raise UserError(f"{path}:{reader.line_num + offset}: cannot be read as CSV: {error}", "E-LABEL-FILE") from None
    return Table(path, header, found, numbers)


def _file(path: Path, say: Say) -> list[Line]:
    refuse_irregular(path)
    return list(_json(path, say)) if path.suffix.lower() in JSON else read_table(path, say).lines()


def _text_of(path: Path, say: Say) -> str:
    """Return the file's text. Text without a mark that is not UTF-8 is read as cp1252: a guess, which is told."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}", "E-LABEL-FILE") from None
    for mark, kind in PACKED.items():
        if data.startswith(mark):
            raise UserError(
                f"{path}: {kind}, not text; save the sheet as CSV (UTF-8) and name that file", "E-LABEL-WORKBOOK"
            )
    encoding = next((name for mark, name in MARKS if data.startswith(mark)), "utf-8")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        try:
            text = data.decode("cp1252") if encoding == "utf-8" else "\0"
        except UnicodeDecodeError:
            text = "\0"
        if "\0" not in text:
            line = data.count(b"\n", 0, error.start) + 1
            say(f"warning: {path}:{line}: not UTF-8; read as Windows' cp1252, which is a guess: look at the names")
    if "\0" in text:
        raise UserError(
            f"{path}: not a text in UTF-8, or in UTF-16 with its mark; save it as CSV (UTF-8)", "E-LABEL-FILE"
        )
    return text


def _separator(text: str) -> str:
    """Return the separator by which the first line has the columns that are looked for; else the most columns."""
    first = next(iter(text.splitlines()), "")

    def columns(separator: str) -> tuple[bool, int]:
        try:
            cells = [cell.strip() for cell in next(csv.reader([first], delimiter=separator), [])]
        except csv.Error:
            cells = []
        return {"image", "label"} <= set(cells), len(cells)

    return max(SEPARATORS, key=columns)


def _check_header(place: str, header: list[str]) -> None:
    for name in ("image", "label"):
        if header.count(name) != 1:
            problem = "two columns" if name in header else "no column"
            hint = nearest(name, [each for each in header if each and each != name])
            raise UserError(
                f"{place}: {problem} '{name}'{hint} in the header {quoted(','.join(header))}; image,label is expected",
                "E-LABEL-HEADER",
            )


def _json(path: Path, say: Say) -> Iterator[Line]:
    for place, row in _objects(path, _text_of(path, say)):
        if not isinstance(row, dict) or not {"image", "label"} <= row.keys():
            raise UserError(
                f'{place}: an object with image and label is expected, {{"image": "17.png", "label": 3}}',
                "E-LABEL-ROW",
            )
        label, content = (_text(place, row, key) for key in ("label", "content"))
        yield Line(place, _text(place, row, "image"), label if label.strip() else "", content.strip())


def _objects(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    """Yield (place, entry) of a list, of an object of columns, or of JSON lines."""
    try:
        whole = json.loads(text, object_pairs_hook=_pairs)
    except (ValueError, RecursionError) as error:
        if text.lstrip().startswith("["):
            raise UserError(f"{path}: not JSON: {error}", "E-LABEL-FILE") from None
        whole = None
    if isinstance(whole, list):
        yield from ((f"{path}[{number}]", row) for number, row in enumerate(whole))
    elif isinstance(whole, dict) and any(isinstance(whole.get(key), list | dict) for key in ("image", "label")):
        yield from _columns(path, whole)
    elif isinstance(whole, dict):
        yield f"{path}:1", whole
    else:
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                try:
                    yield f"{path}:{number}", json.loads(line, object_pairs_hook=_pairs)
                except (ValueError, RecursionError) as error:
                    raise UserError(f"{path}:{number}: not JSON: {error}", "E-LABEL-FILE") from None


def _columns(path: Path, table: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the rows of an object of columns, which are lists, or objects by the row's name (pandas)."""
    columns = {
        name: dict(enumerate(column)) if isinstance(column, list) else column
        for name, column in table.items()
        if name in ("image", "label", "content")
    }
    if any(not isinstance(column, dict) or column.keys() != columns["image"].keys() for column in columns.values()):
        raise UserError(f"{path}: the columns image and label do not have the same rows", "E-LABEL-ROW")
    for row in columns["image"]:
        yield f"{path}[{row}]", {name: column[row] for name, column in columns.items()}


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object. Raises ValueError where a key stands twice: JSON would keep the last without a word."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands there twice")
    return found


def _text(place: str, row: dict[str, Any], key: str) -> str:
    value = row.get(key)
    if value is None or (isinstance(value, float) and math.isnan(value)):  # which pandas writes
        return ""
    whole = isinstance(value, float) and value.is_integer()
    if isinstance(value, bool) or not (isinstance(value, str | int) or whole):
        raise UserError(
            f"{place}: {key} is {quoted(json.dumps(value))[1:-1]}; text or a whole number is expected", "E-LABEL-ROW"
        )
    return str(value)


def _class(folder: Path, say: Say) -> Iterator[Line]:
    for path in images_below(folder, say):
        yield Line(path, path, folder.name, file=path)


def _dataset(folder: Path) -> Iterator[Line]:
    paths = [str(path) for path in numbered_images(folder / "train")]
    for path, label in zip(paths, read_labels(folder / "train_label_tensor.pt", len(paths), "train"), strict=True):
        yield Line(path, path, str(label), file=path, numbered=True)
