"""What reaches a user: one line for a mistake, one for an interruption, and plain messages."""

from __future__ import annotations

import signal
from collections.abc import Callable

Say = Callable[[str], None]


def one_line(text: str) -> str:
    """Without what would begin another line or steer a terminal: names of files may hold anything."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in text)


class UserError(Exception):
    """Something the user can put right: says what is wrong, where, and what to do.

    code: a stable name such as E-DATA-CHANGED, listed with cause and cure in docs/troubleshooting.md; the sentence may
    change, the code does not.
    """

    def __init__(self, text: str, code: str = "") -> None:
        super().__init__(text)
        self.code = code


class DivergedError(UserError):
    """Training has left the track: the loss or the weights are no numbers any more, or the features collapsed.
    signal: one that had arrived by then."""

    signal: int | None = None

    @classmethod
    def because(cls, what: str) -> DivergedError:
        """Of numbers that are none any more; `what` says which and where."""
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
