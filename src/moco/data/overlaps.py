"""Images that stand in several splits, or in several classes: found by the digests of their pixels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from moco.data.dataset import Dataset
from moco.data.decode import DIGEST_BYTES, ChunkReport
from moco.errors import NAMED, UserError, first_of, present


@dataclass(frozen=True)
class Overlaps:
    """val_in_train: rows (train, val), a pair for each image of val that stands in train. classes_twice: rows of train,
    pairs of the same pixels with two labels. repeated: by split, how many images stand there before."""

    val_in_train: list[tuple[int, int]]
    classes_twice: list[tuple[int, int]]
    repeated: dict[str, int]


def digests(reports: Sequence[ChunkReport]) -> list[bytes]:
    """Return the digest of every image of a split, in order."""
    joined = b"".join(report.digests for report in reports)
    return [joined[i : i + DIGEST_BYTES] for i in range(0, len(joined), DIGEST_BYTES)]


def same(first: list[bytes], second: list[bytes]) -> list[tuple[int, int]]:
    """Return rows (first, second) of equal digests: for each row of the second the earliest one of the first."""
    rows: dict[bytes, int] = {}
    for row, digest in enumerate(first):
        rows.setdefault(digest, row)
    return [(rows[digest], row) for row, digest in enumerate(second) if digest in rows]


def pool_without_val(
    reports: dict[str, list[ChunkReport]], count: int, left_out: list[int]
) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """Return rows of the pool that do not stand in val, and for all others (number in the source, row of val).

    count: images of the pool; left_out: numbers of images of the source that are not among them."""
    pairs = same(digests(reports["val"]), digests(reports["unlabeled"]))
    rows = np.array([row for _, row in pairs], np.int64)
    numbers = np.setdiff1d(np.arange(count + len(left_out)), np.array(left_out, np.int64))[rows]
    found = [(number, row) for number, (row, _) in zip(numbers.tolist(), pairs, strict=True)]
    return np.setdiff1d(np.arange(count), rows), found


def refuse_nothing(kept: np.ndarray) -> None:
    """Raise UserError where no image of the pool would be left."""
    if not len(kept):
        raise UserError(
            "unlabeled: every image of the pool also stands in val; a score on val would be of images that pretraining "
            "has seen: add others",
            "E-DATA-POOL-IN-VAL",
        )


def overlaps(train: list[bytes], val: list[bytes], labels: np.ndarray) -> Overlaps:
    """Return what is in two places. labels: of train."""
    pairs = [(first, row) for first, row in same(train, train) if labels[first] != labels[row]]
    repeated = {name: len(split) - len(set(split)) for name, split in (("train", train), ("val", val))}
    return Overlaps(same(train, val), pairs, repeated)


def warnings(found: Overlaps, dataset: Dataset, classes: list[str]) -> list[str]:
    """Return a line for each kind, with the names of the first images."""
    train, val = dataset.splits["train"], dataset.splits["val"]
    said = []
    if found.val_in_train:
        names = _lazily(found.val_in_train, lambda first, row: f"{val.image_name(row)} = {train.image_name(first)}")
        said.append(f"warning: {len(names)} image(s) of val also stand in train: {first_of(names)}")
    if found.classes_twice:
        labels = present(train.labels, "labels of train")

        def both(first: int, row: int) -> str:
            here, there = classes[labels[row]], classes[labels[first]]
            return f"{train.image_name(row)} ({here}) = {train.image_name(first)} ({there})"

        names = _lazily(found.classes_twice, both)
        said.append(f"warning: {len(names)} image(s) of train stand in two classes: {first_of(names)}")
    return said


def _lazily(pairs: list[tuple[int, int]], name: Callable[[int, int], str]) -> list[str]:
    """Return as many names as pairs, of which the first alone are made: the others are only counted."""
    return [name(*pair) if number < NAMED else "" for number, pair in enumerate(pairs)]
