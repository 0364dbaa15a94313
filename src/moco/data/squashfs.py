"""Opens a squashfs image without changing anything on the machine: read it as it is, else mount or unpack it, and
undo that."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moco.data.squashfs_reader import SquashfsImage, SquashfsPath, UnknownCompressionError
from moco.errors import Say, UserError
from moco.files import is_alive, pid_tag, refuse_irregular, remove_stale, working_folder

MAGIC = b"hsqs"
COPY, MOUNT = "moco-copy-", "moco-squashfs-"  # begin the names of copies and of folders to mount in


def check_image(path: Path) -> None:
    """Raise UserError unless the file looks like a squashfs image."""
    if not path.is_dir():
        refuse_irregular(path)
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except FileNotFoundError:
        raise UserError(f"{path}: dataset image not found; set data.path") from None
    except IsADirectoryError:
        remedy = "set data.path to the .sqsh file, or data.source to folder"
        raise UserError(f"{path}: a folder, not a dataset image; {remedy}") from None
    except OSError as error:
        raise UserError(f"{path}: dataset image cannot be read: {error.strerror}") from None
    if magic != MAGIC:
        raise UserError(f"{path}: not a squashfs image (it begins with {magic!r}, not {MAGIC!r})")


@contextmanager
def local_copy(path: Path, scratch: Path, say: Say) -> Iterator[Path]:
    """Yield a copy on node-local disk, which exists as long as the context, as the original's jobs made in /tmp."""
    scratch.mkdir(parents=True, exist_ok=True)
    free, needed = shutil.disk_usage(scratch).free, path.stat().st_size
    if free < needed:
        raise UserError(
            f"{scratch}: {free >> 20} MiB free, {path.name} needs {needed >> 20} MiB; "
            "set runtime.scratch, or data.copy_to_scratch to false"
        )
    with working_folder(scratch, COPY) as folder:
        say(f"copying {path} to {folder}")
        try:
            copy = shutil.copyfile(path, folder / path.name)
        except OSError as error:
            raise UserError(f"{folder}: {path} cannot be copied: {error.strerror}; set runtime.scratch") from None
        yield Path(copy)


def _run(command: list[str]) -> str | None:
    """Run a command and return None on success, else the reason."""
    if shutil.which(command[0]) is None:
        return f"{command[0]} is not installed"
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    output = [line for line in (done.stderr or done.stdout).strip().splitlines() if "dmesg" not in line]
    return None if done.returncode == 0 else (output[-1] if output else f"exit code {done.returncode}")


@contextmanager
def opened(image: Path, scratch: Path, say: Say) -> Iterator[Path | SquashfsPath]:
    """Yield the root of the image, read directly where its compression is known, else as a folder by `open_squashfs`.

    Raises UserError where it cannot be opened by any means.
    """
    check_image(image)
    try:
        packed = SquashfsImage(image)
    except UnknownCompressionError as error:
        say(f"dataset: {image} is {error}")
        with open_squashfs(image, scratch, say) as folder:
            yield folder
        return
    except OSError as error:
        raise UserError(f"{image}: the dataset image cannot be read: {error.strerror or error}") from None
    with packed:
        say(f"dataset: {image} is read as it is, without mounting it")
        yield SquashfsPath(packed)


@contextmanager
def open_squashfs(image: Path, scratch: Path, say: Say) -> Iterator[Path]:
    """Yield the root of the image as a folder.

    It is opened by squashfuse, else by the kernel's mount, else unpacked to `scratch`.
    """
    check_image(image)
    scratch.mkdir(parents=True, exist_ok=True)
    for remains in scratch.glob(f"{MOUNT}*"):  # of a process that was killed; one that is in use refuses
        if os.path.ismount(remains) and not is_alive(remains, MOUNT):
            _run(_fuse_unmount(remains))
    remove_stale(scratch, MOUNT)
    folder = Path(tempfile.mkdtemp(prefix=f"{MOUNT}{pid_tag()}", dir=scratch))
    undo: list[str] | None = None
    reasons = []
    try:
        for name, mount, unmount in (
            ("squashfuse", ["squashfuse", "-o", "ro", str(image), str(folder)], _fuse_unmount(folder)),
            ("kernel mount", ["mount", "-t", "squashfs", "-o", "ro,loop", str(image), str(folder)],
             ["umount", str(folder)]),
        ):  # fmt: skip
            reason = _run(mount)
            if reason is None:
                undo = unmount
                say(f"dataset: {image} opened with {name} at {folder}")
                break
            reasons.append(f"{name}: {reason}")
        else:
            reason = _run(["unsquashfs", "-no-progress", "-force", "-dest", str(folder), str(image)])
            if reason is not None:
                raise UserError(
                    f"{image}: cannot be opened ({'; '.join(reasons)}; unsquashfs: {reason}); "
                    "install squashfuse or squashfs-tools, or check the file"
                )
            say(f"dataset: {image} unpacked to {folder} ({'; '.join(reasons)})")
        yield folder
    finally:
        if undo is not None and (problem := _run(undo)) is not None:
            say(f"warning: {folder} could not be unmounted: {problem}")
        if undo is not None and not os.path.ismount(folder):
            folder.rmdir()
        elif undo is None:
            shutil.rmtree(folder, ignore_errors=True)


def _fuse_unmount(folder: Path) -> list[str]:
    for tool in ("fusermount3", "fusermount"):
        if shutil.which(tool):
            return [tool, "-u", str(folder)]
    return ["umount", str(folder)]
