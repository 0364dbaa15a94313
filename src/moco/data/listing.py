"""Finds the image files of a folder. Nothing is passed over without a word but what systems leave there."""

from __future__ import annotations

import os
from pathlib import Path

from moco.data.image_kinds import HEAD, SUFFIXES, UNREAD_SUFFIXES, has_suffix, is_image, is_image_name, is_litter
from moco.errors import Say, UserError, first_of


def shown(folder: Path) -> list[Path]:
    """Return what lies in the folder, in no order, but for hidden files and what systems leave. Raises UserError where
    that cannot be listed."""
    try:
        return [entry for entry in folder.iterdir() if not is_litter(entry.name)]
    except OSError as error:
        raise UserError(f"{folder}: cannot be listed: {error.strerror or error}", "E-DATA-LIST") from None


def subfolders(folder: Path) -> list[Path]:
    """Return the folders in a folder, links to folders included, by name. Raises UserError where that cannot be known,
    and for links that lead nowhere: each may have been a class."""
    lost = sorted(entry.name for entry in shown(folder) if os.path.islink(entry) and not os.path.exists(entry))  # noqa: PTH110, PTH114
    if lost:
        raise UserError(
            f"{folder}: {len(lost)} link(s) lead nowhere: {first_of(lost)}; repair or remove them", "E-DATA-LINK"
        )
    try:
        with os.scandir(folder) as entries:
            return sorted(folder / entry.name for entry in entries if not is_litter(entry.name) and entry.is_dir())
    except OSError as error:
        raise UserError(f"{folder}: cannot be listed: {error.strerror or error}", "E-DATA-LIST") from None


def images_below(folder: Path, say: Say) -> list[str]:
    """Return paths of the images of the folder, at any depth, in the order of their names.

    Files that are no images, by name or else by content, are told. What is in the way of knowing stands in the list,
    for decoding to give the reason: folders that are links or cannot be listed, links that lead nowhere, files without
    a suffix that cannot be opened. Raises UserError for a name that is not UTF-8."""
    images: list[str] = []
    others: list[str] = []
    folders = [str(folder)]
    while folders:
        place = folders.pop()
        try:
            with os.scandir(place) as found:
                entries = [entry for entry in found if not is_litter(entry.name)]
        except OSError:
            images.append(place)
            continue
        readable = {_stem(entry.name) for entry in entries if entry.name.lower().endswith(SUFFIXES)}
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                folders.append(entry.path)
            elif entry.name.lower().endswith(UNREAD_SUFFIXES) and _stem(entry.name) in readable:
                others.append(entry.path)  # a camera's raw beside the image that it wrote of it
            else:
                (images if _counts_as_image(entry) else others).append(entry.path)
    if others:
        names = first_of(sorted(others))
        say(
            f"warning: {len(others)} file(s) in {folder} are no images by their names, or raws beside an image, and "
            f"left out: {names}"
        )
    if foreign := sorted(path for path in images if not _utf8(path)):  # label files name images, and are UTF-8
        names = first_of([path.encode(errors="backslashreplace").decode() for path in foreign])
        raise UserError(f"{folder}: {len(foreign)} name(s) that are not UTF-8: {names}; rename them")
    return sorted(images)


def _stem(name: str) -> str:
    return name.rpartition(".")[0]


def _counts_as_image(entry: os.DirEntry[str]) -> bool:
    """Return whether an entry that is no folder is an image, or something of which that cannot be known."""
    if is_image_name(entry.name):
        return True
    try:
        if entry.is_file():
            if has_suffix(entry.name):
                return False
            with open(entry.path, "rb") as file:  # noqa: PTH123
                return is_image(file.read(HEAD))
        return not os.path.exists(entry.path) or entry.is_dir() or not has_suffix(entry.name)  # noqa: PTH110
    except OSError:
        return True


def is_folder(path: Path) -> bool:
    """Return whether there is a folder at the path.

    Raises UserError where something else, or something unreachable, is there.
    """
    try:
        if path.is_dir():
            return True
        os.lstat(path)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise UserError(f"{path}: cannot be reached: {error.strerror or error}", "E-DATA-LIST") from None
    what = "a link that leads nowhere" if path.is_symlink() and not path.exists() else "not a folder"
    raise UserError(f"{path}: {what}; repair or remove it", "E-DATA-LINK")


def _utf8(path: str) -> bool:
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True
