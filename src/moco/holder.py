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

from moco.errors import Say, UserError
from moco.files import machine

NAME = "holder"
BEAT = 10.0  # seconds between two signs of life
FIRST_BEAT = 1.0  # so soon the second is given: of two that begin at once, one then sees the other
LENGTH = 256  # bytes of a sign
PATIENCE = 3 * BEAT  # without one for so long, the holder counts as dead


def _read(path: Path) -> tuple[str, dict[str, object]]:
    """The file's text, '' where it is not there, and what it says."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
        found = json.loads(text)
    except FileNotFoundError:
        return "", {}
    except (OSError, ValueError):  # being written, or torn by a crash
        return "?", {}
    return text, found if isinstance(found, dict) else {}


@contextmanager
def held(folder: Path, what: str, say: Say) -> Iterator[None]:
    """Shows that this process works in `folder`, in which it holds the operating system's lock already.

    Raises UserError where a process on another machine does; waits PATIENCE where one did that shows no sign of life.
    """
    path = folder / NAME
    text, other = _read(path)
    if text and other.get("machine") != machine():
        _watch(path, text, other, what, say)
    stop = threading.Event()
    mine = {"host": socket.gethostname(), "pid": os.getpid(), "machine": machine()}

    def is_ours() -> bool:
        _, found = _read(path)
        return not found or all(found.get(name) == value for name, value in mine.items())

    def live() -> None:
        beat, pause = 1, FIRST_BEAT
        while not stop.wait(pause):
            if not is_ours():  # this process stood still, or both began at once: the other one has the folder
                say(f"error: {folder}: taken over by {_read(path)[1].get('host')} while this process stood still")
                os._exit(1)  # at once: whatever it wrote now would be written between the other's files
            _sign(handle, {**mine, "beat": beat})
            beat, pause = beat + 1, BEAT

    handle = _begin(path, {**mine, "beat": 0})
    thread = threading.Thread(target=live, name="sign of life", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        if handle is not None:
            os.close(handle)
        if is_ours():
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)


def _begin(path: Path, sign: dict[str, object]) -> int | None:
    """A new file in the place of the one before, open for the signs to come: one who was succeeded while it stood still
    between looking and signing writes to the file of before, which nobody reads any more. None on a full disk."""
    fresh = path.with_name(f".{NAME}-{socket.gethostname()}-{os.getpid()}")
    try:
        handle = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    except OSError:  # a full disk is told by those who write something that matters
        return None
    _sign(handle, sign)
    with contextlib.suppress(OSError):
        fresh.replace(path)
    return handle


def _sign(handle: int | None, sign: dict[str, object]) -> None:
    """In place and always of one length: a disk that has become full takes it as well."""
    if handle is not None:
        with contextlib.suppress(OSError):
            os.pwrite(handle, json.dumps(sign).ljust(LENGTH).encode(), 0)


def _watch(path: Path, text: str, other: dict[str, object], what: str, say: Say) -> None:
    say(f"{path.parent}: was in use on {other.get('host', 'another machine')}; watching {PATIENCE:.0f} s for a sign of "
        "life")  # fmt: skip
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        time.sleep(min(1.0, BEAT / 4))
        now, found = _read(path)
        if not now:
            return  # it has ended in order meanwhile
        if now not in (text, "?"):
            raise UserError(
                f"{path.parent}: process {found.get('pid')} on {found.get('host')} runs `{what}` with these settings "
                "and data; wait for it or stop it"
            )
    say(f"{path.parent}: no sign of life; going on with it")
