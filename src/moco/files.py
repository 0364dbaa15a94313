"""Files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from moco.errors import UserError

# Read once, before there are threads: it can only be read by setting it.
os.umask(_UMASK := os.umask(0))


def home() -> Path:
    """Folder of the project that runs and the MLflow store belong to: this one, but in an experiment that DVC runs in
    a folder of its own (`dvc exp run --queue`, `--temp`), which goes when it ends, the one that it came from."""
    root = Path(os.environ.get("DVC_ROOT", ""))
    return Path() if "DVC_EXP_NAME" not in os.environ or root.resolve() == Path().resolve() else root


def write_atomically(path: Path, write: Callable[[Path], object], *, replace: bool = True) -> None:
    """Calls `write` with a temporary path beside `path` and renames the result over it. Without `replace`, a file that
    another process put there meanwhile stays.

    Raises UserError where the disk is full or not writable; what stood at `path` before is then still there.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
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
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from None


def write_text(path: Path, text: str) -> None:
    """Atomically."""

    def write(temporary: Path) -> None:
        temporary.write_text(text, encoding="utf-8")

    write_atomically(path, write)


def scratch_place(setting: str) -> Path:
    """Node-local scratch: the setting, or for `auto` the first of SLURM_TMPDIR, TMPDIR and /tmp."""
    place = setting
    if setting == "auto":
        place = os.environ.get("SLURM_TMPDIR") or tempfile.gettempdir()
    return Path(place).expanduser().absolute()


def sha256(path: Path) -> str:
    """Digest of a file's content, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
