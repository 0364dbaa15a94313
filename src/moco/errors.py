"""What reaches a user: one line for a mistake, one for an interruption, and plain messages."""

from __future__ import annotations

import signal
from collections.abc import Callable

Say = Callable[[str], None]


class UserError(Exception):
    """Something the user can put right: says what is wrong, where, and what to do."""


class Interrupted(Exception):  # noqa: N818 - no error: the user asked for it
    """The run was asked to stop and has saved its state. `signal`: the signal's number."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.signal = number
