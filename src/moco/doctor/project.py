"""Checks of the project in the current folder: settings, images, scratch."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from moco.data.manifest import load_manifest
from moco.data.source_files import TORCHVISION_FOLDERS
from moco.data.squashfs import check_image
from moco.doctor.checks import (
    MOUNTS,
    Finding,
    fail,
    file_system,
    note,
    ok,
    over_network,
    reason,
    refused,
    warn,
    writing_problem,
)
from moco.errors import UserError
from moco.files import scratch_place
from moco.layout import MANIFEST
from moco.settings import reading as params
from moco.settings.data import DataConfig
from moco.settings.runtime import RuntimeConfig
from moco.settings.schema import Config

# Exit code 0 where a lock that another process holds could be taken as well.
TAKE_LOCK = """
import sys
sys.path[:1] == [''] and sys.path.pop(0)
from filelock import FileLock, Timeout
try:
    FileLock(sys.argv[1], timeout=0.1).acquire()
except Timeout:
    sys.exit(3)
"""


def parameters(path: Path, keep: Callable[[Config], None]) -> Finding:
    """Tell whether the parameter file is valid. The settings are passed to `keep`."""
    try:
        keep(params.load(path))
    except UserError as error:
        return refused("params", error, "correct it, presets/default.yaml shows every key")
    return ok("params", f"{path} is valid")


def dataset(config: DataConfig) -> Finding:
    """Tell whether the images are where the settings say. Nothing is decoded."""
    path, kind = Path(config.path), config.source
    if kind == "generated":
        if config.generated.pack and shutil.which("mksquashfs") is None:
            remedy = "install squashfs-tools, or set data.generated.pack to false"
            return warn("dataset", "drawn images are to be packed, and there is no mksquashfs", remedy)
        return ok("dataset", f"generated: drawn into {path} where they are missing")
    if kind == "squashfs":
        return _image(config.path, Path(config.mounted) if config.mounted else None)
    if kind in TORCHVISION_FOLDERS:
        return _torchvision_set(path / TORCHVISION_FOLDERS[kind], kind, config.download)
    return _folder(path, kind)


def _image(name: str, mounted: Path | None) -> Finding:
    path = Path(name)
    if mounted and (mounted / "unlabeled").is_dir():
        return ok("dataset", f"squashfs: {mounted} is mounted already")
    try:
        check_image(path)
    except UserError as error:
        if mounted and not (name and path.exists()):
            found = f"not here, neither in {mounted} nor in {name or 'data.path, which is empty'}"
            return warn("dataset", found, "set data.path, or DATASET in the profile of the jobs, which mount it there")
        return refused("dataset", error, "set data.path to a dataset's .sqsh file")
    return ok("dataset", f"squashfs: {path}, {path.stat().st_size / 2**20:.1f} MiB")


def _torchvision_set(folder: Path, kind: str, download: bool) -> Finding:
    if folder.is_dir():
        return ok("dataset", f"{kind}: {folder}")
    if download:
        return note("dataset", f"{kind}: not in {folder} yet, `moco data` downloads it, which needs the internet")
    remedy = "set data.download to true, or data.path to the folder that holds it"
    return fail("dataset", f"{kind}: {folder} not found", remedy)


def _folder(path: Path, kind: str) -> Finding:
    wanted = ["train", "val"]
    if kind == "folder":
        wanted += ["unlabeled", "train_label_tensor.pt", "val_label_tensor.pt"]
    if not path.is_dir():
        return fail("dataset", f"{kind}: {path} is not a folder", "set data.path (and data.source) in params.yaml")
    missing = [name for name in wanted if not (path / name).exists()]
    if missing:
        remedy = f"set data.path to a dataset of this kind: one that has {', '.join(wanted)}"
        return fail("dataset", f"{kind}: {path} has no {', '.join(missing)}", remedy)
    closed = [name for name in wanted if not os.access(path / name, os.R_OK | (os.X_OK if "." not in name else 0))]
    if closed:
        return fail("dataset", f"{kind}: {path / closed[0]} cannot be read", "ask its owner for permission to read")
    return ok("dataset", f"{kind}: {path}")


def lock_problem(folder: Path) -> str | None:
    """Return None where a lock in the folder keeps another process out, else what happened."""
    from filelock import FileLock

    try:
        with FileLock(folder / "probe.lock", timeout=5):
            second = [sys.executable, "-c", TAKE_LOCK, str(folder / "probe.lock")]
            done = subprocess.run(second, capture_output=True, text=True, check=False, timeout=30)
    except (OSError, NotImplementedError, subprocess.TimeoutExpired) as error:
        return f"a lock cannot be taken: {reason(error)}"
    if done.returncode == 0:
        return "a lock does not keep a second process out"
    return None if done.returncode == 3 else f"a lock could not be tried: {done.stderr.strip()[-100:]}"


def cache_bytes(manifest: Path, scratch: Path) -> int | None:
    """Return how many bytes the decoded cache still needs on this node.

    It is 0 where the cache is there, and None where no manifest gives the size. Raises UserError where the manifest is
    damaged.
    """
    if not manifest.exists():
        return None
    from moco.data.cache import cache_folder

    data = load_manifest(manifest)
    if cache_folder(scratch, data.digest).exists():
        return 0
    return data.width * data.height * 3 * sum(split.count for split in data.splits.values())


def scratch(config: RuntimeConfig, manifest: Path = MANIFEST, mounts: Path = MOUNTS) -> Finding:
    """Tell whether the scratch folder can be written, locked and filled, and whether it is this node's own."""
    name, remedy = "scratch", "set runtime.scratch to a folder of yours on the node's own disk"
    path = scratch_place(config.scratch)
    try:
        # A run makes the folder; looking at it shall not.
        there = next(folder for folder in (path, *path.parents) if folder.exists())
        with tempfile.TemporaryDirectory(prefix=".moco-doctor-", dir=there) as work:
            unwritable, unlocked = writing_problem(Path(work)), lock_problem(Path(work))
    except OSError as error:
        unwritable, unlocked = error.strerror or reason(error), None
    if unwritable:
        return fail(name, f"{path} cannot be written: {unwritable}", remedy)
    if unlocked:
        return fail(name, f"{path}: {unlocked}, so two jobs could spoil each other's cache", remedy)
    kind, free, needed = file_system(there, mounts), shutil.disk_usage(there).free, cache_bytes(manifest, path)
    found = f"{path} ({kind}), {free / 2**30:.1f} GiB free"
    if needed is not None:
        found += f", the decoded cache needs {needed / 2**30:.2f} GiB" if needed else ", holds the decoded cache"
    if needed and needed > free:
        return fail(name, found, "make room, or set runtime.scratch to a folder that has it")
    if over_network(kind):
        return warn(name, f"{found}, over the network", "scratch should be node-local: set runtime.scratch")
    return ok(name, found + (", counts as memory of the job" if kind in ("tmpfs", "ramfs") else ""))
