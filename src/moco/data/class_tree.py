"""Images in a folder per class."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from moco.data.class_names import check_names, class_name, first_ten, refuse_one_class
from moco.data.dataset import Dataset, Split
from moco.errors import Say, UserError
from moco.params import nearest

POOL_NAMES = ("unlabeled", "unlabelled")
KNOWN = ("train", "val", *POOL_NAMES)
PASSED_OVER = ("lost+found", "__MACOSX", "@eaDir")  # folders that systems make by themselves
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".gif", ".bmp", ".webp", ".ppm", ".tif", ".tiff")


def class_tree(root: Path, say: Say) -> Dataset:
    """Return the dataset of a folder per class: train/NAME/…, val/NAME/…, and unlabeled/… or unlabelled/… (any depth;
    without it, train's images).

    Files that are no images by their names, files beside the classes and folders that are links within a class are
    counted and told. Hidden ones are not there. Raises UserError for any other folder beside these, and for names of
    classes that cannot be told apart."""
    if not root.is_dir():
        raise UserError(f"{root}: dataset folder not found; set data.path in params.yaml")
    _check_layout(root)
    folders = {name: _class_folders(root / name, say) for name in ("train", "val")}
    classes = sorted(folders["train"])
    if unknown := [name for name in folders["val"] if name not in classes]:
        raise UserError(f"{root / 'val' / unknown[0]}: class has no folder in train/{nearest(unknown[0], classes)}")
    splits = {}
    for name in ("train", "val"):
        if loose := sorted(entry.name for entry in shown(root / name) if not entry.is_dir()):
            say(f"warning: {len(loose)} file(s) in {root / name} are in no class and are left out, first {loose[0]}")
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
        if not (root / name).is_dir():
            deeper = [entry.name for entry in shown(root) if (entry / "train").is_dir() and (entry / "val").is_dir()]
            hint = f"; set data.path to {root / deeper[0]}" if deeper else ""
            raise UserError(
                f"{root / name}: not found; a class tree has train/CLASS/ and val/CLASS/{hint}", "E-DATA-LAYOUT"
            )
    others = sorted(e.name for e in shown(root) if e.is_dir() and e.name not in (*KNOWN, *PASSED_OVER))
    if others:
        raise UserError(
            f"{root}: {len(others)} folder(s) that a class tree does not have: "
            f"{first_ten([f'{name}/{nearest(name, KNOWN)}' for name in others])}; it has train/, val/ and unlabeled/ "
            "(or unlabelled/); rename or move them",
            "E-DATA-FOLDER",
        )
    if all((root / name).is_dir() for name in POOL_NAMES):
        raise UserError(f"{root}: has both unlabeled/ and unlabelled/; move their images into one", "E-DATA-TWO-POOLS")


def _class_folders(folder: Path, say: Say) -> dict[str, Path]:
    """Return the folders of the classes by name. Raises UserError for names that cannot be told apart, and where the
    folders are those of a dataset."""
    found = [entry for entry in shown(folder) if entry.is_dir() and entry.name not in PASSED_OVER]
    check_names(sorted(entry.name for entry in found), folder, say)
    names = {entry.name for entry in found}
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
        if len({Path(path).relative_to(folders[name]).parts[0] for path in paths}) > 1
        and all(len(Path(path).relative_to(folders[name]).parts) > 1 for path in paths)
    ]  # fmt: skip
    if len(deep) == len(folders):
        say(f"warning: in every class of {split} all images lie in folders below it; is there one level too many?")


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
    """Return the folder where the images of a class tree's pool lie."""
    return next((root / name for name in POOL_NAMES if (root / name).is_dir()), root / "train")
