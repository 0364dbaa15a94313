"""Images in a folder per class."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from moco.data.class_names import check_names, class_name, refuse_one_class
from moco.data.dataset import Dataset, Split
from moco.data.listing import images_below, is_folder, shown, subfolders
from moco.errors import Say, UserError, first_of
from moco.settings.reading import nearest

POOL_NAMES = ("unlabeled", "unlabelled")
KNOWN = ("train", "val", *POOL_NAMES)


def class_tree(root: Path, say: Say) -> Dataset:
    """Return the dataset of a folder per class: train/NAME/…, val/NAME/…, and unlabeled/… or unlabelled/… (any depth;
    without it, train's images).

    Files that are no images, by name or content, and files beside the classes are told. Hidden files and what systems
    leave in folders are not there. What cannot be read or followed stands in the splits like an image, so that decoding
    names it with its reason. Raises UserError for any other folder beside these, and for names of classes that cannot
    be told apart."""
    if not is_folder(root):
        raise UserError(f"{root}: dataset folder not found; set data.path in params.yaml")
    _check_layout(root)
    folders = {name: _class_folders(root / name, say) for name in ("train", "val")}
    classes = sorted(folders["train"])
    if unknown := [name for name in folders["val"] if name not in classes]:
        raise UserError(f"{root / 'val' / unknown[0]}: class has no folder in train/{nearest(unknown[0], classes)}")
    splits = {}
    for name in ("train", "val"):
        of_classes = {folder.name for folder in folders[name].values()}
        if loose := sorted(entry.name for entry in shown(root / name) if entry.name not in of_classes):
            say(f"warning: {len(loose)} file(s) in {root / name} are in no class and are left out: {first_of(loose)}")
        below = [images_below(folders[name][each], say) if each in folders[name] else [] for each in classes]
        empty = [class_name for class_name, found in zip(classes, below, strict=True) if not found]
        if len(empty) == len(classes):
            raise UserError(f"{root / name}: the split is empty; put images into a folder per class")
        if empty and name == "train":
            raise UserError(f"{root / name / empty[0]}: a class without images; add some or remove the folder")
        if name == "train":
            _check_depth(root / name, folders[name], below, say)
        paths = [(label, path) for label, found in enumerate(below) for path in found]
        labels = np.array([label for label, _ in paths], np.int64)
        splits[name] = Split(name, paths=[p for _, p in paths], labels=labels, folder=root / name)
    pool, folder = splits["train"].paths, pool_folder(root)
    own = folder.name in POOL_NAMES
    if own and not (pool := images_below(folder, say)):
        raise UserError(f"{folder}: no images in it; without the folder, train's images are used")
    return Dataset(
        {"unlabeled": Split("unlabeled", paths=pool, folder=folder), **splits},
        classes,
        {"kind": "classes", "name": root.name} | ({} if own else {"pool": "train"}),
    )


def _check_layout(root: Path) -> None:
    """Raise UserError where train or val is missing, and for a folder beside the known ones: a misspelt one would be
    images that nobody misses."""
    for name in ("train", "val"):
        if not is_folder(root / name):
            deeper = [e.name for e in subfolders(root) if os.path.isdir(e / "train") and os.path.isdir(e / "val")]  # noqa: PTH112
            hint = f"; set data.path to {root / deeper[0]}" if deeper else ""
            alike = nearest(name, [each.name for each in subfolders(root) if each.name not in KNOWN])
            raise UserError(
                f"{root / name}: not found{alike}; a class tree has train/CLASS/ and val/CLASS/{hint}", "E-DATA-LAYOUT"
            )
    others = [folder.name for folder in subfolders(root) if folder.name not in KNOWN]
    if others:
        raise UserError(
            f"{root}: {len(others)} folder(s) that a class tree does not have: "
            f"{first_of([f'{name}/{nearest(name, KNOWN)}' for name in others])}; it has train/, val/ and unlabeled/ "
            "(or unlabelled/); rename or move them",
            "E-DATA-FOLDER",
        )
    pools = [name for name in POOL_NAMES if is_folder(root / name)]  # both are looked at: a link may lead nowhere
    if len(pools) == 2:
        raise UserError(f"{root}: has both unlabeled/ and unlabelled/; move their images into one", "E-DATA-TWO-POOLS")


def _class_folders(folder: Path, say: Say) -> dict[str, Path]:
    """Return the folders of the classes by name. Raises UserError for names that cannot be told apart, and where the
    folders are those of a dataset."""
    found = subfolders(folder)
    check_names(sorted(entry.name for entry in found), folder, say)
    names = {entry.name for entry in found}
    if pools := sorted(names & set(POOL_NAMES)):
        raise UserError(
            f"{folder / pools[0]}: would be a class of this name; move it up, beside train/ and val/, or rename it",
            "E-DATA-NESTED",
        )
    if names and names <= {*KNOWN, "test"}:  # a class may be called train, but not all of them so
        raise UserError(
            f"{folder / min(names)}: {folder.name}/ holds a folder per class, and this is no class by its name; move "
            "what is in it up by one level, or correct data.path",
            "E-DATA-NESTED",
        )
    return {class_name(entry.name): entry for entry in found}


def _check_depth(split: Path, folders: dict[str, Path], below: list[list[str]], say: Say) -> None:
    """Tell where the folders look like one level too many, and raise UserError for a single class.

    below: paths of the images of each class, in the order of the classes' names."""
    refuse_one_class(split, list(folders))
    deep = [
        name for name, paths in zip(sorted(folders), below, strict=True)
        if len({Path(path).relative_to(folders[name]).parts[:1] for path in paths}) > 1
        and all(len(Path(path).relative_to(folders[name]).parts) > 1 for path in paths)
    ]  # fmt: skip
    if len(deep) == len(folders):
        say(f"warning: in every class of {split} all images lie in folders below it; is there one level too many?")


def pool_folder(root: Path) -> Path:
    """Return the folder where the images of a class tree's pool lie."""
    return next((root / name for name in POOL_NAMES if (root / name).is_dir()), root / "train")
