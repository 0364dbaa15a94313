"""Files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import getpass
import glob
import hashlib
import os
import shutil
import socket
import stat
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

from moco.errors import UserError

# Read once, before there are threads: it can only be read by setting it.
os.umask(_UMASK := os.umask(0))


def home() -> Path:
    """Return the folder of the project that runs and the MLflow store belong to.

    This is the current folder. But an experiment that DVC runs in a folder of its own (`dvc exp run --queue`,
    `--temp`), which goes when it ends, belongs to the folder that it came from.
    """
    root = Path(os.environ.get("DVC_ROOT", ""))
    return Path() if "DVC_EXP_NAME" not in os.environ or root.resolve() == Path().resolve() else root


def machine() -> str:
    """Return a name of the machine as it runs now: the same in all its containers, and another one after a reboot."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return socket.gethostname()


def account() -> str:
    """Return the user's name; the number where the user has no name, as in a container."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # the second since Python 3.13
        return str(os.getuid())


def pid_tag() -> str:
    """Return the part of a temporary name by which others can tell whether the process that made it still lives."""
    return f"{_tag()}-{os.getpid()}-"


@cache
def _tag() -> str:
    """Return a name for all processes that see each other's process numbers.

    These are the processes of a machine, or of a container with process numbers of its own.
    """
    try:
        numbers = str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        numbers = ""
    return hashlib.sha256((machine() + numbers).encode()).hexdigest()[:8]


def remove_stale(folder: Path, prefix: str) -> None:
    """Remove what killed processes left in a folder: files and folders named after `prefix` and their owner."""
    for path in folder.glob(f"{glob.escape(prefix)}{_tag()}-*"):
        if is_alive(path, prefix):
            continue
        with contextlib.suppress(OSError):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


@contextlib.contextmanager
def working_folder(parent: Path, prefix: str) -> Iterator[Path]:
    """Yield a folder in `parent` for as long as the context lasts. Folders that killed processes left go first."""
    remove_stale(parent, prefix)
    with tempfile.TemporaryDirectory(prefix=f"{prefix}{pid_tag()}", dir=parent) as folder:
        yield Path(folder)


def is_alive(path: Path, prefix: str) -> bool:
    """Return whether the process that a temporary name tells of still lives, as far as can be known from here."""
    number = path.name.removeprefix(f"{prefix}{_tag()}-").partition("-")[0]
    if not number.isdecimal():
        return True
    try:
        os.kill(int(number), 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        return True
    return True


def write_atomically(path: Path, write: Callable[[Path], object], *, replace: bool = True) -> None:
    """Call `write` with a temporary path beside `path` and rename the result to `path`.

    Without `replace`, a file that another process put there meanwhile stays. Raises UserError where the disk is full or
    not writable; what stood at `path` before is then still there.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_stale(path.parent, f".{path.name}.")
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.{pid_tag()}", dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        try:
            write(temporary)
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.chmod(0o666 & ~_UMASK)
            if replace:
                temporary.replace(path)
            else:
                with contextlib.suppress(FileExistsError):
                    os.link(temporary, path)
            _sync_folder(path.parent)
        finally:
            temporary.unlink(missing_ok=True)
    except FileNotFoundError:  # the folder was just made: somebody removes what is there
        raise UserError(f"{path}: cannot be written: a file or folder that it needs was removed meanwhile") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from None


def _sync_folder(folder: Path) -> None:
    """Force the new name onto the disk: else a machine that loses power may come up with the old one."""
    with contextlib.suppress(OSError):  # file systems that cannot sync folders
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def refuse_irregular(path: Path) -> None:
    """Raise UserError for a pipe, a device or a folder where a file should be.

    Without this a program would wait for some of them for ever.
    """
    if path.exists() and not path.is_file():
        raise UserError(f"{path}: not a regular file")


def own_folder(path: Path) -> None:
    """Create the folder where it is missing.

    Raises UserError where it belongs to another user, who could put anything into it.
    """
    try:
        path.mkdir(parents=True)
    except FileExistsError:
        found = path.lstat()
        with tempfile.TemporaryFile(dir=path.parent) as ours:  # file systems may map users to others
            user = os.fstat(ours.fileno()).st_uid
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != user:
            kind = "belongs to another user" if stat.S_ISDIR(found.st_mode) else "is no folder"
            raise UserError(f"{path}: {kind}; remove it, or set runtime.scratch") from None


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically, as UTF-8."""

    def write(temporary: Path) -> None:
        temporary.write_text(text, encoding="utf-8")

    write_atomically(path, write)


def scratch_place(setting: str) -> Path:
    """Return node-local scratch: the setting, or for `auto` the first of SLURM_TMPDIR, TMPDIR and /tmp."""
    place = setting
    if setting == "auto":
        place = os.environ.get("SLURM_TMPDIR") or tempfile.gettempdir()
    return Path(place).expanduser().absolute()


def scratch_folder(setting: str) -> Path:
    """Return node-local scratch, created where it is missing. Raises UserError where it cannot be written."""
    path = scratch_place(setting)
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise UserError(f"runtime.scratch: {path} cannot be written: {error.strerror}") from None
    return path


def sha256(path: Path) -> str:
    """Return the digest of a file's content, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
