"""`moco clean` takes what can be made again, and only with a yes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from filelock import FileLock

from conftest import Moco


@pytest.mark.fault("clean")
def test_old_caches_and_superseded_checkpoints_go_with_a_yes_and_nothing_else(moco: Moco, project: Path) -> None:
    assert moco("data").returncode == 0
    (cache,) = [path for path in (project / "scratch").glob("moco-cache-*/*") if path.is_dir()]
    other = cache.parent / "0123"
    other.mkdir()
    (other / "train.u8").write_bytes(b"x" * 2**20)
    for number, name in enumerate(("key", "key-2", "key-3", "lone", "unfinished", "unfinished-2")):
        folder = project / "runs/pretrain" / name
        folder.mkdir(parents=True)
        for file in ("metrics.jsonl", "checkpoint_001.pth", "checkpoint_001.pth.sha256", "lock"):
            (folder / file).write_bytes(b"y" * 2**20)
        if not name.startswith("unfinished"):
            (folder / "done").touch()
            os.utime(folder / "done", (number, number))
    before = sorted(project.rglob("*"))
    listed = moco("clean")
    assert listed.returncode == 0 and sorted(project.rglob("*")) == before, "a listing deletes nothing"
    assert "5.0 MiB" in listed.stdout and "--yes" in listed.stdout
    names = ("0123", "key:", "key-2:", "key-3:", "lone", "unfinished")
    assert [name for name in names if f"/{name}" in listed.stdout] == ["0123", "key:", "key-2:"]
    with FileLock(project / "runs/pretrain/key/lock"):
        assert moco("clean", "--yes").returncode == 0
    gone = {str(path.relative_to(project / "runs/pretrain")) for path in before
            if not path.exists() and "runs" in path.parts}  # fmt: skip
    assert gone == {"key-2/checkpoint_001.pth", "key-2/checkpoint_001.pth.sha256"}, "key is in use"
    assert not other.exists() and cache.is_dir()
    assert "key:" in moco("clean", "--yes").stdout and moco("clean").stdout == "nothing to delete\n"
