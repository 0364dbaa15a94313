"""Signals set a flag; the loop saves at the next step boundary and then ends."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class StopFlag:
    """`signal` is None until one of the watched signals arrives."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt  # the second Ctrl-C stops at once
        self.signal = number


@contextmanager
def watch_signals() -> Iterator[StopFlag]:
    """SIGINT, SIGTERM and SIGUSR2 (Slurm's warning before the time limit; NCCL uses USR1) set the flag."""
    flag = StopFlag()
    numbers = [signal.SIGINT, signal.SIGTERM] + ([signal.SIGUSR2] if hasattr(signal, "SIGUSR2") else [])
    before = {number: signal.signal(number, flag._receive) for number in numbers}
    try:
        yield flag
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
