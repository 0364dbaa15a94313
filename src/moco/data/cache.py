"""The decoded cache: every image as raw bytes in a memory map, so that decoding is paid once.

Layout, in SCRATCH/moco-cache-UID/DIGEST/: SPLIT.u8 (N x H x W x 3 bytes), SPLIT.digests (N x 16 bytes, blake2b of
each image's pixels), SPLIT_label.npy, cache.json (shapes and checksums). A cache is built in a
folder of another name and renamed when complete; it is keyed by what it holds and never changed afterwards.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import random
import shutil
import time
import uuid
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout

from moco.data import overlaps
from moco.data.dataset import Dataset, Split
from moco.data.decode import (
    DIGEST_BYTES,
    LARGEST,
    Chunk,
    ChunkReport,
    copy_array,
    decode_chunk,
    read_image,
)
from moco.data.decode_outcome import refuse_problems, tell_adjusted, to_leave_out
from moco.data.manifest import SPLITS
from moco.data.squashfs_reader import SquashfsImage
from moco.errors import Say, UserError, first_of, present
from moco.files import own_folder
from moco.out_of_memory import full_memory

CHUNK = 1024  # images
SAY_EVERY = 15.0  # seconds between two lines on how many images are decoded
SWEEPING = ".sweep.lock"
BUILDING = ".building-"  # begins the name of a folder that is not complete
CHECK_ALL_BELOW = 1 << 29  # bytes; larger files are checked by samples, so that a start stays under 2 s
SAMPLED_CHUNKS = 8


@dataclass
class DecodedSplit:
    """images: N x H x W x 3 uint8 (a read-only memory map). labels: N int64, or None. digests: N x 16 uint8."""

    images: np.ndarray
    labels: np.ndarray | None
    digests: np.ndarray

    @property
    def known_labels(self) -> np.ndarray:
        """Return the labels of a split that has some."""
        return present(self.labels, "labels of this split")


@dataclass
class Built:
    """A complete cache in a folder that is not yet at its place, and what was learned while decoding. lock: held
    as long as the folder is in use, so that others can tell it from the remains of a process that was killed.
    left_out: numbers of the unlabeled images that could not be used; in_val: of those that also stand in val, each with
    its row there."""

    folder: Path
    lock: FileLock
    height: int
    width: int
    reports: dict[str, list[ChunkReport]]
    left_out: list[int] = field(default_factory=list)
    in_val: list[tuple[int, int]] = field(default_factory=list)


def image_size(dataset: Dataset, resize: int | None, largest: int = LARGEST) -> tuple[int, int]:
    """Return (height, width) after resizing: that of the first unlabelled image that can be read."""
    if resize is not None:
        return resize, resize
    split = dataset.splits["unlabeled"]
    if split.array is not None:
        return split.array.shape[1], split.array.shape[2]
    problems = []
    with SquashfsImage(split.image) if split.image else contextlib.nullcontext() as packed:
        for number, file in enumerate(split.files[:100]):
            try:
                image = read_image(file, None, None, packed, largest)
                return image.shape[0], image.shape[1]
            except ValueError as error:
                problems.append(f"{split.image_name(number)} ({error})")
    reasons = first_of(problems)
    raise UserError(
        f"unlabeled: none of the first 100 files is a readable image; check data.path: {reasons}", "E-DATA-UNREADABLE"
    )


def build(
    dataset: Dataset,
    resize: int | None,
    parent: Path,
    say: Say,
    unreadable: int = 0,
    exclude_val: bool = False,
    largest: int = LARGEST,
) -> Built:
    """Decode all images on all cores into a new folder below `parent`.

    unreadable: at most this many images of `unlabeled` that cannot be used are left out, and reported. exclude_val:
    images of `unlabeled` that also stand in val are left out. largest: pixels of an image. Raises UserError, naming the
    first images concerned, where others cannot be used; nothing is left behind.
    """
    height, width = image_size(dataset, resize, largest)
    total = sum(map(len, dataset.splits.values())) * height * width * 3
    folder = parent / f"{BUILDING}{uuid.uuid4().hex}"
    lock = FileLock(f"{folder}.lock")
    try:
        own_folder(parent)
        if (free := shutil.disk_usage(parent).free) < total:
            raise UserError(
                f"{parent}: the decoded cache needs {total >> 20} MiB, {free >> 20} MiB are free; set runtime.scratch"
            )
        with FileLock(parent / SWEEPING):  # without it a lock file that is just made looks like an abandoned one
            _sweep(parent)
            lock.acquire()
        folder.mkdir()
    except OSError as error:
        raise UserError(f"{parent}: cannot be written: {error.strerror}; set runtime.scratch") from None
    try:
        built = Built(folder, lock, height, width, {})
        with _decoders(dataset) as decode:
            for name, split in dataset.splits.items():
                reports = _decode_split(split, (height, width), resize, folder, decode, largest, say)
                if name == "unlabeled" and (bad := to_leave_out(split, reports, unreadable, say)):
                    built.left_out = bad
                    split.keep(np.setdiff1d(np.arange(len(split)), bad))
                    reports = _decode_split(split, (height, width), resize, folder, decode, largest, say)
                built.reports[name] = reports
                say(f"decoded {len(split)} images of {name}")
            refuse_problems(dataset, built.reports, say)
            pool = dataset.splits["unlabeled"]
            kept, built.in_val = overlaps.pool_without_val(built.reports, len(pool), built.left_out)
            if exclude_val and built.in_val:
                overlaps.refuse_nothing(kept)
                pool.keep(kept)
                built.reports["unlabeled"] = _decode_split(pool, (height, width), resize, folder, decode, largest, say)
        tell_adjusted(built.reports, say)
        _write_index(built, dataset)
        return built
    except BaseException as error:
        _discard(folder, lock)
        if not isinstance(error, (OSError, BrokenProcessPool)) or full_memory(error):  # the second: a worker was killed
            raise
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{folder}: building the decoded cache failed: {reason}") from None


def _discard(folder: Path, lock: FileLock) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    Path(lock.lock_file).unlink(missing_ok=True)
    lock.release()


def _sweep(parent: Path) -> None:
    """Remove what processes left behind that were killed while building: folders whose lock nobody holds."""
    for path in parent.glob(f"{BUILDING}*"):
        folder = path.with_suffix("")
        lock = FileLock(f"{folder}.lock")
        with contextlib.suppress(Timeout):  # in use
            lock.acquire(timeout=0)
            _discard(folder, lock)


def _telling(reports: Iterable[ChunkReport], split: Split, say: Say) -> Iterator[ChunkReport]:
    """Yield the reports of a split's chunks as they come, and say now and then how many images are decoded."""
    told = time.monotonic()
    for report in reports:
        yield report
        if time.monotonic() - told >= SAY_EVERY:
            told = time.monotonic()
            say(f"decoded {min(report.first + CHUNK, len(split)):,} of {len(split):,} images of {split.name}")


Decode = Callable[[list[Chunk]], Iterable[ChunkReport]]


@contextmanager
def _decoders(dataset: Dataset) -> Iterator[Decode]:
    """Yield the function that decodes chunks, the same for all splits.

    It uses as many processes as there are cores; for a few images it uses this process alone.
    """
    most = max((-(-len(split) // CHUNK) for split in dataset.splits.values() if split.array is None), default=0)
    if most <= 1:
        yield lambda chunks: map(decode_chunk, chunks)
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 4
    # Spawned, not forked: the parent has threads. The workers import numpy and PIL alone.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(cores, most), mp_context=context)
    try:
        yield lambda chunks: pool.map(decode_chunk, chunks)
    finally:  # after an error or a signal nobody waits for the chunks that have not begun
        pool.shutdown(cancel_futures=True)


def _decode_split(
    split: Split, size: tuple[int, int], resize: int | None, folder: Path, decode: Decode, largest: int, say: Say
) -> list[ChunkReport]:
    output = folder / f"{split.name}.u8"
    with output.open("wb") as file:
        file.truncate(len(split) * size[0] * size[1] * 3)
    if split.array is not None:
        reports = list(_telling(copy_array(split.array, resize, output, CHUNK), split, say))
    else:
        files = split.files
        chunks = [
            Chunk(n, first, tuple(files[first : first + CHUNK]), size, resize, str(output), split.image, largest)
            for n, first in enumerate(range(0, len(files), CHUNK))
        ]
        reports = list(_telling(decode(chunks), split, say))
    (folder / f"{split.name}.digests").write_bytes(b"".join(report.digests for report in reports))
    if split.labels is not None:
        np.save(folder / f"{split.name}_label.npy", split.labels)
    return reports


def _write_index(built: Built, dataset: Dataset) -> None:
    index = {
        name: {
            "shape": [len(dataset.splits[name]), built.height, built.width, 3],
            "crc": [r.crc for r in reports],
        }
        for name, reports in built.reports.items()
    }
    small = sorted([*built.folder.glob("*.digests"), *built.folder.glob("*.npy")])
    files = {path.name: zlib.crc32(path.read_bytes()) for path in small}
    (built.folder / "cache.json").write_text(json.dumps({"format": 2, "chunk": CHUNK, "splits": index, "files": files}))


def caches(scratch: Path) -> Path:
    """Return the user's own folder of caches: scratch is often /tmp, which all users share."""
    return scratch / (f"moco-cache-{os.getuid()}" if hasattr(os, "getuid") else "moco-cache")


def cache_folder(scratch: Path, digest: str) -> Path:
    """Return the folder of the decoded cache with this digest."""
    return caches(scratch) / digest[:24]


def install(built: Built, digest: str, scratch: Path) -> Path:
    """Move a built cache to its place and return that place.

    Where another job was faster and its cache is sound, that cache stays.
    """
    place = cache_folder(scratch, digest)
    with FileLock(f"{place}.lock"):
        if not place.exists() or damage(place) is not None:
            shutil.rmtree(place, ignore_errors=True)
            built.folder.rename(place)
    _discard(built.folder, built.lock)
    return place


def damage(place: Path) -> str | None:
    """Return None where the cache is complete and its checksums hold, else what is wrong with it."""
    try:
        index = json.loads((place / "cache.json").read_text())
        for file_name, crc in index["files"].items():
            if zlib.crc32((place / file_name).read_bytes()) != crc:
                return f"{file_name} has a wrong checksum"
            if file_name.endswith(".npy"):
                np.load(place / file_name, allow_pickle=False)  # raises for what is not plain numbers
        for name in SPLITS:
            entry = index["splits"][name]
            count, *shape = entry["shape"]
            row = int(np.prod(shape))
            path = place / f"{name}.u8"
            if path.stat().st_size != count * row:
                return f"{path.name} has {path.stat().st_size} bytes, not {count * row}"
            chunks = list(range(len(entry["crc"])))
            if count * row > CHECK_ALL_BELOW:
                chunks = sorted(random.sample(chunks, min(SAMPLED_CHUNKS, len(chunks))))
            with path.open("rb") as file:
                for chunk in chunks:
                    file.seek(chunk * index["chunk"] * row)
                    if zlib.crc32(file.read(index["chunk"] * row)) != entry["crc"][chunk]:
                        return f"{path.name} has a wrong checksum in chunk {chunk}"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def open_cache(place: Path) -> dict[str, DecodedSplit]:
    """Return memory maps of a sound cache, by split. They cost no memory until images are read."""
    index = json.loads((place / "cache.json").read_text())
    splits = {}
    for name in SPLITS:
        shape = tuple(index["splits"][name]["shape"])
        labels = place / f"{name}_label.npy"
        splits[name] = DecodedSplit(
            np.memmap(place / f"{name}.u8", np.uint8, "r", shape=shape),
            np.load(labels) if labels.exists() else None,
            np.fromfile(place / f"{name}.digests", np.uint8).reshape(-1, DIGEST_BYTES),
        )
    return splits
