"""Every kind of dataset, opened as the same thing: three splits of images, two of them with labels."""

from __future__ import annotations

import os
import re
import zipfile
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moco.data import squashfs
from moco.data.class_names import check_names, class_name
from moco.data.class_tree import class_tree
from moco.data.dataset import Dataset, Split
from moco.data.generated import generate
from moco.data.image_kinds import is_litter
from moco.data.manifest import SPLITS
from moco.data.source_files import TORCHVISION_FOLDERS
from moco.data.squashfs_reader import DamagedImageError, SquashfsPath
from moco.errors import Say, UserError, first_of
from moco.files import refuse_irregular, sha256
from moco.out_of_memory import full_memory
from moco.settings.data import DataConfig
from moco.settings.reading import nearest

Folder = Path | SquashfsPath


@contextmanager
def open_dataset(config: DataConfig, scratch: Path, say: Say) -> Iterator[Dataset]:
    """Open the configured source read-only, and undo mounts and copies at the end.

    Raises UserError where the source is missing or its layout is wrong; pixels are checked on decoding.
    """
    path = Path(config.path)
    with ExitStack() as stack:
        if config.source == "generated":
            folder = generate(config.generated, path, say)
            if folder.suffix == ".sqsh":
                yield _from_squashfs(stack, folder, config, scratch, say)
            else:
                yield contract_folder(folder, {"kind": "generated"}, say, folder.parent)
        elif config.source == "squashfs":
            mounted = Path(config.mounted) if config.mounted else None
            if mounted and (mounted / "unlabeled").is_dir():
                say(f"dataset: using the folder {mounted}, which is already visible")
                origin = {"kind": "squashfs", "name": mounted.name}
                dataset = contract_folder(mounted, origin, say, mounted.parent)
                _tell_links(dataset, mounted, say)
            else:
                dataset = _from_squashfs(stack, path, config, scratch, say)
            dataset.classes = dataset.classes or _class_names(path.parent)
            yield dataset
        elif config.source == "folder":
            dataset = contract_folder(path, {"kind": "folder", "name": path.name}, say, path.parent)
            _tell_links(dataset, path, say)
            yield dataset
        elif config.source == "classes":
            dataset = class_tree(path, say)
            _tell_links(dataset, path, say)
            yield dataset
        elif config.source in TORCHVISION_FOLDERS:
            from moco.data.torchvision_sets import load_torchvision_set

            yield load_torchvision_set(config.source, path, config.download)
        else:
            raise ValueError(f"{config.source}: not a source")


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
        dataset = contract_folder(inner if inner.is_dir() else root, origin, say, root)
    except DamagedImageError as error:
        raise UserError(f"{image}: the dataset image cannot be used: {error}") from None
    if isinstance(root, Path):
        _tell_links(dataset, root, say)
    return dataset


def contract_folder(root: Folder, origin: dict[str, Any], say: Say, parent: Folder | None = None) -> Dataset:
    """Return the dataset of a folder in the original's layout.

    The layout is unlabeled/, train/, val/ with 0.png, 1.png, … and two label tensors. parent: where classes.txt may lie
    as well. Other folders are reported. Raises UserError for any other layout.
    """
    if not root.is_dir():
        raise UserError(f"{root}: dataset folder not found; set data.path (and data.source) in params.yaml")
    others = _other_folders(root)
    if missing := [name for name in SPLITS if others and not (root / name).is_dir()]:
        raise UserError(
            f"{root / missing[0]}: not found{nearest(missing[0], others)}; a dataset has the folders unlabeled, train "
            "and val",
            "E-DATA-LAYOUT",
        )
    if others:
        say(f"warning: {len(others)} folder(s) of {root} are not read, as they are no split: {first_of(others)}")
    splits = {}
    for name in ("unlabeled", "train", "val"):
        split = _of_files(name, numbered_images(root / name))
        if name != "unlabeled":
            split.labels = read_labels(root / f"{name}_label_tensor.pt", len(split), name)
        splits[name] = split
    return Dataset(splits, _class_names(root) or (_class_names(parent) if parent else None), origin)


def _other_folders(root: Folder) -> list[str]:
    """Return names of the folders beside the splits."""
    with suppress(OSError):  # reading the splits says why
        return sorted(e.name for e in root.iterdir() if e.name not in SPLITS and not is_litter(e.name) and e.is_dir())
    return []


def _of_files(name: str, files: list[Folder]) -> Split:
    split = Split(name, paths=[str(file) for file in files])
    packed = [file for file in files if isinstance(file, SquashfsPath)]
    if packed:
        split.image, split.inodes = packed[0].image.path, [file.inode or 0 for file in packed]
    return split


def _tell_links(dataset: Dataset, root: Path, say: Say) -> None:
    """Warn of links that lead out of the dataset.

    A dataset of links is as good as any, but nobody should train on images without knowing that they are there.
    """
    inside = root.resolve()
    for split in dataset.splits.values():
        files = list(map(Path, split.paths or []))
        folders = sorted({path.parent for path in files})
        asked = [*folders, root / f"{split.name}_label_tensor.pt", *(path for path in files if os.path.islink(path))]  # noqa: PTH114 - never raises
        out = [path for path in asked if not Path(os.path.realpath(path)).is_relative_to(inside)]
        if out:
            told = f"{len(out)} file(s) or folder(s) of {split.name} lead out of the dataset by links"
            say(f"warning: {told}: {first_of([path.name for path in out])}")


def numbered_images(folder: Folder) -> list[Folder]:
    """Return the files 0.png … N-1.png; what systems leave in folders is passed over. Raises UserError for a gap, a
    stray file or an empty folder."""
    try:
        if not folder.is_dir():
            raise UserError(f"{folder}: not found; a dataset has the folders unlabeled, train and val", "E-DATA-LAYOUT")
        found = {entry.name for entry in folder.iterdir() if not is_litter(entry.name)}
    except OSError as error:  # no right to do so, a damaged image or a lost network share
        raise UserError(f"{folder}: cannot be listed: {error.strerror or error}", "E-DATA-LIST") from None
    stray = sorted(name for name in found if not re.fullmatch(r"(0|[1-9][0-9]*)\.png", name))
    if stray:
        named = first_of([repr(name) for name in stray])
        raise UserError(f"{folder}: {len(stray)} file(s) not named NUMBER.png: {named}; remove them")
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
    """Return int64 labels from a tensor file, loaded without unpickling anything but tensors."""
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
    """Return names from the folder's classes.txt, one a line, in the order of the labels."""
    path = folder / "classes.txt"
    if not path.is_file():
        return None
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as UTF-8 text: {error}") from None
    names = [class_name(line.strip()) for line in lines if line.strip()]
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise UserError(f"{path}: the class '{twice[0]}' stands there twice; give every class a name of its own")
    check_names(names, path, lambda _: None)
    return names
