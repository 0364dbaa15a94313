"""What reaches a user: one line for a mistake, one for an interruption, and plain messages."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

from moco.redaction import redact

Say = Callable[[str], None]
T = TypeVar("T")
LONGEST = 300  # characters of a line that reports an error, with "error: " and its code
QUOTED = 40  # characters that a message quotes of a file's content


def one_line(text: str) -> str:
    """Return the text without what would begin another line or steer a terminal: names of files may hold anything."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in text)


def shortened(text: str, limit: int) -> str:
    """Return the text on one line of at most `limit` characters.

    A text that is too long loses its middle, as a message begins with the place and ends with what to do.
    """
    text = one_line(text)
    if len(text) <= limit:
        return text
    end = limit // 3
    return f"{text[: limit - end - 3]} … {text[-end:]}"


def quoted(text: str) -> str:
    """Return the beginning of what somebody wrote, in quotes: a cell of a table can be as large as the file."""
    return f"'{text}'" if len(text) <= QUOTED else f"'{text[: QUOTED - 1]}…'"


NAMED = 10  # of a list of bad things, in a message


def first_of(items: Sequence[object], room: int = 160) -> str:
    """Return the first ten items as a message shows them, fewer where they take more than `room` characters."""
    shown: list[str] = []
    for item in map(str, items[:NAMED]):
        if shown and sum(map(len, shown)) + 2 * len(shown) + len(item) > room:
            break
        shown.append(item if len(item) <= room else f"{item[: room // 2]}…{item[-room // 2 :]}")
    more = len(items) - len(shown)
    return ", ".join(shown) + (f", and {more} more" if more else "")


def present(value: T | None, what: str) -> T:
    """Return a value that must be there. Raises RuntimeError where it is None, which is a fault of this program."""
    if value is None:
        raise RuntimeError(f"{what}: missing, though nothing here can work without")
    return value


class UserError(Exception):
    """Something the user can put right: says what is wrong, where, and what to do, on one line of at most LONGEST.

    code: a stable name such as E-DATA-CHANGED, listed with cause and cure in docs/troubleshooting.md; the sentence may
    change, the code does not. Passwords, tokens and keys in the text are hidden.
    """

    def __init__(self, text: str, code: str = "") -> None:
        super().__init__(shortened(redact(text), LONGEST - len("error: ") - len(f" [{code}]")))
        self.code = code


class DivergedError(UserError):
    """Training has diverged: the loss or the weights are NaN or infinite, or the features have collapsed.

    signal: one that had arrived by then.
    """

    signal: int | None = None

    @classmethod
    def because(cls, what: str) -> DivergedError:
        """Return the error for numbers that are NaN or infinite; `what` says which numbers and where."""
        return cls(
            f"{what}: training has diverged; lower the learning rate or use precision fp32 (saved checkpoints are from "
            "before)"
        )


class AloneError(UserError):
    """Of one process of several: it tells, whatever its rank, and does not wait for the others, who know nothing."""


class ProcessLostError(AloneError):
    """Another process of the same run has ended. Each process that notices tells so: the lost one may not have."""


class Interrupted(BaseException):
    """The program was asked to stop. `signal`: the signal's number; `saved`: the same command continues.

    As KeyboardInterrupt, it is no Exception, so that no handler of errors takes it for one.
    """

    def __init__(self, number: int, saved: bool) -> None:
        ending = "the state is saved, the same command continues" if saved else "the same command starts again"
        super().__init__(f"stopped by {signal.Signals(number).name}; {ending}")
        self.signal, self.saved = number, saved


def say(message: str) -> None:
    """Print a line for the user."""
    print(shortened(message, LONGEST), file=sys.stderr, flush=True)
