"""Whether the files of a data source are still those that were read: by names, sizes, times and inodes.

Content alone decides what a dataset is, but to read all of it takes minutes. So what was read is recorded beside the
decoded caches, with a stamp of the files: as long as the stamp is the same, the record stands for the content.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import PIL

from moco.data.cache import caches
from moco.data.manifest import SPLITS
from moco.files import write_text
from moco.settings.data import DataConfig
from moco.settings.kinds import flatten

TORCHVISION_FOLDERS = {"cifar10": "cifar-10-batches-py", "stl10": "stl10_binary"}
SETTLED_S = 2.0  # a file that changed this shortly before may change again within the same tick of its file system


@dataclass(frozen=True)
class Source:
    """A way to reach the images: what must be there, and the files and folders below it that are read.

    stable: whether inodes and change times stay from mount to mount, as those of an image in an overlay do not."""

    root: Path
    parts: tuple[Path, ...]
    stable: bool = True


@dataclass(frozen=True)
class Record:
    """What was read. stamp: of the files, before they were read; settled: none of them had just changed; reader: of the
    code that read them; manifest: its text; warnings: what was told meanwhile."""

    stamp: str
    settled: bool
    reader: str
    manifest: str
    warnings: list[str]


def present_source(config: DataConfig) -> Source | None:
    """Return the source that would be read, None where it is not there."""
    return next((source for source in _sources(config) if source.root.exists()), None)


def stamp(source: Source) -> tuple[str, bool]:
    """Return a digest of names, sizes, times and inodes of all files, and whether all of them have settled."""
    lines, newest = [], 0.0
    for name, found in (each for part in source.parts for each in _files(part)):
        if isinstance(found, OSError):
            lines.append(f"{name}\0{found.errno}")
            continue
        line = f"{name}\0{found.st_size}\0{found.st_mtime_ns}"
        lines.append(f"{line}\0{found.st_ctime_ns}\0{found.st_ino}" if source.stable else line)
        newest = max(newest, found.st_mtime, found.st_ctime if source.stable else 0.0)
    text = "\n".join(sorted(lines)).encode("utf-8", "surrogateescape")
    return hashlib.sha256(text).hexdigest(), newest < time.time() - SETTLED_S


def read_record(config: DataConfig, source: Source | None, scratch: Path) -> Record | None:
    """Return what was recorded of the source on this node; of an absent one (None) by whichever way it was reached."""
    for each in [source] if source else _sources(config):
        try:
            return Record(**json.loads(_place(config, each, scratch).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            continue
    return None


def write_record(config: DataConfig, source: Source, scratch: Path, record: Record) -> None:
    """Keep what was read for the next time."""
    write_text(_place(config, source, scratch), json.dumps(asdict(record)) + "\n")


@cache
def reader() -> str:
    """Return a digest of the code that reads images and of the library that decodes them."""
    digest = hashlib.sha256(PIL.__version__.encode())
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _sources(config: DataConfig) -> list[Source]:
    """Return the sources of the settings; the first is the one that is used where both are there."""
    path = Path(config.path)
    if config.source == "generated":
        from moco.data.generated import generated_place  # which imports torch; the doctor does without

        place = generated_place(config.generated, path)
        return [Source(place, (place,)) if place.suffix == ".sqsh" else _contract(place)]
    if config.source == "squashfs":
        names = path.parent / "classes.txt"
        found = [Source(path, (path, names))] if config.path else []
        if config.mounted:
            folder = _contract(Path(config.mounted), stable=False)
            found.insert(0, Source(folder.root / "unlabeled", (*folder.parts, names), stable=False))
        return found
    if config.source == "classes":
        return [Source(path, (path,))]
    if config.source == "folder":
        return [_contract(path)]
    files = path / TORCHVISION_FOLDERS[config.source]
    return [Source(files, (files,))]


def _contract(root: Path, stable: bool = True) -> Source:
    names = [*SPLITS, "train_label_tensor.pt", "val_label_tensor.pt", "classes.txt"]
    return Source(root, (*(root / name for name in names), root.parent / "classes.txt"), stable)


def _place(config: DataConfig, source: Source, scratch: Path) -> Path:
    """Return the place of the record, another for other settings: they decide what is read from the same files."""
    key = json.dumps([flatten(config, "data"), str(source.root.absolute())], sort_keys=True, default=str)
    return caches(scratch) / f"source-{hashlib.sha256(key.encode()).hexdigest()[:24]}.json"


def _files(part: Path) -> Iterator[tuple[str, os.stat_result | OSError]]:
    """Yield name and state of a file, or of all files below a folder; hidden ones do not count. Links are followed."""
    todo: list[tuple[str, str, tuple[int, ...]]] = [(str(part), part.name, ())]
    while todo:
        path, name, above = todo.pop()
        try:
            found = os.stat(path)  # noqa: PTH116 - half as fast by pathlib
            if not stat.S_ISDIR(found.st_mode):
                yield name, found
                continue
            if found.st_ino in above:  # a link that leads back
                continue
            with os.scandir(path) as entries:
                shown = [entry for entry in entries if not entry.name.startswith(".")]
        except OSError as error:
            yield name, error
            continue
        for entry in shown:
            try:
                if entry.is_dir():
                    todo.append((entry.path, f"{name}/{entry.name}", (*above, found.st_ino)))
                else:
                    yield f"{name}/{entry.name}", entry.stat()
            except OSError as error:
                yield f"{name}/{entry.name}", error
