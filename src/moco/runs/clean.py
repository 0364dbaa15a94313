"""`moco clean`: what can be deleted without losing a result or a record, listed first, deleted with --yes."""

from __future__ import annotations

import contextlib
import re
import shutil
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from moco.data.cache import BUILDING, cache_folder
from moco.data.manifest import load_manifest
from moco.errors import Say
from moco.files import home, scratch_place
from moco.layout import MANIFEST, RUNS

CHECKPOINTS = "checkpoint_*"  # with the digests beside them


@dataclass(frozen=True)
class Candidate:
    """Files, or one folder, that can be deleted.

    paths: what would go. size: bytes. reason: why nothing is lost. lock: whoever holds it uses the paths.
    """

    name: str
    paths: list[Path]
    size: int
    reason: str
    lock: Path | None = None


def run(scratch: str, yes: bool, say: Say) -> None:
    """List what can be deleted, with sizes and reasons; delete it where `yes`.

    What is in use stays, and is not listed.
    """
    found = [*_caches(scratch), *_checkpoints()]
    gone = 0
    for one in found:
        with _unused(one) as free:
            if not free:
                continue
            say(f"{one.size / 2**20:10.1f} MiB  {one.name}: {one.reason}")
            gone += one.size
            for path in one.paths if yes else ():
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink(missing_ok=True)
    done = "deleted" if yes else "could be deleted; `moco clean --yes` deletes it"
    say(f"{gone / 2**20:10.1f} MiB  {done}" if gone else "nothing to delete")


def _caches(scratch: str) -> Iterator[Candidate]:
    """Yield decoded caches of other images than the manifest's.

    Nothing is yielded without a manifest, as nothing then tells which cache is in use.
    """
    if not MANIFEST.is_file():
        return
    kept = cache_folder(scratch_place(scratch), load_manifest(MANIFEST).digest)
    for folder in sorted(kept.parent.glob("*")):
        if folder.is_dir() and not folder.name.startswith(BUILDING) and folder.name != kept.name:
            reason = "decoded images of another dataset or size, made anew when they are needed"
            yield Candidate(str(folder), [folder], _size([folder]), reason)


def _checkpoints() -> Iterator[Candidate]:
    """Yield checkpoints of finished runs beside a newer finished run of the same settings and data.

    Logs, pictures and classifiers of all runs stay.
    """
    by_key: dict[tuple[str, str], list[Path]] = defaultdict(list)
    for done in (home() / RUNS).glob("*/*/done"):
        by_key[done.parent.parent.name, re.sub(r"-\d+$", "", done.parent.name)].append(done.parent)
    for runs in by_key.values():
        *older, newest = sorted(runs, key=lambda folder: (folder / "done").stat().st_mtime)
        for folder in older:
            if paths := sorted(folder.glob(CHECKPOINTS)):
                reason = f"checkpoints of a finished run; {newest.name} is a newer one of the same settings and data"
                yield Candidate(str(folder), paths, _size(paths), reason, folder / "lock")


@contextlib.contextmanager
def _unused(one: Candidate) -> Iterator[bool]:
    """Yield whether no living process uses it, as far as can be known here; its lock is held meanwhile."""
    if one.lock is None:
        yield not any(_is_mapped(path) for path in one.paths)
        return
    lock = FileLock(one.lock)
    try:
        lock.acquire(timeout=0)
    except (Timeout, OSError):
        yield False
        return
    try:
        yield not (one.lock.parent / "holder").exists()
    finally:
        lock.release()


def _is_mapped(folder: Path) -> bool:
    """Return whether a process of this machine has a file of the folder mapped into its memory."""
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):
            if f"{folder.resolve()}/" in maps.read_text(encoding="utf-8", errors="replace"):
                return True
    return False


def _size(paths: list[Path]) -> int:
    """Return the bytes of files and of what lies in folders."""
    files = [file for path in paths for file in (path.rglob("*") if path.is_dir() else [path])]
    return sum(file.stat().st_size for file in files if file.is_file())
