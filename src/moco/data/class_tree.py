"""Images in a folder per class."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from moco.data.dataset import Dataset, Split
from moco.errors import Say, UserError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".gif", ".bmp", ".webp", ".ppm", ".tif", ".tiff")


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
        below = [images_below(root / name / class_name, say) for class_name in classes]
        empty = [class_name for class_name, found in zip(classes, below, strict=True) if not found]
        if len(empty) == len(classes):
            raise UserError(f"{root / name}: the split is empty; put images into a folder per class")
        if empty and name == "train":
            raise UserError(f"{root / name / empty[0]}: a class without images; add some or remove the folder")
        paths = [(label, path) for label, found in enumerate(below) for path in found]
        labels = np.array([label for label, _ in paths], np.int64)
        splits[name] = Split(name, paths=[p for _, p in paths], labels=labels, folder=root / name)
    pool = splits["train"].paths
    if (root / "unlabeled").is_dir() and not (pool := images_below(root / "unlabeled", say)):
        raise UserError(f"{root / 'unlabeled'}: no images in it; without the folder, train's images are used")
    return Dataset(
        {"unlabeled": Split("unlabeled", paths=pool, folder=pool_folder(root)), **splits},
        classes,
        {"kind": "classes", "name": root.name},
    )


def shown(folder: Path) -> list[Path]:
    """What lies in the folder and is not hidden, in no order."""
    return [entry for entry in folder.iterdir() if not entry.name.startswith(".")]


def images_below(folder: Path, say: Say) -> list[str]:
    """Paths of the images of the folder, at any depth, in the order of their names. Other files and folders that are
    links are counted and told; hidden ones are not there. Raises UserError for a name that is not UTF-8."""
    found = [path for path in folder.rglob("*") if not any(p.startswith(".") for p in path.relative_to(folder).parts)]
    files = [path for path in found if path.is_file()]
    if linked := sorted(str(path) for path in found if path.is_symlink() and path.is_dir()):
        say(f"warning: {len(linked)} folder(s) in {folder} are links and are left out, first {linked[0]}")
    other = sorted(str(path) for path in files if path.suffix.lower() not in IMAGE_SUFFIXES)
    if other:
        say(
            f"warning: {len(other)} file(s) in {folder} are no images by their names and are left out, first {other[0]}"
        )
    images = sorted(str(path) for path in files if path.suffix.lower() in IMAGE_SUFFIXES)
    if foreign := [path for path in images if not _utf8(path)]:  # label files name images, and are UTF-8
        first = foreign[0].encode(errors="backslashreplace").decode()
        raise UserError(f"{folder}: {len(foreign)} name(s) that are not UTF-8, first {first}; rename them")
    return images


def _utf8(path: str) -> bool:
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True


def pool_folder(root: Path) -> Path:
    """Of a class tree: where the images of its pool lie."""
    return root / "unlabeled" if (root / "unlabeled").is_dir() else root / "train"
