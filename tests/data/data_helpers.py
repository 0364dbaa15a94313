"""What several tests of the data package need: sections of settings, tools hidden from PATH, real builders."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from moco.data import cache
from moco.data.prepare import prepare
from moco.settings.data import DataConfig, GeneratedConfig


def generated_config(**changes: Any) -> GeneratedConfig:
    settings = {"seed": 3, "size": 32, "unlabeled": 24, "train_per_class": 2, "val_per_class": 1, "pack": False}
    return GeneratedConfig(**(settings | changes))


def data_config(path: Path, source: str = "folder", **changes: Any) -> DataConfig:
    settings: dict[str, Any] = {
        "source": source, "path": str(path), "mounted": "", "copy_to_scratch": False, "download": False,
        "classes": None, "resize": None, "labelled": None, "unreadable": 0, "exclude_val": True,
        "max_pixels": 178956970, "generated": generated_config(),
    }  # fmt: skip
    return DataConfig(**(settings | changes))


def silent(_: str) -> None:
    pass


def hide_all_but(tools: tuple[str, ...], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PATH becomes one folder that holds links to the named tools alone."""
    folder.mkdir()
    for tool in tools:
        found = shutil.which(tool)
        assert found is not None, tool
        (folder / tool).symlink_to(found)
    monkeypatch.setenv("PATH", str(folder))


def need(*tools: str) -> None:
    missing = [tool for tool in tools if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed")


def try_mount(command: list[str]) -> None:
    """Skips the test where this machine does not let the suite mount anything."""
    if os.geteuid() != 0:
        pytest.skip("mounting by the kernel needs root")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"{command[0]} is not permitted here: {done.stderr.strip()}")


def mounts_below(folder: Path) -> list[str]:
    lines = Path("/proc/mounts").read_text().splitlines()
    return [line.split()[1] for line in lines if line.split()[1].startswith(str(folder))]


def left_behind(scratch: Path) -> list[str]:
    """Unfinished caches, mount points and copies that should have gone."""
    found = [*scratch.glob("moco-squashfs-*"), *scratch.glob("moco-copy-*")]
    return [path.name for path in (*found, *cache.caches(scratch).glob(".building-*"))]


def prepare_in_process(path: Path, scratch: Path, barrier: Any, answers: Any) -> None:
    """Body of a process of its own that builds a cache at the same moment as others."""
    barrier.wait(60)
    manifest = prepare(data_config(path), scratch, silent)
    answers.put(manifest.to_json())
