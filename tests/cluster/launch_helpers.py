"""The launcher on a small project, with recorders in place of what it starts."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from conftest import ROOT


@pytest.fixture(name="project")
def launch_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(ROOT / "slurm", tmp_path / "slurm")
    (tmp_path / "dvc.yaml").write_text("stages: {}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MOCO_PROFILE", raising=False)
    return tmp_path


def outside() -> dict[str, str]:
    """The environment without that of a job, in which the tests themselves may run."""
    return {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}


def launch(project: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["slurm/launch", *arguments], cwd=project, env={**outside(), **environment}, text=True, capture_output=True,
        check=False,
    )  # fmt: skip


def write_profile(project: Path, **values: str) -> str:
    text = "".join(f"{key}={value}\n" for key, value in values.items())
    (project / "site.conf").write_text(text)
    return "site.conf"


def fake(project: Path, name: str, text: str) -> None:
    path = project / "bin" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


# What DVC says of a stage that is not up to date, and of one that is.
STALE = """case "$*" in *"dvc status"*) echo '{"stage": []}'; exit 0;; esac\n"""
FRESH = 'case "$*" in *"dvc status"*) echo "{}"; exit 0;; esac\n'
# Of a scontrol that does not know the job.
SILENT = """case "$*" in *"show job"*) exit 1;; esac\n"""


IN_MOCO = 'case "$*" in *"moco pretrain"*) mkdir -p runs/pretrain/k; '
