"""Every kind of dataset, opened as the same thing: three splits of images, two of them with labels."""

from __future__ import annotations

import os
import re
import zipfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moco.config import DataConfig
from moco.data import squashfs
from moco.data.generated import generate
from moco.data.squashfs_reader import DamagedImageError, SquashfsPath
from moco.errors import Say, UserError
from moco.files import refuse_irregular, sha256
from moco.memory import full_memory

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".tif", ".tiff")
Folder = Path | SquashfsPath


@dataclass
class Split:
    """Images of one split: files (`paths`) or an array (N x H x W x 3, uint8), and int64 labels or None.

    image, inodes: with them the files lie in this squashfs image, at these inode references."""

    name: str
    paths: list[str] | None = None
    array: np.ndarray | None = None
    labels: np.ndarray | None = None
    image: Path | None = None
    inodes: list[int] | None = None

    def keep(self, numbers: np.ndarray) -> None:
        """These images alone, in this order, with their labels."""
        self.paths = None if self.paths is None else [self.paths[number] for number in numbers]
        self.inodes = None if self.inodes is None else [self.inodes[number] for number in numbers]
        self.array = None if self.array is None else self.array[numbers]
        self.labels = None if self.labels is None else self.labels[numbers]

    @property
    def files(self) -> Sequence[str | int]:
        """What `decode.read_image` takes."""
        return self.inodes if self.inodes is not None else self.paths or []

    def __len__(self) -> int:
        items = self.paths if self.array is None else self.array
        assert items is not None
        return len(items)

    def image_name(self, index: int) -> str:
        """How a message calls the image: its path within the split's folder, or its number."""
        return f"{self.name}/{Path(self.paths[index]).name}" if self.paths else f"{self.name}[{index}]"


@dataclass
class Dataset:
    """`classes`: the names where the source has them. `origin`: what the manifest says of the source."""

    splits: dict[str, Split]
    classes: list[str] | None
    origin: dict[str, Any]


@contextmanager
def open_dataset(config: DataConfig, scratch: Path, say: Say) -> Iterator[Dataset]:
    """Opens the configured source read-only, and undoes mounts and copies at the end.

    Raises UserError where the source is missing or its layout is wrong; pixels are checked on decoding.
    """
    path = Path(config.path)
    with ExitStack() as stack:
        if config.source == "generated":
            folder = generate(config.generated, path, say)
            if folder.suffix == ".sqsh":
                yield _from_squashfs(stack, folder, config, scratch, say)
            else:
                yield contract_folder(folder, {"kind": "generated"}, folder.parent)
        elif config.source == "squashfs":
            mounted = Path(config.mounted) if config.mounted else None
            if mounted and (mounted / "unlabeled").is_dir():
                say(f"dataset: using the folder {mounted}, which is already visible")
                origin = {"kind": "squashfs", "name": mounted.name}
                dataset = contract_folder(mounted, origin, mounted.parent)
                _tell_links(dataset, mounted, say)
            else:
                dataset = _from_squashfs(stack, path, config, scratch, say)
            dataset.classes = dataset.classes or _class_names(path.parent)
            yield dataset
        elif config.source == "folder":
            dataset = contract_folder(path, {"kind": "folder", "name": path.name}, path.parent)
            _tell_links(dataset, path, say)
            yield dataset
        elif config.source == "classes":
            dataset = class_tree(path, say)
            _tell_links(dataset, path, say)
            yield dataset
        else:
            from moco.data.torchvision_sets import load_torchvision_set

            yield load_torchvision_set(config.source, path, config.download)


def _from_squashfs(stack: ExitStack, image: Path, config: DataConfig, scratch: Path, say: Say) -> Dataset:
    squashfs.check_image(image)
    try:
        origin = {"kind": "squashfs", "name": image.name, "sha256": sha256(image)}
    except OSError as error:
        raise UserError(f"{image}: dataset image cannot be read: {error.strerror}") from None
    if config.copy_to_scratch:
        image = stack.enter_context(squashfs.local_copy(image, scratch, say))
    root = stack.enter_context(squashfs.opened(image, scratch, say))
    try:
        inner = root / "dataset"
        dataset = contract_folder(inner if inner.is_dir() else root, origin, root)
    except DamagedImageError as error:
        raise UserError(f"{image}: the dataset image cannot be used: {error}") from None
    if isinstance(root, Path):
        _tell_links(dataset, root, say)
    return dataset


def contract_folder(root: Folder, origin: dict[str, Any], parent: Folder | None = None) -> Dataset:
    """The original's layout: unlabeled/, train/, val/ with 0.png, 1.png, … and two label tensors.

    parent: where classes.txt may lie as well."""
    if not root.is_dir():
        raise UserError(f"{root}: dataset folder not found; set data.path (and data.source) in params.yaml")
    splits = {}
    for name in ("unlabeled", "train", "val"):
        split = _of_files(name, numbered_images(root / name))
        if name != "unlabeled":
            split.labels = read_labels(root / f"{name}_label_tensor.pt", len(split), name)
        splits[name] = split
    return Dataset(splits, _class_names(root) or (_class_names(parent) if parent else None), origin)


def _of_files(name: str, files: list[Folder]) -> Split:
    split = Split(name, paths=[str(file) for file in files])
    packed = [file for file in files if isinstance(file, SquashfsPath)]
    if packed:
        split.image, split.inodes = packed[0].image.path, [file.inode or 0 for file in packed]
    return split


def _tell_links(dataset: Dataset, root: Path, say: Say) -> None:
    """A dataset of links is as good as any, but nobody should train on what he does not know to be there."""
    inside = root.resolve()
    for split in dataset.splits.values():
        files = list(map(Path, split.paths or []))
        folders = sorted({path.parent for path in files})
        asked = [*folders, root / f"{split.name}_label_tensor.pt", *(path for path in files if path.is_symlink())]
        out = [path for path in asked if not Path(os.path.realpath(path)).is_relative_to(inside)]
        if out:
            told = f"{len(out)} file(s) or folder(s) of {split.name} lead out of the dataset by links"
            say(f"warning: {told}, first {out[0].name}")


def numbered_images(folder: Folder) -> list[Folder]:
    """The files 0.png … N-1.png. Raises UserError for a gap, a stray file or an empty folder."""
    if not folder.is_dir():
        raise UserError(f"{folder}: not found; a dataset has the folders unlabeled, train and val")
    try:
        found = {entry.name for entry in folder.iterdir()}
    except OSError as error:  # a damaged image or a lost network share
        raise UserError(f"{folder}: cannot be listed: {error.strerror or error}") from None
    stray = sorted(name for name in found if not re.fullmatch(r"(0|[1-9][0-9]*)\.png", name))
    if stray:
        raise UserError(f"{folder}: {len(stray)} file(s) not named NUMBER.png, first {stray[0]!r}; remove them")
    if not found:
        raise UserError(f"{folder}: the split is empty; it needs at least 0.png")
    names = [f"{i}.png" for i in range(len(found))]
    missing = [name for name in names if name not in found]
    if missing:
        raise UserError(
            f"{folder}: gap in the numbering: {missing[0]} is missing "
            f"({len(found)} images, so 0.png to {len(found) - 1}.png are expected)"
        )
    return [folder / name for name in names]


def read_labels(path: Folder, count: int, split: str) -> np.ndarray:
    """int64 labels from a tensor file, loaded without unpickling anything but tensors."""
    if isinstance(path, Path):
        refuse_irregular(path)
    try:
        with path.open("rb") as file:
            if zipfile.is_zipfile(file) and (damaged := zipfile.ZipFile(file).testzip()):
                raise ValueError(f"{damaged} in it is damaged")  # torch does not look at checksums
            file.seek(0)
            tensor = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: not found; it holds the labels of {split}/") from None
    except Exception as error:  # torch raises many kinds for damaged or unsafe files
        if full := full_memory(error):
            raise full.reading(path, "loaded") from None
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise UserError(f"{path}: cannot be loaded as a plain tensor: {reason}") from None
    plain = isinstance(tensor, torch.Tensor) and tensor.layout is torch.strided
    if not plain or tensor.dtype != torch.int64 or tensor.dim() != 1:
        kind = f"{tensor.dtype} of shape {tuple(tensor.shape)}" if plain else type(tensor).__name__
        raise UserError(f"{path}: expected an int64 tensor with one dimension, found {kind}")
    if len(tensor) != count:
        raise UserError(f"{path}: {len(tensor)} labels for {count} images in {split}/")
    labels: np.ndarray = tensor.numpy()
    return labels


def _class_names(folder: Folder) -> list[str] | None:
    """Names from the folder's classes.txt, one a line, in the order of the labels."""
    path = folder / "classes.txt"
    if not path.is_file():
        return None
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as UTF-8 text: {error}") from None
    names = [line.strip() for line in lines if line.strip()]
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise UserError(f"{path}: the class '{twice[0]}' stands there twice; give every class a name of its own")
    return names


def class_tree(root: Path, say: Say) -> Dataset:
    """A folder per class: train/NAME/…, val/NAME/…, and unlabeled/… (any depth; without it, train's images).

    Files that are no images by their names, files beside the classes and folders that are links within a class are
    counted and told. Hidden ones are not there."""
    if not root.is_dir():
        raise UserError(f"{root}: dataset folder not found; set data.path in params.yaml")
    for name in ("train", "val"):
        if not (root / name).is_dir():
            raise UserError(f"{root / name}: not found; a class tree has train/CLASS/ and val/CLASS/")
    classes, others = (sorted(e.name for e in shown(root / name) if e.is_dir()) for name in ("train", "val"))
    unknown = [name for name in others if name not in classes]
    if unknown:
        raise UserError(f"{root / 'val' / unknown[0]}: class has no folder in train/")
    splits = {}
    for name in ("train", "val"):
        if loose := sorted(entry.name for entry in shown(root / name) if not entry.is_dir()):
            say(f"warning: {len(loose)} file(s) in {root / name} are in no class and are left out, first {loose[0]}")
        below = [_images_below(root / name / class_name, say) for class_name in classes]
        empty = [class_name for class_name, found in zip(classes, below, strict=True) if not found]
        if len(empty) == len(classes):
            raise UserError(f"{root / name}: the split is empty; put images into a folder per class")
        if empty and name == "train":
            raise UserError(f"{root / name / empty[0]}: a class without images; add some or remove the folder")
        paths = [(label, path) for label, found in enumerate(below) for path in found]
        labels = np.array([label for label, _ in paths], np.int64)
        splits[name] = Split(name, paths=[p for _, p in paths], labels=labels)
    pool = splits["train"].paths
    if (root / "unlabeled").is_dir() and not (pool := _images_below(root / "unlabeled", say)):
        raise UserError(f"{root / 'unlabeled'}: no images in it; without the folder, train's images are used")
    return Dataset(
        {"unlabeled": Split("unlabeled", paths=pool), **splits},
        classes,
        {"kind": "classes", "name": root.name},
    )


def shown(folder: Path) -> list[Path]:
    """What lies in the folder and is not hidden, in no order."""
    return [entry for entry in folder.iterdir() if not entry.name.startswith(".")]


def _images_below(folder: Path, say: Say) -> list[str]:
    found = [path for path in folder.rglob("*") if not any(p.startswith(".") for p in path.relative_to(folder).parts)]
    files = [path for path in found if path.is_file()]
    if linked := sorted(str(path) for path in found if path.is_symlink() and path.is_dir()):
        say(f"warning: {len(linked)} folder(s) in {folder} are links and are left out, first {linked[0]}")
    other = sorted(str(path) for path in files if path.suffix.lower() not in IMAGE_SUFFIXES)
    if other:
        say(
            f"warning: {len(other)} file(s) in {folder} are no images by their names and are left out, first {other[0]}"
        )
    return sorted(str(path) for path in files if path.suffix.lower() in IMAGE_SUFFIXES)
