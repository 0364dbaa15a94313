"""What decoding found, told: images that cannot be used, and those that are not decoded as they are stored."""

from __future__ import annotations

from collections import Counter

from moco.data.dataset import Dataset, Split
from moco.data.decode import ADJUSTED, DARK, ChunkReport
from moco.errors import Say, UserError, first_of

NAMED = 10  # images, each in a line of its own
Reports = dict[str, list[ChunkReport]]  # by split


def refuse_problems(dataset: Dataset, reports: Reports, say: Say) -> None:
    """Raise UserError, naming the first images, where any cannot be used."""
    problems = [named for name, split in dataset.splits.items() for named in _problems(split, reports[name])]
    if not problems:
        return
    if len(problems) > 1:
        for named in problems[:NAMED]:
            say(f"cannot be used: {named}")
    pool = sum(len(report.problems) for report in reports["unlabeled"])
    hint = f", or leave them out by data.unreadable: {pool}" if pool == len(problems) else ""
    raise UserError(
        f"{len(problems)} image(s) cannot be used: {first_of(problems, 170)}; mend or remove them{hint}",
        "E-DATA-UNREADABLE",
    )


def to_leave_out(split: Split, reports: list[ChunkReport], allowed: int, say: Say) -> list[int]:
    """Return numbers of the images that cannot be used, and tell them; none where they are more than allowed."""
    bad = [number for report in reports for number, _ in report.problems]
    if not 0 < len(bad) <= allowed or len(bad) == len(split):
        return []
    say(f"warning: {len(bad)} image(s) cannot be used and are left out: {first_of(_problems(split, reports), 1000)}")
    return bad


def count_adjusted(reports: Reports) -> dict[str, dict[str, int]]:
    """Return how many images of each split were adjusted, by the names of decode.ADJUSTED."""
    counts = {name: sum((report.adjusted for report in chunks), Counter()) for name, chunks in reports.items()}
    return {name: dict(sorted(count.items())) for name, count in counts.items()}


def tell_adjusted(reports: Reports, say: Say) -> None:
    """Say how many images are not decoded as they are stored, and where their numbers use little of their range."""
    counts = count_adjusted(reports)
    for kind, what in ADJUSTED.items():
        if told := [f"{count[kind]} of {name}" for name, count in counts.items() if count.get(kind)]:
            say(f"images {what}: {', '.join(told)}")
    dark = sum(report.dark for chunks in reports.values() for report in chunks)
    if dark:
        wide = sum(count.get("rescaled", 0) for count in counts.values())
        say(
            f"warning: {dark} of {wide} images of more than 8 bits a channel are nearly black (below {DARK} of 255); "
            "where they hold 10 or 12 bits, multiply all of them alike first"
        )


def _problems(split: Split, reports: list[ChunkReport]) -> list[str]:
    return [f"{split.image_name(i)} ({why})" for report in reports for i, why in report.problems]
