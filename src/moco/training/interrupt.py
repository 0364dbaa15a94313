"""Signals end the program in order: outside the training loop by an exception, so that mounts and unfinished files
are cleared away; inside it by a flag, so that the loop saves at the next step boundary and then ends."""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from moco.errors import Interrupted

_stopping = threading.Event()  # a signal has come already: another would disturb the ending


class StopFlag:
    """A flag that signals set: `signal` is None until one of the watched signals arrives."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt  # the second Ctrl-C stops at once
        self.signal = number


@contextmanager
def _handled_by(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Send the signals that end the program to the handler for the length of the context.

    These are SIGINT, SIGTERM, SIGUSR2 (Slurm's warning before the time limit; NCCL uses USR1) and SIGHUP, of a terminal
    that closes; the last not where it is ignored, as under nohup.
    """
    numbers = [signal.SIGINT, signal.SIGTERM] + ([signal.SIGUSR2] if hasattr(signal, "SIGUSR2") else [])
    hang_up = getattr(signal, "SIGHUP", None)
    if hang_up is not None and signal.getsignal(hang_up) != signal.SIG_IGN:
        numbers.append(hang_up)
    terminals = [descriptor for descriptor in (1, 2) if os.isatty(descriptor)]

    def receive(number: int, frame: FrameType | None) -> None:
        _stopping.set()
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
    """Redirect output to the null device.

    A terminal that has closed takes nothing: an error instead of a message would end what is being saved.
    """
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for descriptor in descriptors:
        os.dup2(nowhere, descriptor)
    os.close(nowhere)


@contextmanager
def watch_signals() -> Iterator[StopFlag]:
    """Yield a flag that signals set."""
    flag = StopFlag()
    with _handled_by(flag._receive):
        yield flag


@contextmanager
def raise_on_signals() -> Iterator[None]:
    """Raise Interrupted when a signal arrives within the context."""

    def receive(number: int, frame: FrameType | None) -> None:
        raise Interrupted(number, saved=False)

    with _handled_by(receive):
        yield


STAGE = "DVC_STAGE"  # set by DVC in the environment of what it starts
LOOK = 1.0  # seconds between two looks where the system does not tell of a process's end


def end_with_dvc() -> None:
    """Let this process receive SIGTERM when DVC, which has started it, ends without it.

    Its result would be in no dvc.lock, and the next `dvc repro` would find it still at work. Nothing is done where DVC
    has not started it.
    """
    if STAGE not in os.environ:
        return
    above, gone = _up_to_dvc()
    threading.Thread(target=_stop_after, args=(above, gone), name="end with dvc", daemon=True).start()


def _up_to_dvc() -> tuple[list[int], bool]:
    """Return the processes above this one up to DVC, the first that DVC did not start, and whether DVC is gone already.

    There may be shells, or torchrun, between.
    """
    above, current = [], os.getppid()
    while True:
        above.append(current)
        try:
            started = f"\0{STAGE}=".encode() in b"\0" + Path(f"/proc/{current}/environ").read_bytes()
            parent = int(Path(f"/proc/{current}/stat").read_text(errors="replace").rpartition(")")[2].split()[1])
        except OSError:  # another user's, or a system without /proc
            return above, False
        if not started or parent == 0:
            orphan = current == 1 and b"dvc" not in Path("/proc/1/cmdline").read_bytes()
            return above, orphan
        current = parent


def _stop_after(processes: list[int], gone: bool) -> None:
    """Wait until one of the processes has ended, and then stop this one."""
    parent = os.getppid()
    if not gone:
        try:
            ends = select.poll()
            for descriptor in [os.pidfd_open(process) for process in processes]:
                ends.register(descriptor, select.POLLIN)
            ends.poll()
        except ProcessLookupError:
            pass
        except (AttributeError, OSError):  # older kernels, other systems
            while os.getppid() == parent and all(_is_there(process) for process in processes):
                time.sleep(LOOK)
    if _stopping.is_set():
        return
    with suppress(OSError, ValueError):
        print("dvc has ended; the stage stops in order, as it would go on unseen", file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGTERM)


def _is_there(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        return True
    return True
