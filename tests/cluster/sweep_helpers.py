"""A project in a repository, for tests of sweeps."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from conftest import ROOT


def repository(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes a folder with params.yaml the project's, all of it committed, and goes there."""
    shutil.copy(ROOT / "dvc.yaml", project)
    shutil.copytree(ROOT / "slurm", project / "slurm", ignore=shutil.ignore_patterns(".[!g]*", "*.log"))
    shutil.copytree(ROOT / ".dvc", project / ".dvc", ignore=shutil.ignore_patterns("tmp", "cache", "config.local"))
    monkeypatch.chdir(project)
    for name in ("GIT_AUTHOR_NAME", "GIT_AUTHOR_EMAIL", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    git("init", "--quiet", "-b", "main")
    git("config", "user.name", "A Name")
    git("config", "user.email", "name@example.org")
    git("add", "--all")
    git("commit", "--quiet", "-m", "one")


def git(*words: str) -> str:
    return subprocess.run(["git", *words], capture_output=True, text=True, check=True).stdout.strip()
