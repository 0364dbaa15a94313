"""Signals end the program in order: outside the training loop by an exception, so that mounts and unfinished files
are cleared away; inside it by a flag, so that the loop saves at the next step boundary and then ends."""

from __future__ import annotations

import os
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
    numbers = [signal.SIGINT, signal.SIGTERM] + ([signal.SIGUSR2] if hasattr(signal, "SIGUSR2") else [])
    hang_up = getattr(signal, "SIGHUP", None)
    if hang_up is not None and signal.getsignal(hang_up) != signal.SIG_IGN:
        numbers.append(hang_up)
    terminals = [descriptor for descriptor in (1, 2) if os.isatty(descriptor)]

    def receive(number: int, frame: FrameType | None) -> None:
        if number == hang_up:
            _write_nowhere(terminals)
        handler(number, frame)

    before = {number: signal.signal(number, receive) for number in numbers}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def _write_nowhere(descriptors: list[int]) -> None:
    """A terminal that has closed takes nothing: an error instead of a message would end what is being saved."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for descriptor in descriptors:
        os.dup2(nowhere, descriptor)
    os.close(nowhere)


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
