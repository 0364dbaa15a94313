"""Checks of settings, images and scratch: real folders, real mounts, real locks."""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import replace
from pathlib import Path

import filelock
import pytest
from filelock import FileLock

from conftest import tiny_params, write_params
from moco.data.prepare import prepare
from moco.doctor import project as checks
from moco.doctor.checks import Finding, attempt
from moco.settings import reading as params
from moco.settings.runtime import RuntimeConfig
from moco.settings.schema import Config


def settings(project: Path, **changes: object) -> Config:
    write_params(project, **changes)
    return params.load(project / "params.yaml")


def look_at_data(project: Path, **changes: object) -> Finding:
    config = settings(project, **{f"data__{name}": value for name, value in changes.items()}).data
    return attempt("dataset", lambda: checks.dataset(config))


def test_parameters(project: Path) -> None:
    kept: list[Config] = []
    assert checks.parameters(project / "params.yaml", kept.append).status == "ok"
    assert kept[0].pretrain.width == tiny_params()["pretrain"]["width"]
    (project / "params.yaml").write_text("data: [")
    found = checks.parameters(project / "params.yaml", kept.append)
    assert found.status == "FAIL" and "not readable as YAML" in found.found and found.remedy
    assert len(kept) == 1


def test_dataset_folder(project: Path) -> None:
    assert look_at_data(project) == Finding("ok", "dataset", "folder: dataset")
    (project / "dataset" / "val_label_tensor.pt").unlink()
    found = look_at_data(project)
    assert found.status == "FAIL" and found.found == "folder: dataset has no val_label_tensor.pt"
    found = look_at_data(project, path="elsewhere")
    assert found.line() == (
        "FAIL  dataset          folder: elsewhere is not a folder; set data.path (and data.source) in params.yaml"
    )


def test_dataset_of_classes_needs_no_labels(project: Path) -> None:
    assert look_at_data(project, source="classes", path="tree").status == "FAIL"
    (project / "tree" / "train").mkdir(parents=True)
    assert look_at_data(project, source="classes", path="tree").found == "classes: tree has no val"
    (project / "tree" / "val").mkdir()
    assert look_at_data(project, source="classes", path="tree").status == "ok"


def test_dataset_image_or_the_folder_mounted_of_it(project: Path) -> None:
    found = look_at_data(project, source="squashfs", path="x.sqsh")
    assert found.line() == "FAIL  dataset          x.sqsh: dataset image not found; set data.path"
    (project / "x.sqsh").write_bytes(b"PK\3\4")
    found = look_at_data(project, source="squashfs", path="x.sqsh")
    assert found.status == "FAIL" and "not a squashfs image" in found.found and ".sqsh" in found.remedy
    found = look_at_data(project, source="squashfs", path="x.sqsh", mounted="empty")
    assert found.status == "FAIL" and "not a squashfs image" in found.found, "though it could be mounted, it is there"
    (project / "x.sqsh").write_bytes(b"hsqs" + bytes(1 << 20))
    assert look_at_data(project, source="squashfs", path="x.sqsh").found == "squashfs: x.sqsh, 1.0 MiB"
    assert look_at_data(project, source="squashfs", path="none", mounted="empty").status == "warn"
    assert "data.path, which is empty" in look_at_data(project, source="squashfs", path="", mounted="empty").found
    assert look_at_data(project, source="squashfs", path="none", mounted="").status == "FAIL"
    found = look_at_data(project, source="squashfs", path="none", mounted="dataset")
    assert found == Finding("ok", "dataset", "squashfs: dataset is mounted already")


@pytest.mark.parametrize(("source", "folder"), [("cifar10", "cifar-10-batches-py"), ("stl10", "stl10_binary")])
def test_dataset_of_torchvision(project: Path, source: str, folder: str) -> None:
    assert look_at_data(project, source=source, path="sets").status == "FAIL"
    assert "data.download" in look_at_data(project, source=source, path="sets").remedy
    assert look_at_data(project, source=source, path="sets", download=True).status == "note"
    (project / "sets" / folder).mkdir(parents=True)
    assert look_at_data(project, source=source, path="sets").status == "ok"


def test_generated_dataset(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = settings(project, data__source="generated", data__path="build").data
    assert checks.dataset(config).status == "ok"
    packing = tiny_params()["data"]["generated"] | {"pack": True}  # type: ignore[operator]
    monkeypatch.setenv("PATH", str(project))
    assert look_at_data(project, source="generated", generated=packing).status == "warn"


def look_at_scratch(folder: Path | str, mounts: Path = checks.MOUNTS) -> Finding:
    config = RuntimeConfig(
        device="cpu", threads=1, deterministic=False, cuda_graphs=True, gpu_kernels=True, scratch=str(folder)
    )
    return attempt("scratch", lambda: checks.scratch(config, mounts=mounts))


def test_scratch_is_written_and_locked_and_left_as_it_was(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = look_at_scratch(project / "not" / "yet")
    assert found.status == "ok"
    assert re.fullmatch(rf"{project}/not/yet \(\w+\), \d+\.\d GiB free.*", found.found)
    assert not (project / "not").exists()
    monkeypatch.setenv("SLURM_TMPDIR", str(project))
    assert look_at_scratch("auto").found.startswith(f"{project} (")
    assert sorted(path.name for path in project.iterdir()) == ["dataset", "params.yaml"]


def test_scratch_that_cannot_be_written(read_only: Path, tmp_path: Path) -> None:
    found = look_at_scratch(read_only / "mine")
    assert found.status == "FAIL"
    assert found.found == f"{read_only}/mine cannot be written: Read-only file system"
    assert "runtime.scratch" in found.remedy
    (tmp_path / "file").touch()
    assert "cannot be written: Not a directory" in look_at_scratch(tmp_path / "file").found


def test_scratch_that_is_full(read_only: Path) -> None:
    subprocess.run(["mount", "-o", "remount,rw,size=4k", str(read_only)], check=True)
    (read_only / "filler").write_bytes(bytes(4096))
    assert "cannot be written: No space left on device" in look_at_scratch(read_only).found


class NoLock(FileLock):  # type: ignore[misc]
    """A file system where taking a lock succeeds and keeps nobody out."""

    def _acquire(self) -> None:
        self._context.lock_file_fd = os.open(os.devnull, os.O_RDONLY)


class Refused(FileLock):  # type: ignore[misc]
    """A file system without locks, as Lustre is without its mount option."""

    def _acquire(self) -> None:
        raise NotImplementedError("FileSystem does not appear to support flock")


def test_scratch_without_locks(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert checks.lock_problem(project) is None
    monkeypatch.setattr(filelock, "FileLock", NoLock)
    found = look_at_scratch(project)
    assert found.status == "FAIL" and "a lock does not keep a second process out" in found.found
    monkeypatch.setattr(filelock, "FileLock", Refused)
    found = look_at_scratch(project)
    assert found.status == "FAIL" and "cannot be taken: FileSystem does not appear to support flock" in found.found


def test_scratch_must_hold_the_decoded_cache(project: Path) -> None:
    manifest = prepare(params.load(project / "params.yaml").data, project / "other", lambda _: None)
    (project / "models").mkdir()
    (project / "models" / "manifest.json").write_text(manifest.to_json())
    assert checks.cache_bytes(checks.MANIFEST, project) == 70 * 32 * 32 * 3
    assert "the decoded cache needs 0.00 GiB" in look_at_scratch(project).found
    assert "holds the decoded cache" in look_at_scratch(project / "other").found
    huge = replace(manifest, width=10**9).to_json()
    (project / "models" / "manifest.json").write_text(huge)
    found = look_at_scratch(project)
    assert found.status == "FAIL" and "needs 6258.49 GiB" in found.found and "make room" in found.remedy
    (project / "models" / "manifest.json").write_text(huge.replace("32", "33"))
    assert look_at_scratch(project).remedy == "run `moco data` again"


def test_scratch_over_the_network(project: Path) -> None:
    mounts = project / "mounts"
    mounts.write_text(f"none / ext4 rw 0 0\nserver@tcp:/x {project} lustre rw,flock 0 0\n")
    found = look_at_scratch(project, mounts)
    assert found.status == "warn" and "(lustre)" in found.found and "node-local" in found.remedy
    mounts.write_text(f"none / ext4 rw 0 0\nnone {project} tmpfs rw 0 0\n")
    assert look_at_scratch(project, mounts).found.endswith("counts as memory of the job")
