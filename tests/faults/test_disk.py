"""Disks that are full, gone, slow or not ours, and clocks that jump: around the real program."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fault_helpers import history, left_over, must, results, run, start

from conftest import assert_one_line, write_dataset, write_params
from moco import files
from moco.errors import UserError
from moco.runs import checkpoints, heartbeat_lock

pytestmark = pytest.mark.slow
EPOCHS = 8


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    project = tmp_path_factory.mktemp("undisturbed")
    write_dataset(project / "dataset")
    write_params(project, pretrain__epochs=EPOCHS, pretrain__width=16, checkpoint__keep=2)
    must(project, "data")
    must(project, "pretrain")
    return project


@pytest.fixture
def project(undisturbed: Path, tmp_path: Path) -> Path:
    """The same before pretraining."""
    shutil.copytree(undisturbed, tmp_path / "project", ignore=shutil.ignore_patterns("runs", "reports", "encoder.pth"))
    return tmp_path / "project"


def mount(folder: Path, size: int) -> None:
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    options = f"size={size}" + (",remount" if os.path.ismount(folder) else "")
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting is not permitted here")


@pytest.fixture
def runs(project: Path) -> Iterator[Path]:
    """The project's folder of runs as a file system of its own."""
    (project / "runs").mkdir()
    mount(project / "runs", 64 << 20)
    yield project / "runs"
    subprocess.run(["umount", str(project / "runs")], check=True)


def as_before(project: Path, undisturbed: Path) -> None:
    assert results(project, "pretrain") == results(undisturbed, "pretrain")
    assert history(project, "pretrain") == history(undisturbed, "pretrain")
    assert left_over(project) == []


@pytest.mark.fault("full-disk")
def test_a_disk_that_is_full_anywhere_in_a_checkpoint_loses_nothing(
    project: Path, undisturbed: Path, runs: Path, tries: Callable[[int], None]
) -> None:
    """Room for two checkpoints and a share of a third, less and less of it."""
    (folder,) = (undisturbed / "runs/pretrain").iterdir()
    size = max(path.stat().st_size for path in folder.glob("checkpoint_*.pth"))
    shares = (0.9, 0.5, 0.1)
    for share in shares:
        shutil.rmtree(runs / "pretrain", ignore_errors=True)
        mount(runs, int((2 + share) * size) + 65536)
        code, said = run(project, "pretrain")
        assert code == 1
        assert_one_line(said, "cannot be written")
        assert list(runs.glob("pretrain/*/checkpoint_*.pth")), "those of before are there"
        mount(runs, 64 << 20)
        assert "continuing from" in must(project, "pretrain")
        as_before(project, undisturbed)
    tries(len(shares))


@pytest.mark.fault("file-size")
def test_a_limit_on_files_is_one_line_and_the_run_continues_without_it(project: Path, undisturbed: Path) -> None:
    """As a quota does, it fails in the midst of a write; the state after the first signal is saved is sound."""
    process = start(project, "pretrain")
    while not list(project.glob("runs/pretrain/*/checkpoint_002.pth")):
        assert process.poll() is None
        time.sleep(0.002)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (20_000, 20_000))
    _, said = process.communicate(timeout=120)
    assert process.returncode == 1
    assert_one_line(said, "cannot be written")
    assert "continuing from" in must(project, "pretrain")
    as_before(project, undisturbed)


@pytest.mark.fault("vanished")
def test_a_run_whose_folder_is_removed_says_so(project: Path) -> None:
    write_params(project, pretrain__epochs=2000)
    process = start(project, "pretrain")
    while not list(project.glob("runs/pretrain/*/checkpoint_001.pth")):
        assert process.poll() is None
        time.sleep(0.01)
    shutil.rmtree(project / "runs", ignore_errors=True)
    shutil.rmtree(project / "runs", ignore_errors=True)  # what was written meanwhile
    _, said = process.communicate(timeout=120)
    assert process.returncode == 1
    assert_one_line(said, "runs/pretrain/", "removed")


@pytest.mark.parametrize(
    "call", [(tempfile, "mkstemp"), (torch, "save"), (checkpoints, "sha256"), (os, "fsync"), (files, "_sync_folder")]
)
@pytest.mark.parametrize("first", [True, False])
def test_a_folder_that_is_removed_in_the_midst_of_saving_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: tuple[Any, str], first: bool
) -> None:
    module, name = call
    work = getattr(module, name)

    def removing(*given: Any, **named: Any) -> Any:
        if first:
            shutil.rmtree(tmp_path / "run", ignore_errors=True)
        result = work(*given, **named)
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        return result

    monkeypatch.setattr(module, name, removing)
    with pytest.raises(UserError, match=r"checkpoint_001\.pth.*: .*was removed (meanwhile|while it was being saved)$"):
        checkpoints.CheckpointFolder(tmp_path / "run", keep=1).save(1, {"weights": torch.ones(2)})


@pytest.mark.fault("slow-rename")
def test_slow_renames_change_nothing(project: Path, undisturbed: Path, tries: Callable[[int], None]) -> None:
    must(project, "pretrain", world="slow-rename")
    renamed = (project / "world-seen").stat().st_size
    assert renamed > 2 * EPOCHS
    tries(renamed)
    as_before(project, undisturbed)


@pytest.mark.fault("clock")
def test_a_clock_that_jumps_changes_nothing(project: Path, undisturbed: Path, tries: Callable[[int], None]) -> None:
    must(project, "pretrain", world="clock")
    jumps = (project / "world-seen").stat().st_size
    assert jumps >= 3
    tries(jumps)
    as_before(project, undisturbed)


@pytest.mark.fault("clock")
def test_minutes_are_measured_by_a_clock_that_does_not_jump(project: Path) -> None:
    write_params(project, pretrain__epochs=100_000, pretrain__minutes=0.05)
    began = time.monotonic()
    must(project, "pretrain", world="clock")
    assert 3 <= time.monotonic() - began < 60


def elsewhere(project: Path, tmp_path: Path) -> list[str]:
    """A command's beginning that runs it on what looks like another machine: it had another start of the kernel."""
    (tmp_path / "boot").write_text("6f1a9c1e-0000-4000-8000-000000000000\n")
    place = "/proc/sys/kernel/random/boot_id"
    words = ["unshare", "--mount", "--uts", "sh", "-c",
             f'mount --bind "$0" {place} && hostname elsewhere && cd "$1" && shift && exec "$@"',
             str(tmp_path / "boot"), str(project)]  # fmt: skip
    if os.geteuid() != 0 or subprocess.run([*words, "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("a second machine cannot be imitated here")
    return words


@pytest.mark.fault("two-jobs")
@pytest.mark.long
def test_a_job_that_died_on_another_machine_is_taken_over_and_a_living_one_is_not(
    project: Path, undisturbed: Path, tmp_path: Path
) -> None:
    words = [*elsewhere(project, tmp_path), sys.executable, "-m", "moco.cli", "pretrain"]
    first = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while not list(project.glob("runs/pretrain/*/checkpoint_002.pth")):
        assert first.poll() is None
        time.sleep(0.002)
    os.killpg(first.pid, signal.SIGSTOP)
    code, said = run(project, "pretrain")
    assert code == 1
    assert_one_line(said, "another process runs `moco pretrain`")
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate(timeout=120)
    (sign,) = project.glob("runs/pretrain/*/holder")
    assert '"host": "elsewhere"' in sign.read_text()
    said = must(project, "pretrain")
    assert "was in use on elsewhere; watching" in said and "no sign of life; going on" in said
    as_before(project, undisturbed)


@pytest.mark.fault("two-jobs")
def test_where_locks_do_not_reach_a_sign_of_life_refuses_the_second(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other machine's process without the lock, as on a file system whose locks stay on each machine."""
    write_params(project, pretrain__epochs=2000)
    folder = tmp_path / "run"
    folder.mkdir()
    code = (
        "import signal, sys, time; from pathlib import Path; from moco.runs import heartbeat_lock\n"
        "heartbeat_lock.BEAT, sign = 0.5, heartbeat_lock._sign\n"
        "def slow(handle, content):\n"
        "    if Path(sys.argv[1], 'stand-still').exists(): signal.raise_signal(signal.SIGSTOP)\n"
        "    return sign(handle, content)\n"
        "heartbeat_lock._sign = slow\n"
        "with heartbeat_lock.held(Path(sys.argv[1]), 'moco pretrain', print):\n"
        "    print('holds', flush=True); time.sleep(60)"
    )
    words = [*elsewhere(project, tmp_path), sys.executable, "-c", code, str(folder)]
    other = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert other.stdout is not None and other.stdout.readline() == "holds\n"
    said: list[str] = []
    try:
        refusal = pytest.raises(UserError, match="on elsewhere runs `moco pretrain`")
        with refusal, heartbeat_lock.held(folder, "moco pretrain", said.append):
            pass
        assert len(said) == 1
        # It stands still for so long that it counts as dead, is succeeded, and moves again: it has just looked whether
        # the folder is its own, and would sign next.
        monkeypatch.setattr(heartbeat_lock, "PATIENCE", 2.0)
        monkeypatch.setattr(heartbeat_lock, "FIRST_BEAT", 0.2)
        monkeypatch.setattr(heartbeat_lock, "BEAT", 0.2)
        monkeypatch.setattr("os._exit", lambda _: said.append("ended"))  # instead of this process, without a word
        (folder / "stand-still").touch()
        os.waitid(os.P_PID, other.pid, os.WSTOPPED | os.WNOWAIT)
        (folder / "stand-still").unlink()
        with heartbeat_lock.held(folder, "moco pretrain", said.append):
            os.killpg(other.pid, signal.SIGCONT)
            rest, _ = other.communicate(timeout=120)
            assert other.returncode == 1 and "taken over by" in rest, rest
            _, sign = heartbeat_lock._read(folder / heartbeat_lock.NAME)
            assert sign["pid"] == os.getpid(), "it did not touch the sign of its successor"
            time.sleep(0.5)
        assert said[-1].endswith("no sign of life; going on with it"), said
        assert not (folder / heartbeat_lock.NAME).exists()
    finally:
        if other.poll() is None:
            os.killpg(other.pid, signal.SIGKILL)
        other.communicate()


@pytest.mark.fault("two-jobs")
def test_a_holder_whose_successor_has_ended_ends_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat_lock, "FIRST_BEAT", 0.1)
    monkeypatch.setattr(heartbeat_lock, "BEAT", 0.1)
    said: list[str] = []
    ended = threading.Event()
    monkeypatch.setattr("os._exit", lambda _: ended.set())
    with heartbeat_lock.held(tmp_path, "moco pretrain", said.append):
        (tmp_path / heartbeat_lock.NAME).unlink()
        assert ended.wait(10)
    assert "taken over by another process" in said[0]


@pytest.mark.fault("full-disk")
@pytest.mark.parametrize("before", [True, False])
def test_a_full_disk_does_not_hide_a_holder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: bool) -> None:
    """Where a sign stood before, it is overwritten; where none did, one is given as soon as there is room."""
    monkeypatch.setattr(heartbeat_lock, "FIRST_BEAT", 0.1)
    monkeypatch.setattr(heartbeat_lock, "BEAT", 0.1)
    path, write, full = tmp_path / heartbeat_lock.NAME, os.pwrite, threading.Event()
    full.set()
    if before:
        path.write_text(json.dumps({"machine": heartbeat_lock.machine()}).ljust(heartbeat_lock.LENGTH))

    def limited(handle: int, content: bytes, offset: int) -> int:
        if full.is_set() and os.fstat(handle).st_size < offset + len(content):
            raise OSError(errno.ENOSPC, "no space")
        return write(handle, content, offset)

    monkeypatch.setattr("os.pwrite", limited)
    with heartbeat_lock.held(tmp_path, "moco pretrain", pytest.fail):
        if not before:
            assert not path.exists()
            full.clear()
            deadline = time.monotonic() + 10
            while not path.exists():
                assert time.monotonic() < deadline
                time.sleep(0.01)
        assert json.loads(path.read_text())["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == []
