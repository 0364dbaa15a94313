"""Checks a dataset once, describes it in a manifest, and opens its decoded images for every later stage."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from moco.data import cache, overlaps, source_files
from moco.data.cache import Built, DecodedSplit
from moco.data.class_names import refuse_one_class
from moco.data.class_tree import class_tree
from moco.data.dataset import Dataset
from moco.data.decode import DECODING
from moco.data.decode_outcome import count_adjusted
from moco.data.label_meaning import ClassNames
from moco.data.manifest import Manifest, SplitSummary, parse_manifest
from moco.data.overlaps import Overlaps
from moco.data.source_files import TORCHVISION_FOLDERS, Record, Source
from moco.data.sources import open_dataset
from moco.errors import Say, UserError, first_of, present
from moco.files import own_folder
from moco.settings.data import DataConfig
from moco.settings.kinds import flatten

# Where the images lie, how they are reached and how many may be missing: may differ between nodes. What was left out is
# in the manifest.
LOCATION = {
    "data.unreadable",
    "data.max_pixels",
    "data.path",
    "data.mounted",
    "data.copy_to_scratch",
    "data.download",
    "data.generated.pack",
}


def prepare(config: DataConfig, scratch: Path, say: Say, may_be_absent: bool = False) -> Manifest:
    """Return what the configured dataset holds, with its decoded cache on this node; read anew where the files are not
    those that were read last.

    may_be_absent: a source that is not there is what was read of it on this node, and told. Raises UserError for
    whatever makes the data unusable; the cache of another dataset is never touched.
    """
    source = source_files.present_source(config)
    record = source_files.read_record(config, source, scratch) if source or may_be_absent else None
    if record is not None and (manifest := _unchanged(source, record, scratch)):
        for warning in record.warnings:
            say(warning)
        if source is None:
            say(f"warning: {config.path}: not here; what was read of it before is used")
        else:
            say("the files of the dataset are as they were when they were read; their content is not read again")
        return manifest
    return _read(config, scratch, say)


def _unchanged(source: Source | None, record: Record, scratch: Path) -> Manifest | None:
    """Return the recorded manifest where it still holds, and its cache is sound; None otherwise. source: None where it
    is not there."""
    if record.reader != source_files.reader():
        return None
    if source is not None and (source_files.stamp(source) != (record.stamp, True) or not record.settled):
        return None
    try:
        manifest = parse_manifest(record.manifest)
    except ValueError:
        return None
    return manifest if cache.damage(cache.cache_folder(scratch, manifest.digest)) is None else None


def _read(config: DataConfig, scratch: Path, say: Say) -> Manifest:
    """Open and decode the dataset, check everything, leave the decoded cache and a record behind."""
    warnings: list[str] = []

    def tell(line: str) -> None:
        if line.startswith(("warning", "note")):  # told again as long as the files are the same
            warnings.append(line)
        say(line)

    with open_dataset(config, scratch, tell) as dataset:
        source = source_files.present_source(config)
        before = source_files.stamp(source) if source else None
        classes = _check_labels(dataset, config.classes)
        if config.source != "classes" and (numbers := ClassNames(classes)).are_misleading:
            tell(f"note: labels in the tensors are positions in classes.txt, whatever its names: {numbers.positions()}")
        _limit_labels(dataset, config.labelled, classes, tell)
        built = cache.build(
            dataset,
            config.resize,
            cache.caches(scratch),
            tell,
            config.unreadable,
            config.exclude_val,
            config.max_pixels,
        )
        found = _overlaps(dataset, built)
        manifest = _describe(dataset, classes, config, built, found)
        place = cache.install(built, manifest.digest, scratch)
        after = source_files.stamp(source) if source else None
    if before and after and before[0] != after[0]:
        raise UserError(
            f"{config.path or config.mounted}: its files changed while they were read; run `moco data` again when "
            "nothing writes there",
            "E-DATA-CHANGING",
        )
    say(f"decoded cache: {place}")
    for warning in overlaps.warnings(found, dataset, classes):
        tell(warning)
    if source and before:
        record = Record(before[0], before[1], source_files.reader(), manifest.to_json(), warnings)
        source_files.write_record(config, source, scratch, record)
    return manifest


def open_decoded(config: DataConfig, manifest: Manifest, scratch: Path, say: Say) -> dict[str, DecodedSplit]:
    """Return the decoded images that the manifest describes; built here where this node has no sound cache.

    Where the files of the source are not those that were read, their content is read again and decides; a source that
    is not there is not missed where the cache is. Raises UserError where the source no longer holds what the manifest
    says, or section `data` of the settings is no longer the one that it was made from.
    """
    if manifest.decoding != DECODING:
        raise UserError(
            "models/manifest.json: made by other rules of decoding (EXIF orientation, transparency, 16 bits); run "
            "`moco data` again",
            "E-DATA-DECODING",
        )
    different = [name for name, value in _settings(config).items() if manifest.settings.get(name) != value]
    if different:
        raise UserError(f"{', '.join(different)}: changed since the manifest was made; run `moco data` again")
    place = cache.cache_folder(scratch, manifest.digest)
    source = source_files.present_source(config)
    stamp = source_files.stamp(source)[0] if source else None
    # One builder a node: a second job waits here and then finds the cache complete.
    with _locked(place.with_suffix(".building")):
        problem = cache.damage(place) if place.exists() else "not on this node"
        if problem is not None:
            say(f"decoded cache {place}: {problem}; building it")
        elif source is not None and stamp is not None and not _holds(config, source, stamp, manifest, scratch):
            problem = "not known to be of these files"
            say(f"{config.path or config.mounted}: not known to be the files of the manifest; checking them")
        if problem is not None:
            found = prepare(config, scratch, say)
            if found.digest != manifest.digest:
                changed = [name for name, split in manifest.splits.items() if found.splits[name] != split]
                raise UserError(
                    f"{', '.join(changed) or 'classes or image size'}: the dataset is not the one in the manifest "
                    "any more; run `moco data` again",
                    "E-DATA-CHANGED",
                )
    return cache.open_cache(place)


def image_names(config: DataConfig, split: str, rows: Sequence[int]) -> list[str]:
    """Return how messages call these images of train or val, by their rows."""
    if config.source == "classes":
        with suppress(UserError, IndexError):  # only the cache is here
            tree = class_tree(Path(config.path), lambda _: None).splits[split]
            return [tree.image_name(row) for row in rows]
    return [f"{split}[{row}]" if config.source in TORCHVISION_FOLDERS else f"{split}/{row}.png" for row in rows]


def _holds(config: DataConfig, source: Source, stamp: str, manifest: Manifest, scratch: Path) -> bool:
    """Return whether files of this stamp were read on this node, and were what the manifest describes."""
    record = source_files.read_record(config, source, scratch)
    try:
        return (
            record is not None and record.stamp == stamp and (parse_manifest(record.manifest).digest == manifest.digest)
        )
    except ValueError:
        return False


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    lock = FileLock(path)
    try:
        own_folder(path.parent)
        lock.acquire()
    except OSError as error:
        raise UserError(f"{path.parent}: cannot be written: {error.strerror}; set runtime.scratch") from None
    try:
        yield
    finally:
        lock.release()


def _settings(config: DataConfig) -> dict[str, Any]:
    """Return the settings that decide what the dataset holds."""
    return {
        name: value
        for name, value in flatten(config, "data").items()
        if name not in LOCATION and (config.source == "generated" or not name.startswith("data.generated."))
    }


def _limit_labels(dataset: Dataset, labelled: int | None, classes: list[str], say: Say) -> None:
    """Keep a fixed random choice of labelled train images, with every class in its share; for trying how few labels
    suffice. Tell how many classes get none. Raises UserError where more are wanted than there are."""
    train = dataset.splits["train"]
    if labelled is None:
        return
    if labelled > len(train):
        raise UserError(f"data.labelled: {labelled} wanted, train has {len(train)} images")
    labels = present(train.labels, "labels of train")
    kept = _stratified(labels, labelled)
    train.keep(kept)
    if missing := len(set(range(len(classes))) - set(labels[kept].tolist())):
        say(f"warning: data.labelled: {labelled} labels leave {missing} of {len(classes)} classes without one")


def _stratified(labels: np.ndarray, count: int) -> np.ndarray:
    """Return rising rows of `count` images: of each class its share, rounded so that the sum is right, and one at
    least as long as there are enough for all. labels: N int64."""
    order = np.random.default_rng(0).permutation(len(labels))
    sizes = np.bincount(labels)
    rank = np.empty(len(labels), np.int64)  # of an image among those of its class
    for label in np.flatnonzero(sizes):
        mine = order[labels[order] == label]
        rank[mine] = np.arange(len(mine))
    # The first of every class, then those that stand lowest within their classes. Ties go by the random order.
    share = np.where(rank == 0, -1.0, (rank + 0.5) / sizes[labels])
    chosen = order[np.argsort(share[order], kind="stable")[:count]]
    return np.sort(chosen)


def _check_labels(dataset: Dataset, declared: int | None) -> list[str]:
    """Return the names of the classes. Raises UserError for labels out of range, naming split and row."""
    train, val = (present(dataset.splits[name].labels, f"labels of {name}") for name in ("train", "val"))
    for split in dataset.splits.values():
        if not len(split):
            raise UserError(f"{split.name}: the split is empty")
    count = declared or (len(dataset.classes) if dataset.classes else int(train.max()) + 1)
    if train.min() == train.max():
        refuse_one_class("train", dataset.classes[:1] if dataset.classes else [str(train[0])])
    for name, labels in (("train", train), ("val", val)):
        bad = np.flatnonzero((labels < 0) | (labels >= count))
        if len(bad):
            image = dataset.splits[name].image_name(int(bad[0]))
            raise UserError(
                f"{name}: {len(bad)} label(s) out of range, first {labels[bad[0]]} of {image}; "
                f"{count} classes are expected: 0 to {count - 1} (data.classes)"
            )
    if declared is None and not dataset.classes:
        empty = sorted(set(range(count)) - set(train.tolist()))
        if empty:
            raise UserError(
                f"train: {len(empty)} of {count} classes have no image ({first_of(empty)}): a label out of range? "
                "If it is meant so, set data.classes"
            )
    if dataset.classes and len(dataset.classes) != count:
        raise UserError(f"classes.txt names {len(dataset.classes)} classes, data.classes says {count}")
    return dataset.classes or [str(label) for label in range(count)]


def _overlaps(dataset: Dataset, built: Built) -> Overlaps:
    labels = present(dataset.splits["train"].labels, "labels of train")
    train, val = (overlaps.digests(built.reports[name]) for name in ("train", "val"))
    return overlaps.overlaps(train, val, labels)


def _describe(dataset: Dataset, classes: list[str], config: DataConfig, built: Built, found: Overlaps) -> Manifest:
    splits = {}
    for name, reports in built.reports.items():
        digests = b"".join(report.digests for report in reports)
        labels = dataset.splits[name].labels
        splits[name] = SplitSummary(
            len(dataset.splits[name]),
            hashlib.sha256(digests).hexdigest(),
            None if labels is None else hashlib.sha256(labels.astype("<i8").tobytes()).hexdigest(),
            None if labels is None else np.bincount(labels, minlength=len(classes)).tolist(),
        )
    pool = built.reports["unlabeled"]
    pixels = splits["unlabeled"].count * built.height * built.width
    sums = np.array([report.sums for report in pool], dtype=object).sum(0)  # exact: Python's integers
    squares = np.array([report.squares for report in pool], dtype=object).sum(0)
    mean = [int(s) / pixels for s in sums]
    std = [max(int(q) / pixels - m * m, 1.0) ** 0.5 for q, m in zip(squares, mean, strict=True)]
    return Manifest(
        source=dataset.origin,
        settings=_settings(config),
        height=built.height,
        width=built.width,
        resize=config.resize,
        classes=classes,
        mean=(mean[0] / 255, mean[1] / 255, mean[2] / 255),
        std=(std[0] / 255, std[1] / 255, std[2] / 255),
        splits=splits,
        duplicates_train_val=len(found.val_in_train),
        left_out=built.left_out,
        excluded=[list(pair) for pair in built.in_val] if config.exclude_val else [],
        classes_twice=len(found.classes_twice),
        repeated=found.repeated,
        val_in_pool=len(built.in_val),
        decoding=DECODING,
        adjusted=count_adjusted(built.reports),
    )
