"""When training has diverged: stop, or go back to the last checkpoint with a smaller learning rate, as configured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moco.errors import DivergedError, Say, UserError
from moco.files import write_text
from moco.runs.checkpoints import CheckpointFolder

NAME = "steps_back"  # in the run's folder, and in states: how many times it has gone back
FACTOR = 0.5  # of the learning rate, each time


def taken(folder: Path, saved: dict[str, Any] | None = None) -> int:
    """Return how many times the run has gone back so far. Raises UserError where the file is damaged.

    A resumed process continues with the learning rate of the one before, and a branch with that of the run that its
    first state is from.
    """
    path = folder / NAME
    try:
        here = int(path.read_text(encoding="ascii")) if path.exists() else 0
    except ValueError:
        raise UserError(f"{path}: damaged, no number; write into it how many times the run has gone back") from None
    before = int((saved or {}).get(NAME, 0))
    if before > here:
        write_text(path, str(before))
    return max(here, before)


def rate(lr: float, steps: int) -> float:
    """Return the learning rate after so many steps back."""
    return lr * FACTOR**steps


def roll_back(checkpoints: CheckpointFolder, allowed: int, error: DivergedError, resume: Path | None, say: Say) -> None:
    """Record one more step back, or raise the error where no more are allowed.

    From the second step back on, the newest checkpoint is given up, which may be from a time when the trouble had begun
    already, unless the user has named it.
    """
    steps, paths = taken(checkpoints.folder), checkpoints.paths()
    if steps >= allowed:
        raise error
    named = resume is not None and bool(paths) and resume.exists() and resume.samefile(paths[-1])
    if steps and len(paths) > 1 and not named:
        checkpoints.drop_newest()
    write_text(checkpoints.folder / NAME, str(steps + 1))
    say(f"warning: {error}")
    place = "the last checkpoint" if paths else "the beginning"
    say(f"warning: back to {place} with {FACTOR ** (steps + 1):g} of pretrain.lr (step back {steps + 1} of {allowed})")
