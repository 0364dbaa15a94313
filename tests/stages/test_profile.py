"""`moco profile` tells where a step's time goes, and does nothing else."""

from __future__ import annotations

import re
import time
from pathlib import Path

import numpy as np
import pytest

from conftest import Moco, assert_one_line_error, write_params
from moco.data import batches

PART = re.compile(r"^ +([\d.]+)% +([\d.]+) ms +(\w+)", re.MULTILINE)


def test_the_parts_make_up_the_step_and_nothing_is_written(moco: Moco, project: Path) -> None:
    assert moco("data").returncode == 0

    def files() -> dict[Path, int]:
        found = (path for path in project.rglob("*") if "scratch" not in path.parts)  # whose cache has a lock
        return {path: path.stat().st_mtime_ns for path in found}

    before = files()
    done = moco("profile", "--steps", "4")
    assert done.returncode == 0, done.stderr
    shares = {name: float(share) for share, _, name in PART.findall(done.stdout)}
    assert list(shares) == ["waiting", "views", "keys", "queries", "backward", "optimizer", "the"]
    assert sum(shares.values()) == pytest.approx(100, abs=0.5)
    assert min(shares["views"], shares["keys"], shares["backward"]) > 1
    assert "small_resnet, 32 pixels, float32, 1 threads" in done.stdout
    assert files() == before


def test_smaller_views_have_a_line_each(moco: Moco, project: Path) -> None:
    write_params(project, pretrain__resolutions=[0.5, 0.75, 1.0], pretrain__resolution_changes=[0.5, 0.8])
    assert moco("data").returncode == 0
    told = moco("profile", "--steps", "2").stdout
    lines = re.findall(r"From (\d+)% to (\d+)% of the run, with views of (\d+) pixels: (\d+) images/s", told)
    assert [line[:3] for line in lines] == [("0", "50", "16"), ("50", "80", "24")]
    assert "small_resnet, 32 pixels" in told and all(int(line[3]) > 0 for line in lines)


def test_images_that_come_too_late_are_told_of(moco: Moco, project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert moco("data").returncode == 0
    gather = batches.gather

    def slow(images: np.ndarray, indices: np.ndarray) -> np.ndarray:
        time.sleep(0.1)
        return gather(images, indices)

    monkeypatch.setattr(batches, "gather", slow)
    told = moco("profile", "--steps", "4").stdout
    assert float(PART.findall(told)[0][0]) > 30 and "Images come too late" in told


def test_without_a_manifest_one_line_says_what_to_do(moco: Moco, project: Path) -> None:
    assert_one_line_error(moco("profile"), "models/manifest.json", "moco data")
