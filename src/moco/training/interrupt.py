"""Signals end the program in order: outside the training loop by an exception, so that mounts and unfinished files
are cleared away; inside it by a flag, so that the loop saves at the next step boundary and then ends."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from moco.errors import Interrupted


class StopFlag:
    """`signal` is None until one of the watched signals arrives."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt  # the second Ctrl-C stops at once
        self.signal = number


@contextmanager
def _handled_by(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """SIGINT, SIGTERM, SIGUSR2 (Slurm's warning before the time limit; NCCL uses USR1) and SIGHUP, of a terminal that
    closes, go to the handler; the last not where it is ignored, as under nohup."""
    names = ["SIGINT", "SIGTERM", "SIGUSR2", "SIGHUP"]
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    numbers = [n for n in numbers if n != getattr(signal, "SIGHUP", None) or signal.getsignal(n) != signal.SIG_IGN]
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


@contextmanager
def watch_signals() -> Iterator[StopFlag]:
    """Signals set the flag."""
    flag = StopFlag()
    with _handled_by(flag._receive):
        yield flag


@contextmanager
def raise_on_signals() -> Iterator[None]:
    """Signals raise Interrupted."""

    def receive(number: int, frame: FrameType | None) -> None:
        raise Interrupted(number, saved=False)

    with _handled_by(receive):
        yield
