"""A reply to a request: the form with its column `label` filled in, written whole after every answer."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from moco.data.label_files import Line, read_table
from moco.errors import UserError
from moco.files import write_text


class Reply:
    """The rows of a reply, in the order in which they are shown: similar images one after the other.

    lines, labels ('' where there is none yet): of the rows. earlier: whether it answers an earlier request than the
    form, which it does not need to be continued. Raises UserError where the form or an existing reply cannot be read,
    an earlier request has no question left, or the reply would not be safe where it is to be.
    """

    def __init__(self, form: Path, path: Path, classes: list[str]) -> None:
        self.path, self.classes = path, classes
        _refuse_place(form, path)
        source = path if path.exists() else form
        if not source.is_file():
            raise UserError(f"{form}: not found; run `moco request` first")
        self.header, self.rows = _table(source)
        lines = read_table(source)
        self.seen = _state(path)
        self.earlier = source != form and form.is_file() and _contents(form) != {line.content for line in lines}
        if self.earlier and all(line.label for line in lines):
            raise UserError(
                f"{path}: answers an earlier request, all of it; name another file with --reply for the new one"
            )
        for line in lines:
            if line.label and line.label not in classes and not _number(line.label, classes):
                raise UserError(f"{line.place}: label '{line.label}' is no class; correct it there first")
        cluster = self.header.index("cluster") if "cluster" in self.header else None
        first: dict[str, int] = {}
        for place, row in enumerate(self.rows):
            first.setdefault(row[cluster] if cluster is not None else "", place)
        order = sorted(
            range(len(lines)),
            key=lambda place: (first[self.rows[place][cluster] if cluster is not None else ""], place),
        )
        self.order = order
        self.lines: list[Line] = [lines[place] for place in order]
        self.labels = [self._name(line.label) for line in self.lines]

    def answer(self, place: int, label: str) -> None:
        """Sets the label of the row shown at `place`, '' takes it back, and writes the file. Raises UserError, and
        keeps the label that was there, where it cannot be written or somebody else has changed it."""
        if _state(self.path) != self.seen:
            raise UserError(f"{self.path}: changed by another program; start `moco label` again to go on from there")
        labels = [*self.labels[:place], label, *self.labels[place + 1 :]]
        column = self.header.index("label")
        for shown, row in enumerate(self.order):
            self.rows[row][column] = labels[shown]
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([self.header, *self.rows])
        write_text(self.path, text.getvalue())
        self.labels, self.seen = labels, _state(self.path)

    @property
    def answered(self) -> int:
        return sum(label != "" for label in self.labels)

    def _name(self, label: str) -> str:
        return self.classes[int(label)] if _number(label, self.classes) and label not in self.classes else label


def _refuse_place(form: Path, path: Path) -> None:
    if path.suffix.lower() != ".csv":
        raise UserError(f"--reply {path}: a CSV file is written; give it a name that ends in .csv")
    if path.resolve().is_relative_to(form.parent.resolve()):
        raise UserError(f"--reply {path}: `dvc repro` replaces {form.parent} with all that is in it; use labels/")


def _state(path: Path) -> tuple[int, int] | None:
    """What changes with a file. None where there is none."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_mtime_ns, found.st_ino


def _number(label: str, classes: list[str]) -> bool:
    return label.isascii() and label.isdigit() and int(label) < len(classes)


def _contents(form: Path) -> set[str]:
    return {line.content for line in read_table(form)}


def _table(path: Path) -> tuple[list[str], list[list[str]]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = [row for row in csv.reader(file, strict=True) if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read as CSV: {error}") from None
    if not rows or not {"image", "label", "content"} <= {name.strip() for name in rows[0]}:
        raise UserError(f"{path}: not a request's form, which has the columns image, label and content")
    return [name.strip() for name in rows[0]], rows[1:]
