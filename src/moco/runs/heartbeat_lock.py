"""Whether a process on another machine works in a folder, where file locks do not tell.

A lock of the operating system ends with its process, but on many shared file systems (Lustre mounted with
`localflock`, some NFS) other machines do not see it. So the holder of a folder shows a sign of life in a file, and who
finds the file of another machine watches whether the sign changes. No clock is read: those of two machines differ.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from moco.errors import Say, UserError
from moco.files import machine

NAME, LOCK = "holder", "lock"
LOCK_TIMEOUT_S = 2.0  # seconds for which somebody may hold a lock just to see whether its process is alive
BEAT = 10.0  # seconds between two signs of life
FIRST_BEAT = 1.0  # so soon the second is given: of two that begin at once, one then sees the other
LENGTH = 256  # bytes of a sign
PATIENCE = 3 * BEAT  # without one for so long, the holder counts as dead
_dead: set[tuple[object, object]] = set()  # machines and processes that were waited for: they may have held more


def _read(path: Path) -> tuple[str, dict[str, object]]:
    """Return the file's text, '' where there is no file, and what it says."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
        found = json.loads(text)
    except FileNotFoundError:
        return "", {}
    except (OSError, ValueError):  # being written, or torn by a crash
        return "?", {}
    return text, found if isinstance(found, dict) else {}


def busy(folder: Path, what: str) -> UserError:
    """Return the error that says who holds a folder, as its sign of life has it."""
    sign = _read(folder / NAME)[1]
    who = f"process {sign['pid']} on {sign.get('host')}" if "pid" in sign else "another process"
    return UserError(f"{folder}: in use: {who} runs `{what}`; wait for it or stop it", "E-RUN-BUSY")


@contextmanager
def exclusive(folder: Path, what: str, say: Say, wait: float | None = None) -> Iterator[None]:
    """Hold a folder for this process alone, on this machine and others.

    wait: seconds for which another process may hold it. Raises UserError (E-RUN-BUSY) with its number and host where it
    does longer."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=LOCK_TIMEOUT_S if wait is None else wait)
    except Timeout:
        raise busy(folder, what) from None
    try:
        with held(folder, what, say):
            yield
    finally:
        lock.release()


@contextmanager
def held(folder: Path, what: str, say: Say) -> Iterator[None]:
    """Show that this process works in `folder`, in which it holds the operating system's lock already.

    Raises UserError where a process on another machine works there. Waits PATIENCE where one did that shows no sign of
    life.
    """
    path = folder / NAME
    text, other = _read(path)
    dead = (other.get("machine"), other.get("pid")) in _dead
    if text and other.get("machine") != machine() and not dead:
        _watch(path, text, other, what, say)
    stop = threading.Event()
    mine = {"host": socket.gethostname(), "pid": os.getpid(), "machine": machine()}

    handle = _begin(path, {**mine, "beat": 0})

    def is_ours() -> bool:
        text, found = _read(path)
        if not text and handle is not None and folder.exists():
            return False  # whoever succeeded this process has ended since
        return not found or all(found.get(name) == value for name, value in mine.items())

    def live() -> None:
        nonlocal handle
        beat, pause = 1, FIRST_BEAT
        while not stop.wait(pause):
            if not is_ours():  # this process stood still, or both began at once: the other one has the folder
                who = _read(path)[1].get("host", "another process, which has ended since,")
                say(f"error: {folder}: taken over by {who} while this process stood still")
                os._exit(1)  # at once: whatever it wrote now would be written between the other's files
            sign = {**mine, "beat": beat}
            if handle is None:  # the disk was full
                handle = _begin(path, sign)
            else:
                _sign(handle, sign)
            beat, pause = beat + 1, BEAT

    thread = threading.Thread(target=live, name="sign of life", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        if is_ours():
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
        if handle is not None:
            os.close(handle)


def _begin(path: Path, sign: dict[str, object]) -> int | None:
    """Write the first sign and return a handle for the next ones; None where the disk is full.

    A full disk is reported by those who write something that matters. A new file takes the place of the one before. A
    process that was succeeded while it stood still between looking and signing writes to the earlier file, which nobody
    reads any more. Only a full disk leaves no choice but the old file.
    """
    fresh = path.with_name(f".{NAME}-{socket.gethostname()}-{os.getpid()}")
    for place, more in ((fresh, os.O_CREAT), (path, 0)):
        with contextlib.suppress(OSError):
            handle = os.open(place, os.O_WRONLY | more, 0o666)
            if _sign(handle, sign):
                if place == fresh:
                    fresh.replace(path)
                return handle
            os.close(handle)
        with contextlib.suppress(OSError):
            fresh.unlink(missing_ok=True)
    return None


def _sign(handle: int, sign: dict[str, object]) -> bool:
    """Write a sign and return whether it was written.

    It is written in place and always has the same length, so that a disk that has become full takes it as well.
    """
    with contextlib.suppress(OSError):
        return os.pwrite(handle, json.dumps(sign).ljust(LENGTH).encode(), 0) >= LENGTH
    return False


def _watch(path: Path, text: str, other: dict[str, object], what: str, say: Say) -> None:
    say(f"{path.parent}: was in use on {other.get('host', 'another machine')}; watching {PATIENCE:.0f} s for a sign of "
        "life")  # fmt: skip
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        time.sleep(min(1.0, BEAT / 4))
        now = _read(path)[0]
        if not now:
            return  # it has ended in order meanwhile
        if now not in (text, "?"):
            raise busy(path.parent, what)
    _dead.add((other.get("machine"), other.get("pid")))
    say(f"{path.parent}: no sign of life; going on with it")
