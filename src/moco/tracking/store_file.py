"""A SQLite store as a file: whether MLflow here may open it, and whether its artifacts' addresses are still true.

MLflow migrates an older store as it opens it, for good; and it keeps absolute addresses of artifacts, so that a store
that was moved or copied would go on writing into its old folder. Both are looked at with SQLite alone.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import re
import sqlite3
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

from moco.errors import UserError

ARTIFACTS = "mlartifacts"  # folder beside the store
BUSY = 20.0  # seconds to wait for another process that writes into the store
# Where MLflow keeps addresses of artifacts.
ADDRESSES = (
    ("experiments", "artifact_location"), ("runs", "artifact_uri"), ("logged_models", "artifact_location"),
    ("model_versions", "source"), ("model_versions", "storage_location"),
)  # fmt: skip


@contextlib.contextmanager
def _opened(path: Path, mode: str) -> Iterator[sqlite3.Connection]:
    """Open a SQLite file, read-only ('ro') or to write ('rw'); it is never made by this."""
    connection = sqlite3.connect(f"file:{urllib.parse.quote(str(path))}?mode={mode}", uri=True, timeout=BUSY)
    try:
        yield connection
    finally:
        connection.close()


def _tables(connection: sqlite3.Connection) -> set[str]:
    return {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}


def refuse_other_schema(path: Path) -> None:
    """Raise UserError where the store is not of the schema of MLflow here, which opening it would change or break."""
    try:
        with _opened(path, "ro") as connection:
            tables = _tables(connection)
            if not tables:  # MLflow makes them
                return
            if "alembic_version" not in tables:
                raise UserError(
                    f"{path}: a database of another program than MLflow; set tracking.uri to another file",
                    "E-STORE-FOREIGN",
                )
            version = connection.execute("SELECT version_num FROM alembic_version").fetchone()
    except sqlite3.Error:  # not SQLite, or no rights: opening it tells, and changes nothing
        return
    refuse_version(version[0] if version else "", f"sqlite:///{path}", "copy the file")


def refuse_version(version: str, shown: str, backup: str) -> None:
    """Raise UserError where a store's version of the schema is not that of MLflow here. backup: what to do before."""
    known = _revisions()
    heads = known.keys() - set(known.values())
    if not known or version in heads:
        return
    if version in known or not version:
        raise UserError(
            f"{shown} has the schema of an older MLflow, which cannot open it once it is migrated; if that is well, "
            f"{backup}, then `mlflow db upgrade` with this address",
            "E-STORE-OLDER",
        )
    raise UserError(
        f"{shown} has the schema of a newer MLflow than the one here; `pip install --upgrade mlflow`", "E-STORE-NEWER"
    )


@functools.cache
def _revisions() -> dict[str, str]:
    """Return the schema's versions that MLflow here knows, each with the one before it ('' for the first)."""
    package = importlib.util.find_spec("mlflow")
    if package is None or package.origin is None:
        return {}
    known = {}
    for file in (Path(package.origin).parent / "store/db_migrations/versions").glob("*.py"):
        text = file.read_text(encoding="utf-8")
        own = re.search(r"^revision\b[^=]*=\s*['\"](\w+)['\"]", text, re.MULTILINE)
        before = re.search(r"^down_revision\b[^=]*=\s*['\"](\w+)['\"]", text, re.MULTILINE)
        if own:
            known[own[1]] = before[1] if before else ""
    return known


def moved_from(path: Path) -> list[Path]:
    """Return the folders of artifacts that a moved or copied store still names: those that stood beside it before.

    A folder that somebody chose elsewhere for the artifacts is none of these.
    """
    try:
        with _opened(path, "ro") as connection:
            if "experiments" not in _tables(connection):
                return []
            found = connection.execute("SELECT DISTINCT artifact_location FROM experiments").fetchall()
    except sqlite3.Error:
        return []
    folders = [_folder(location) for (location,) in found if location]
    return [folder for folder in folders if folder is not None and _is_former(folder, path)]


def _folder(location: str) -> Path | None:
    """Return the folder of an artifact location, where it is one named as ours are."""
    folder = Path(urllib.parse.unquote(location.removeprefix("file://")))
    return folder if folder.is_absolute() and folder.name == ARTIFACTS else None


def _is_former(folder: Path, path: Path) -> bool:
    with contextlib.suppress(OSError):
        if folder.parent.samefile(path.parent):
            return False
        return not folder.exists() or (folder.parent / path.name).exists()
    return True  # it is not there any more, or not for this user


def relocate(path: Path) -> list[Path]:
    """Set the addresses of a moved or copied store's artifacts to the folder beside it; return their old folders.

    Raises UserError where the store cannot be written.
    """
    former = moved_from(path) if path.is_file() else []
    if not former:
        return []
    new = (path.parent / ARTIFACTS).as_uri()
    try:
        with _opened(path, "rw") as connection, connection:
            tables = _tables(connection)
            for folder in former:
                for old in (folder.as_uri(), f"file://{folder}", str(folder)):
                    for table, column in ADDRESSES:
                        if table in tables:
                            _replace(connection, table, column, old, new)
    except sqlite3.Error as error:
        raise UserError(
            f"{path} was moved or copied from {former[0].parent}, and its addresses cannot be set: {error}",
            "E-STORE-MOVED",
        ) from None
    return former


def _replace(connection: sqlite3.Connection, table: str, column: str, old: str, new: str) -> None:
    connection.execute(
        f"UPDATE {table} SET {column} = ? || substr({column}, ?) WHERE {column} = ? OR substr({column}, 1, ?) = ?",
        (new, len(old) + 1, old, len(old) + 1, f"{old}/"),
    )


def experiment_is_deleted(path: Path, name: str) -> bool:
    """Return whether the store has the experiment among its deleted ones."""
    try:
        with _opened(path, "ro") as connection:
            found = connection.execute("SELECT lifecycle_stage FROM experiments WHERE name = ?", (name,)).fetchone()
    except sqlite3.Error:
        return False
    return bool(found) and found[0] != "active"
