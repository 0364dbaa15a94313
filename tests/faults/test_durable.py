"""The order in which things reach the disk, on which a machine that loses power depends."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from conftest import Moco, write_params
from moco.files import write_text


@pytest.fixture
def order(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of files as they are forced onto the disk, and of what is renamed."""
    seen: list[str] = []
    sync, replace = os.fsync, Path.replace

    def fsync(handle: int) -> None:
        seen.append(f"sync {Path(f'/proc/self/fd/{handle}').readlink().name}")
        sync(handle)

    def rename(path: Path, target: Any) -> Path:
        seen.append(f"rename {Path(target).name}")
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "replace", rename)
    return seen


def test_content_comes_before_the_name_and_the_name_is_forced_too(tmp_path: Path, order: list[str]) -> None:
    (tmp_path / "place").mkdir()
    write_text(tmp_path / "place" / "file.txt", "content")
    first, *others = order
    assert first.startswith("sync .file.txt.")
    assert others == ["rename file.txt", "sync place"]


def test_the_log_comes_before_the_state_that_follows_from_it(moco: Moco, project: Path, order: list[str]) -> None:
    write_params(project, pretrain__epochs=3)
    assert moco("data").returncode == 0
    order.clear()
    assert moco("pretrain").returncode == 0
    before = 0
    for epoch in (1, 2, 3):
        saved = order.index(f"rename checkpoint_{epoch:03}.pth")
        # Once after the start or the state before, once for this one.
        assert order[before:saved].count("sync metrics.jsonl") == 2, order[before:saved]
        before = saved
