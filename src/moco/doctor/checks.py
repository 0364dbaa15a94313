"""What one check of `moco doctor` found, and the ways in which several checks ask the machine."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from moco.errors import UserError, one_line
from moco.redaction import redact

Status = Literal["ok", "note", "warn", "FAIL"]
MOUNTS = Path("/proc/mounts")
NETWORK = {
    "9p", "afs", "beegfs", "ceph", "cifs", "glusterfs", "gpfs", "lustre", "nfs", "nfs4", "orangefs", "panfs", "pvfs2",
    "smb3", "smbfs", "sshfs", "wekafs",
}  # fmt: skip
NO_ANSWER = 124  # exit code of a command that was given up, as timeout(1) has it
SHOWN = 300  # characters of a foreign message


@dataclass(frozen=True)
class Finding:
    """remedy: what to do, for `warn` and `FAIL`. A `FAIL` makes the exit code 1."""

    status: Status
    name: str
    found: str
    remedy: str = ""

    def line(self) -> str:
        """Return the finding as one line of text, without passwords and keys."""
        text = f"{self.found}; {self.remedy}" if self.remedy else self.found
        return f"{self.status:<5} {self.name:<16} {one_line(' '.join(redact(text).split()))}"


def ok(name: str, found: str) -> Finding:
    """Return a finding of status `ok`."""
    return Finding("ok", name, found)


def note(name: str, found: str) -> Finding:
    """Return a finding of status `note`."""
    return Finding("note", name, found)


def warn(name: str, found: str, remedy: str) -> Finding:
    """Return a finding of status `warn`, with its remedy."""
    return Finding("warn", name, found, remedy)


def fail(name: str, found: str, remedy: str) -> Finding:
    """Return a finding of status `FAIL`, with its remedy."""
    return Finding("FAIL", name, found, remedy)


def refused(name: str, error: UserError, remedy: str) -> Finding:
    """Return a FAIL with the error's own words.

    `remedy` is used where the error does not end in a remedy of its own.
    """
    found, separator, own = str(error).rpartition("; ")
    return fail(name, found, own) if separator else fail(name, str(error), remedy)


def reason(error: BaseException | str) -> str:
    """Return the first line of a foreign message, cut to a length that fits a screen.

    Where the message is empty, it is the kind of the error.
    """
    lines = [line for line in str(error).splitlines() if line.strip()]
    return (lines[0].strip() if lines else type(error).__name__)[:SHOWN]


def attempt(name: str, check: Callable[[], Finding]) -> Finding:
    """Return what the check found. A check that raises, for whatever reason, has failed; the other checks go on."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # one screen: libraries' remarks on their import are none of the findings
            return check()
    except UserError as error:
        return refused(name, error, "put right what it names")
    except Exception as error:
        said = f"{type(error).__name__}: {reason(error)}"
        return fail(name, f"the check could not be made ({said})", "put right what it names, or report this line")


def numbers(version: str) -> tuple[int, ...]:
    """Return the numbers of a version: (450, 80, 2) for '450.80.02', since versions compare as numbers, not as text."""
    return tuple(int(part) for part in version.split("."))


def command(*arguments: str, timeout: float = 20) -> subprocess.CompletedProcess[str] | None:
    """Run a tool with English messages. Returns None where it is not installed."""
    try:
        return subprocess.run(
            arguments, capture_output=True, text=True, errors="replace", check=False, timeout=timeout,
            stdin=subprocess.DEVNULL, env=os.environ | {"LC_ALL": "C"},
        )  # fmt: skip
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return None
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(arguments, NO_ANSWER, "", f"no answer within {timeout:g} s")


def file_system(path: Path, mounts: Path = MOUNTS) -> str:
    """Return the kind of the file system that holds a path: ext4, nfs4, tmpfs, … or `unknown`."""
    try:
        lines = mounts.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:  # not Linux, or hidden
        return "unknown"
    place, kind, longest = path.resolve(), "unknown", -1
    for line in lines:
        fields = line.split(" ")
        if len(fields) < 3:
            continue
        # Blanks and the like stand as octal numbers.
        folder = Path(re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), fields[1]))
        depth = len(folder.parts)
        if depth >= longest and (folder == place or folder in place.parents):  # of two at one place the later counts
            kind, longest = fields[2], depth
    return kind


def over_network(kind: str) -> bool:
    """Return whether a file system of this kind lives on other machines."""
    return kind.removeprefix("fuse.") in NETWORK


def writing_problem(folder: Path) -> str | None:
    """Return None where a file can be made in the folder, else the reason."""
    probe = folder / f".moco-doctor-{os.getpid()}"
    try:
        probe.write_bytes(b"probe")
    except OSError as error:
        return error.strerror or reason(error)
    finally:
        with contextlib.suppress(OSError):  # where nothing could be made, nothing can be removed either
            probe.unlink(missing_ok=True)
    return None
