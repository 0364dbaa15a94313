"""Checks of the machine: real tools, real mounts, a real forbidding kernel, files that stand in for /proc."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from moco.doctor import gpu, machine
from moco.doctor.checks import Finding, attempt, file_system, over_network

NVRM = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  {}  Thu Oct 19 18:56:32 UTC 2023\nGCC version:  gcc 12.3.0\n"
OPEN = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  {}  Release Build  (dvs-builder)\n"
Tools = Callable[..., None]


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tools:
    """Leaves the named tools alone on PATH; skips where one of them is not installed."""

    def choose(*names: str, **scripts: str) -> None:
        folder = tmp_path / "bin"
        folder.mkdir()
        for name in names:
            found = shutil.which(name) or pytest.skip(f"{name} is not installed")
            (folder / name).symlink_to(found)
        for name, text in scripts.items():
            (folder / name).write_text(f"#!/bin/sh\n{text}\n")
            (folder / name).chmod(0o755)
        monkeypatch.setenv("PATH", str(folder))

    return choose


@pytest.fixture(autouse=True)
def outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a container nor a job, whatever the suite itself runs in; one thread, as two steps need no more."""
    torch.set_num_threads(1)
    for name in ("APPTAINER_CONTAINER", "SINGULARITY_CONTAINER", "SLURM_JOB_ID", "SLURM_JOB_PARTITION"):
        monkeypatch.delenv(name, raising=False)


def test_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine.container(tmp_path).found == "none"
    (tmp_path / ".dockerenv").touch()
    assert machine.container(tmp_path).found.startswith("Docker, ")
    (tmp_path / ".singularity.d").mkdir()
    assert machine.container(tmp_path).found.startswith("Apptainer or Singularity, ")
    monkeypatch.setenv("SINGULARITY_CONTAINER", "/share/old.sif")
    assert machine.container(tmp_path).found == "Singularity, image old.sif"
    monkeypatch.setenv("APPTAINER_CONTAINER", "/share/apps/moco 1.sif")
    assert machine.container(tmp_path).found == "Apptainer, image moco 1.sif"


def test_libc_against_the_drivers_libraries(tmp_path: Path) -> None:
    kind, version = platform.libc_ver()
    if kind != "glibc":
        pytest.skip("no glibc here")
    assert machine.libc(tmp_path) == Finding("ok", "libc", f"glibc {version}")
    (tmp_path / "libcuda.so.1").write_bytes(b"\x7fELF\0GLIBC_2.2.5\0GLIBC_2.9\0GLIBC_2.17\0GLIBC_PRIVATE\0\xff")
    found = machine.libc(tmp_path)
    assert found.status == "ok" and found.found.endswith("need 2.17")  # by number: 2.9 is older
    (tmp_path / "libnvidia-ml.so.1").write_bytes(b"\0\xfeGLIBC_2.99\0")
    found = machine.libc(tmp_path)
    assert found.status == "FAIL"
    assert found.found == f"the host's driver libraries need glibc 2.99, the image has {version}"
    assert "apptainer.def" in found.remedy and "--nv" in found.remedy


@pytest.mark.parametrize("text", [NVRM, OPEN])
@pytest.mark.parametrize("version", ["450.80.02", "595.10"])
def test_driver_version_is_read(tmp_path: Path, text: str, version: str) -> None:
    (tmp_path / "version").write_text(text.format(version))
    assert gpu.driver_version(tmp_path / "version") == version
    assert gpu.driver_version(tmp_path / "none") is None
    (tmp_path / "version").write_text("something else 1.2.3\n")
    assert gpu.driver_version(tmp_path / "version") == ""


@pytest.mark.parametrize(
    ("version", "cuda", "visible", "status", "words"),
    [
        (None, "12.4", False, "note", "no NVIDIA driver: computing on the CPU"),
        (None, "12.4", True, "note", "torch can use a GPU"),
        ("", "12.4", False, "warn", "names no version"),
        ("535.1", None, False, "note", "without CUDA"),
        ("535.1", "14.0", False, "note", "no minimum"),
        ("450.80.02", "11.8", False, "ok", "450.80.02, NVIDIA's minor-version-compatibility minimum"),
        ("450.51.06", "11.8", False, "FAIL", "administrator"),
        ("525.60.13", "12.4", False, "ok", "525.60.13"),
        ("525.60.9", "12.4", False, "FAIL", "525.60.9 is too old, NVIDIA's .* CUDA 12.4 is 525.60.13; use the proj"),
        ("470.57.02", "12.4", False, "FAIL", "whose CUDA 11.8 build runs from 450.80.02 on"),
        ("580.65.06", "13.0", False, "ok", "580.65.06"),
        ("575.57.08", "13.0", False, "FAIL", "575.57.08 is too old, .* 580.65.06"),
        ("470.57.02", "12.4", True, "warn", "470.57.02 works, yet .* 525.60.13; .*--step"),
    ],
)
def test_driver_against_torch(version: str | None, cuda: str | None, visible: bool, status: str, words: str) -> None:
    found = gpu.judge_driver(version, cuda, visible)
    assert found.status == status
    assert re.search(words, found.line()), found.line()


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with a driver whose GPU this process does not see."""
    if torch.cuda.is_available():
        pytest.skip("a GPU is visible here")
    monkeypatch.setattr(torch.version, "cuda", "12.4")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    (tmp_path / "version").write_text(NVRM.format("560.35.03"))
    return tmp_path / "version"


def test_driver_without_a_visible_gpu(driver: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert gpu.driver(driver).status == "ok"
    found = gpu.gpu(driver)
    assert found.status == "FAIL"
    for words in ("--nv", "--gpus all", "Slurm"):
        assert words in found.remedy
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    assert "(CUDA_VISIBLE_DEVICES is '7')" in gpu.gpu(driver).found
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert gpu.gpu(driver).status == "note", "hidden on purpose, as the image's own test does"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    driver.write_text(NVRM.format("470.57.02"))  # one cause is one failure
    assert [gpu.driver(driver).status, gpu.gpu(driver).status] == ["FAIL", "note"]
    monkeypatch.setattr(torch.version, "cuda", None)
    assert gpu.gpu(driver).status == "warn"


def test_no_gpu_names_device_and_precision(tmp_path: Path, driver: Path) -> None:
    assert re.fullmatch(r"none: computing on (cpu|mps) in (float32|bfloat16)", gpu.gpu(tmp_path / "none").found)
    assert gpu.gpu(tmp_path / "none").status == "note"


def test_a_gpu_that_is_seen_and_cannot_compute(driver: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch says of GPUs is made up; that nothing can be computed on them is this machine's own answer."""
    monkeypatch.setattr(gpu, "gpu_visible", lambda: (True, ""))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(name="X1", total_memory=5 << 30))
    found = gpu.gpu(driver)
    assert found.status == "FAIL", found.line()
    assert found.found.startswith("2 x X1 (5 GiB) cannot compute: ") and found.remedy


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_that_computes() -> None:
    found = gpu.gpu()
    assert found.status == "ok" and torch.cuda.get_device_name(0) in found.found
    assert gpu.driver().status in ("ok", "warn", "note")
    assert "steps on cuda in" in gpu.step().found


@pytest.mark.parametrize("broken", ["loss", "weights"])
def test_step_fails_where_training_would(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels that give no number, and an optimizer that changes nothing."""
    if broken == "loss":
        cross_entropy = torch.nn.functional.cross_entropy
        monkeypatch.setattr(torch.nn.functional, "cross_entropy", lambda *a: cross_entropy(*a) * float("nan"))
    else:
        monkeypatch.setattr(torch.optim.SGD, "step", lambda self: None)
    found = gpu.step("cpu")
    assert found.status == "FAIL" and broken in found.found
    assert attempt("step", lambda: gpu.step("cuda:99")).status == "FAIL"


UNMOUNT = [tool for tool in ("fusermount3", "fusermount", "umount") if shutil.which(tool)]


@pytest.mark.parametrize(
    ("names", "status", "words"),
    [
        (("mksquashfs", "squashfuse", *UNMOUNT), "ok", "opened by squashfuse"),
        (("mksquashfs", "mount", "umount"), "ok", "opened by the kernel"),
        (("mksquashfs", "unsquashfs"), "note", "unpacked to scratch"),
        (("mksquashfs",), "note", "read as they are, others cannot be opened .*squashfuse is not installed"),
    ],
)
def test_squashfs_is_really_tried(tools: Tools, tmp_path: Path, names: tuple[str, ...], status: str, words: str,
                                  monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    if status == "ok" and os.geteuid() != 0:
        pytest.skip("whether mounting is permitted depends on the machine")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    tools(*names)
    found = machine.squashfs()
    assert found.status == status, found.line()
    assert re.search(words, found.line()), found.line()
    assert str(tmp_path) not in Path("/proc/mounts").read_text()
    assert list(tmp_path.glob("moco-doctor-*")) == []


def test_squashfs_is_judged_where_nothing_can_be_packed(tools: Tools, tmp_path: Path) -> None:
    fuse = tmp_path / "fuse"
    tools("unsquashfs", squashfuse="exit 0")
    assert machine.squashfs(fuse).status == "note"
    fuse.touch()
    assert "others by squashfuse (not tried" in machine.squashfs(fuse).found
    (tmp_path / "bin" / "squashfuse").unlink()
    assert "unpacked" in machine.squashfs(fuse).found
    (tmp_path / "bin" / "unsquashfs").unlink()
    assert "cannot be opened without squashfuse" in machine.squashfs(fuse).line()
    (tmp_path / "bin" / "mount").symlink_to("/bin/mount")
    assert ("the kernel's mount" in machine.squashfs(fuse).found) == (os.geteuid() == 0)


def test_user_namespaces(tools: Tools, tmp_path: Path) -> None:
    """Forbidden for real: within a namespace whose own limit is set to none."""
    tools("unshare", "true", "sh")
    if machine.user_namespaces(tmp_path).status != "ok":
        pytest.skip("user namespaces are forbidden here")
    code = (
        "import sys; from pathlib import Path; from moco.doctor.machine import user_namespaces as look\n"
        "Path('/proc/sys/user/max_user_namespaces').write_text('0')\n"
        "print(look(Path(sys.argv[1])).line()); Path(sys.argv[1], '.dockerenv').touch()\n"
        "print(look(Path(sys.argv[1])).line())"
    )
    inner = ["unshare", "--user", "--map-root-user", sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(inner, capture_output=True, text=True, check=True, timeout=60)
    outside, within = done.stdout.splitlines()
    assert outside.startswith("warn  user namespaces  unprivileged user namespaces are forbidden; rootless apptainer")
    assert within.startswith("note ")
    (tmp_path / "bin" / "unshare").unlink()
    assert machine.user_namespaces(tmp_path).status == "note"


def test_slurm(tools: Tools, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tools(sbatch="echo slurm 26.05.1")
    assert machine.slurm() == Finding("ok", "slurm", "slurm 26.05.1")
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    monkeypatch.setenv("SLURM_JOB_PARTITION", "high")
    assert machine.slurm().found == "slurm 26.05.1, in job 4711, partition high"
    (tmp_path / "bin" / "sbatch").unlink()
    found = machine.slurm()
    assert found.status == "note" and "no sbatch" in found.found and "job 4711, partition high" in found.found


def test_file_system_is_the_innermost_and_the_latest_mount(tmp_path: Path) -> None:
    inner = tmp_path / "a b" / "c"
    inner.mkdir(parents=True)
    mounts = tmp_path / "mounts"
    place = str(tmp_path / "a b").replace(" ", "\\040")
    mounts.write_text(f"none / ext4 rw 0 0\nnone {place} autofs rw 0 0\nx:/y {place} nfs4 rw 0 0\nz {place}/cc tmpfs\n")
    assert file_system(inner, mounts) == "nfs4"
    assert file_system(tmp_path, mounts) == "ext4"
    assert file_system(inner, tmp_path / "none") == "unknown"
    assert [over_network(kind) for kind in ("nfs4", "lustre", "gpfs", "fuse.sshfs", "tmpfs", "ext4", "xfs")] == [
        True, True, True, True, False, False, False,
    ]  # fmt: skip
