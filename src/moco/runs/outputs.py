"""What a stage makes: kept in its run's folder, and copied from there to its place in the project.

So a run keeps its own result, whatever another run puts in the same place later, and a result that is complete can be
put back without making it again.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from moco.errors import Say
from moco.files import sha256, working_folder, write_atomically, write_text
from moco.runs.heartbeat_lock import exclusive
from moco.runs.identity import Identity

OUTPUTS = "outputs"  # in a run's folder: what it made, laid out as in the project
RECORD = "outputs.json"  # beside it: what that was made from, and the digests of its files
LOCKS = Path("runs/locks")


@contextmanager
def locked_outputs(name: str, say: Say, command: str = "") -> Iterator[None]:
    """Hold the outputs of `moco NAME` (or `command`) in this project's folder while a stage works.

    That is from before the stage reads its inputs until its outputs are complete. Raises UserError, with process and
    host, where another process makes them.
    """
    with exclusive(LOCKS / name, f"moco {command or name}", say):
        yield


def keep_record(folder: Path, identity: Identity) -> None:
    """Write down what the outputs in a run's folder were made from, and their digests."""
    own = folder / OUTPUTS
    files = {path.relative_to(own).as_posix(): sha256(path) for path in own.rglob("*") if path.is_file()}
    write_text(folder / RECORD, json.dumps({"format": 1, "identity": asdict(identity), "files": files}, indent=1))


def is_result_of(folder: Path, identity: Identity, say: Say) -> bool:
    """Return whether the folder's outputs were made from just this, and are whole. Damaged ones are told."""
    record = _read(folder)
    if record is None or Identity.from_dict(record["identity"]) != identity:
        return False
    own = folder / OUTPUTS
    damaged = [name for name, digest in record["files"].items()
               if not (own / name).is_file() or sha256(own / name) != digest]  # fmt: skip
    if damaged:
        say(f"warning: {own / damaged[0]}: damaged or removed, so that this run's result cannot be taken again")
    return not damaged


def _read(folder: Path) -> dict[str, Any] | None:
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    whole = isinstance(record, dict) and isinstance(record.get("files"), dict) and "identity" in record
    return record if whole else None


def publish(folder: Path) -> None:
    """Copy a run's outputs to their places: what is in models/ as a whole, reports file by file.

    Raises UserError where one cannot be written."""
    own = folder / OUTPUTS
    for path in sorted((own / "models").glob("*")):
        target = Path("models") / path.name
        (copy_folder if path.is_dir() else copy_file)(path, target)
    for path in sorted((own / "reports").rglob("*")):
        if path.is_file():
            copy_file(path, path.relative_to(own))


def copy_file(source: Path, target: Path) -> None:
    """Copy a file, whole or not at all."""
    write_atomically(target, partial(shutil.copyfile, source))


def copy_folder(source: Path, target: Path) -> None:
    """Put a copy of a folder in the place of another."""
    place = target.resolve()  # behind a link to another disk, say
    place.parent.mkdir(parents=True, exist_ok=True)
    with working_folder(place.parent, f".{target.name}-") as work:
        new = work / target.name
        new.mkdir()
        for path in source.rglob("*"):
            inner = new / path.relative_to(source)
            if path.is_dir():
                inner.mkdir(parents=True, exist_ok=True)
            else:
                copy_file(path, inner)
        if place.exists():
            shutil.rmtree(place)
        new.replace(place)
