"""What happens to `dvc repro` while a stage is at work: edits, and its own end."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from test_dvc import commit, edit, new_workspace, run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A git and DVC repository whose encoder is made, committed."""
    folder = new_workspace(tmp_path_factory.mktemp("workspace"))
    run(folder, "dvc", "repro", "pretrain")
    commit(folder)
    return folder


def at_work(workspace: Path, epochs: int) -> tuple[subprocess.Popen[bytes], Path]:
    """`dvc repro pretrain`, and its run's folder, once the first state has been saved."""
    edit(workspace, "pretrain", "epochs", epochs)
    edit(workspace, "monitor", "every", 100)
    before = set((workspace / "runs/pretrain").iterdir())
    path = f"{workspace / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    process = subprocess.Popen(
        ["dvc", "repro", "pretrain"], cwd=workspace, env={**os.environ, "PATH": path}, start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip
    while not (new := set((workspace / "runs/pretrain").iterdir()) - before) or not list(new.pop().glob("*.sha256")):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    (folder,) = set((workspace / "runs/pretrain").iterdir()) - before
    return process, folder


@pytest.mark.fault("changed-meanwhile")
@pytest.mark.parametrize("what", ["setting", "source"])
def test_what_changes_while_a_stage_is_at_work_never_stands_in_dvc_lock(workspace: Path, what: str) -> None:
    lock, source = workspace / "dvc.lock", workspace / "src/moco/views/views.py"
    before, text = lock.read_bytes(), source.read_text()
    process, folder = at_work(workspace, 20)
    if what == "setting":
        edit(workspace, "pretrain", "temperature", 0.07)
    else:
        source.write_text(text + "# changed\n")
    _, said = process.communicate(timeout=500)
    assert process.returncode != 0 and b"[E-STAGE-CHANGED]" in said, said
    assert (b"temperature was 0.2 and is 0.07" if what == "setting" else b"moco/views/views.py") in said
    assert lock.read_bytes() == before and (folder / "done").exists()
    assert "pretrain" in run(workspace, "dvc", "status")
    edit(workspace, "pretrain", "temperature", 0.2)
    source.write_text(text)
    lines = (folder / "metrics.jsonl").read_bytes()
    assert f"taken from {folder.relative_to(workspace)}" in run(workspace, "dvc", "repro", "pretrain")
    assert (folder / "metrics.jsonl").read_bytes() == lines, "nothing was trained"
    assert (folder / "outputs/models/encoder.pth").read_bytes() == (workspace / "models/encoder.pth").read_bytes()
    assert b"temperature: 0.2" in lock.read_bytes() and lock.read_bytes() != before
    shutil.rmtree(folder)
    run(workspace, "git", "checkout", "-q", ".")
    run(workspace, "dvc", "checkout", "-q", "pretrain")


def lives(pid: int) -> bool:
    """Whether the process is there, other than as an entry that its new parent has not taken note of yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.fault("dvc-gone")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_stage_ends_in_order_when_dvc_is_killed(workspace: Path, number: int) -> None:
    process, folder = at_work(workspace, 40)
    sign = json.loads((folder / "holder").read_text())
    assert sign["pid"] != process.pid
    os.kill(process.pid, number)
    _, said = process.communicate(timeout=300)  # to the end of the stage, which holds the other end of the pipe
    assert process.returncode != 0
    assert b"dvc has ended" in said and b"stopped by SIGTERM; the state is saved" in said, said
    until = time.monotonic() + 60
    while lives(sign["pid"]) and time.monotonic() < until:  # the pipe is closed shortly before its end
        time.sleep(0.05)
    assert not lives(sign["pid"]) and not (folder / "holder").exists()
    assert not (folder / "done").exists() and list(folder.glob("checkpoint_*.pth"))
    assert f"continuing from {folder.relative_to(workspace)}" in run(workspace, "dvc", "repro", "pretrain")
    assert (folder / "done").exists()
    shutil.rmtree(folder)
    run(workspace, "git", "checkout", "-q", ".")
    run(workspace, "dvc", "checkout", "-q", "pretrain")
