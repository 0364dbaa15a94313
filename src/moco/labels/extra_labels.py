"""Labels beside those of train, joined to images by what they are, never by position.

In pools of numbered images (the contract's folders and torchvision's sets) an image's name is its number, with or
without `.png`, which gives the row of the decoded pool. In a class tree it is the path below unlabeled/ (without that,
below train/), and the row is found by the content of that file. Images that come with their labels, in folders, are
known by their content alone, and need not be in the pool. Which class a label means, moco.data.label_meaning says.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moco.data.batches import gather
from moco.data.cache import DecodedSplit
from moco.data.class_tree import pool_folder
from moco.data.decode import ChunkReport, read_image, summarise
from moco.data.label_meaning import ClassNames
from moco.data.manifest import Manifest
from moco.errors import Say, UserError, quoted
from moco.labels.label_files import Line, read_lines
from moco.settings.data import DataConfig

UNANSWERED, REPEATED, IN_TRAIN, IN_VAL, USED = "no label yet", "repeated", "in train", "in val", "used"
TOLD = {
    UNANSWERED: "have no label yet",
    REPEATED: "say again what stands before them",
    IN_TRAIN: "say again what train says",
    IN_VAL: "label an image that also stands in val and are left out",
}


@dataclass(frozen=True)
class Answer:
    """A line and what became of it. label: -1 where it has none."""

    line: Line
    digest: bytes
    label: int
    status: str


@dataclass(frozen=True)
class ExtraLabels:
    """Extra labels that can be used, with their images.

    images: M x H x W x 3 uint8; labels: M int64; digests: M x 16 uint8; each image once, in the pool's order. order:
    rank of each among the used lines as they stand in the file; places: of their lines. answers: every line, used or
    not.
    """

    images: np.ndarray
    labels: np.ndarray
    digests: np.ndarray
    order: np.ndarray
    places: list[str]
    answers: list[Answer]


def read_extra_labels(
    path: Path, config: DataConfig, manifest: Manifest, splits: dict[str, DecodedSplit], say: Say
) -> ExtraLabels:
    """Read and check labels in any of the forms of `moco.labels.label_files`.

    Raises UserError, naming file and line, for an image that is not in the pool or not the one that the label was asked
    for, for a label out of range, and for an image with two labels, whether both stand here or one in train. A label
    that is given again is used once. An image that also stands in val is left out: it would be trained on. Where no
    line has a label that can be used, M is 0.
    """
    lines = read_lines(path, say)
    images = _Images(config, manifest, splits["unlabeled"], splits["val"])
    _refuse_foreign_reply(path, lines, images)
    train = splits["train"]
    of_train = dict(zip(map(bytes, train.digests), train.known_labels.tolist(), strict=True))
    of_val = set(map(bytes, splits["val"].digests))
    seen: dict[bytes, Answer] = {}
    answers, names, positions = [], ClassNames(manifest.classes), 0
    for line in lines:
        digest = images.digest(line)
        if line.content and digest.hex() != line.content:
            raise UserError(
                f"{line.place}: {quoted(line.name)} is another image than was asked for: content {digest.hex()} here, "
                f"{quoted(line.content)} there; the dataset has changed since the request",
                "E-LABEL-CONTENT",
            )
        label, by_position = _label(line, names)
        positions += by_position
        answer = Answer(line, digest, label, _status(line, digest, label, seen, of_train, of_val, manifest.classes))
        answers.append(answer)
        if line.label:
            seen.setdefault(digest, answer)
    _tell(answers, say)
    if positions and not names.are_positions:
        say(f"note: {positions} label(s) are positions of classes, counted from 0: {names.positions()}")
    used = sorted((a for a in answers if a.status == USED), key=lambda answer: images.rank(answer.digest))
    rank = {id(answer): number for number, answer in enumerate(a for a in answers if a.status == USED)}
    return ExtraLabels(
        np.array([images.pixels(answer.line, answer.digest) for answer in used], np.uint8).reshape(
            len(used), manifest.height, manifest.width, 3
        ),
        np.array([answer.label for answer in used], np.int64),
        np.frombuffer(b"".join(answer.digest for answer in used), np.uint8).reshape(
            len(used), splits["unlabeled"].digests.shape[1]
        ),
        np.array([rank[id(answer)] for answer in used], np.int64),
        [answer.line.place for answer in used],
        answers,
    )


def _status(
    line: Line, digest: bytes, label: int, seen: dict[bytes, Answer], of_train: dict[bytes, int], of_val: set[bytes],
    classes: list[str],
) -> str:  # fmt: skip
    """Return what becomes of a line. Raises UserError where the image has another label elsewhere."""
    if label < 0:
        return UNANSWERED
    first = seen.get(digest)
    if first is not None and first.label != label:
        raise UserError(
            f"{line.place}: {quoted(line.name)} has the label {classes[label]} here and {classes[first.label]} in "
            f"{first.line.place}",
            "E-LABEL-CONFLICT",
        )
    if (theirs := of_train.get(digest, label)) != label:
        raise UserError(
            f"{line.place}: {quoted(line.name)} has the label {classes[label]} here and {classes[theirs]} in train",
            "E-LABEL-CONFLICT",
        )
    if first is not None:
        return REPEATED
    return IN_VAL if digest in of_val else IN_TRAIN if digest in of_train else USED


def _tell(answers: list[Answer], say: Say) -> None:
    counts = Counter(answer.status for answer in answers)
    for status, what in TOLD.items():
        if counts[status]:
            first = next(answer for answer in answers if answer.status == status)
            say(f"warning: {counts[status]} line(s) {what}, first {first.line.place}")


def _refuse_foreign_reply(path: Path, lines: list[Line], images: _Images) -> None:
    """Raise UserError where lines say what the images look like, and none of them looks like any in the pool."""
    contents = {line.content for line in lines if line.content}
    if contents and not contents & images.contents:
        raise UserError(
            f"{path}: a reply to a request on another dataset: none of its {len(contents)} images is in the unlabelled "
            "pool; set train_extra.labels to a reply to a request made here"
        )


def _label(line: Line, names: ClassNames) -> tuple[int, bool]:
    """Return (label, -1 where there is none; whether it was given as a position).

    Raises UserError where it is no class.
    """
    if not line.label:
        return -1, False
    return (names.position(line.place, int(line.label)), True) if line.numbered else names.find(line.place, line.label)


class _Images:
    """The pool's images by name, and those that come with their labels."""

    def __init__(self, config: DataConfig, manifest: Manifest, pool: DecodedSplit, val: DecodedSplit) -> None:
        self.manifest, self.pool = manifest, pool
        self.excluded = {number: bytes(val.digests[row]) for number, row in manifest.excluded}
        self.of_val = set(self.excluded.values())
        self.rows = {bytes(digest): row for row, digest in enumerate(pool.digests)}
        self.numbers = manifest.pool_numbers()
        self.contents = {digest.hex() for digest in self.rows}
        self.largest = config.max_pixels
        self.folder = pool_folder(Path(config.path)) if config.source == "classes" else None

    def digest(self, line: Line) -> bytes:
        """Return the digest of the image's pixels.

        Raises UserError where the pool has no such image, or the file is none.
        """
        if line.file is not None:
            return self._of_file(line, line.file)
        if self.folder is None:
            number = self._number(line)
            return self.excluded.get(number) or bytes(self.pool.digests[np.searchsorted(self.numbers, number)])
        name = line.name if os.path.isfile(self.folder / line.name) else line.name.strip()  # noqa: PTH113 - never raises
        inside = not Path(name).is_absolute() and ".." not in Path(name).parts
        digest = self._of_file(line, str(self.folder / name)) if inside else b""
        if digest not in self.rows and digest not in self.of_val:
            raise UserError(
                f"{line.place}: {quoted(line.name)} is not in the unlabelled pool as `moco data` found it",
                "E-LABEL-IMAGE",
            )
        return digest

    def rank(self, digest: bytes) -> tuple[int, bytes]:
        """Return a key for an order that does not depend on that of the lines: the pool's images, then all others."""
        return self.rows.get(digest, len(self.pool.images)), digest

    def pixels(self, line: Line, digest: bytes) -> np.ndarray:
        row = self.rows.get(digest)
        return self._read(line, str(line.file)) if row is None else gather(self.pool.images, np.array([row]))[0]

    def _number(self, line: Line) -> int:
        """Return the number of an image of the source."""
        found = re.fullmatch(r"(0|[1-9][0-9]{0,9})(\.png|\.0)?", line.name.strip())  # 17.0: pandas
        last = self.manifest.pool_size - 1
        if found is None or (number := int(found[1])) > last:
            raise UserError(
                f"{line.place}: {quoted(line.name)} is not in the unlabelled pool, which has 0.png to {last}.png",
                "E-LABEL-IMAGE",
            )
        if number in self.manifest.left_out:
            raise UserError(f"{line.place}: '{line.name}' could not be read and was left out (data.unreadable)")
        return number

    def _of_file(self, line: Line, path: str) -> bytes:
        report = ChunkReport(0, 0)
        summarise(report, self._read(line, path)[None])
        return report.digests

    def _read(self, line: Line, path: str) -> np.ndarray:
        size = (self.manifest.height, self.manifest.width)
        try:
            return np.ascontiguousarray(read_image(path, size, self.manifest.resize, largest=self.largest))
        except ValueError as error:
            if line.file is not None:
                raise UserError(f"{line.place}: cannot be used: {error}") from None
            raise UserError(
                f"{line.place}: {quoted(line.name)} is not in the unlabelled pool {self.folder}: {error}",
                "E-LABEL-IMAGE",
            ) from None
