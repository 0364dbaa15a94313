"""A reply to a request: the form with its column `label` filled in, written whole after every answer."""

from __future__ import annotations

from pathlib import Path

from moco.csv_files import csv_text
from moco.data.label_meaning import ClassNames
from moco.errors import Say, UserError
from moco.files import remove_stale, write_text
from moco.labels.label_files import Line, Table, read_table


class AnsweredMeanwhileError(UserError):
    """Another page has given this image another label than the one that was on the page that answers."""


class Reply:
    """The rows of a reply, in the order in which they are shown: similar images one after the other.

    lines, labels ('' where there is none yet): of the rows. earlier: whether it answers an earlier request than the
    form, which it does not need to be continued. changes: (place, label) of every answer since this was made. Raises
    UserError where the form or an existing reply cannot be read, an earlier request has no question left, or the reply
    would not be safe where it is to be.
    """

    def __init__(self, form: Path, path: Path, classes: list[str], say: Say = lambda _: None) -> None:
        self.path, self.classes = path, classes
        self.changes: list[tuple[int, str]] = []
        _refuse_place(form, path)
        source = path if path.exists() else form
        if not source.is_file():
            raise UserError(f"{form}: not found; run `moco request` first")
        if path.parent.is_dir():
            remove_stale(path.parent, f".{path.name}.")  # of a server that was killed while it wrote
        self.seen = _state(path)  # before it is read: what changes while it is read is noticed
        table = _table(source, say)
        self.header, self.rows, lines = table.header, table.rows, table.lines()
        self.earlier = source != form and form.is_file() and _contents(form, say) != {line.content for line in lines}
        if self.earlier and all(line.label for line in lines):
            raise UserError(
                f"{path}: answers an earlier request, all of it; name another file with --reply for the new one"
            )
        names = ClassNames(classes)
        labels = [classes[names.find(line.place, line.label)[0]] if line.label else "" for line in lines]
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
        self.labels = [labels[place] for place in order]

    def answer(self, place: int, label: str, before: str) -> None:
        """Set the label of the row shown at `place` and write the file; '' takes the label back.

        before: the label that whoever answers has seen there. Raises AnsweredMeanwhileError where another label is
        there, and UserError where the file cannot be written or somebody else has changed it; the label that was there
        stays.
        """
        now = self.labels[place]
        if label == now:
            return
        if now != before:
            given = f"was answered '{now}'" if now else "lost its answer"
            raise AnsweredMeanwhileError(
                f"{self.lines[place].name} {given} on another page meanwhile; answer again to change that",
                "E-PAGE-MEANWHILE",
            )
        if _state(self.path) != self.seen:
            raise UserError(
                f"{self.path}: changed by another program; start `moco label` again to go on from there",
                "E-PAGE-CHANGED",
            )
        labels = [*self.labels[:place], label, *self.labels[place + 1 :]]
        column = self.header.index("label")
        for shown, row in enumerate(self.order):
            self.rows[row][column] = labels[shown]
        write_text(self.path, csv_text([self.header, *self.rows]))
        self.labels, self.seen = labels, _state(self.path)
        self.changes.append((place, label))

    @property
    def answered(self) -> int:
        """Return how many rows have a label."""
        return sum(label != "" for label in self.labels)


def _refuse_place(form: Path, path: Path) -> None:
    if path.suffix.lower() != ".csv":
        raise UserError(f"--reply {path}: a CSV file is written; give it a name that ends in .csv")
    if path.resolve().is_relative_to(form.parent.resolve()):
        raise UserError(f"--reply {path}: `dvc repro` replaces {form.parent} with all that is in it; use labels/")


def _state(path: Path) -> tuple[int, int] | None:
    """Return what changes with a file: time of modification and inode. None where there is no file."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_mtime_ns, found.st_ino


def _contents(form: Path, say: Say) -> set[str]:
    return {line.content for line in read_table(form, say).lines()}


def _table(path: Path, say: Say) -> Table:
    table = read_table(path, say)
    if "content" not in table.header:
        raise UserError(f"{path}: not a request's form, which has the columns image, label and content")
    return table
