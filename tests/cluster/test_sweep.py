"""Sweeps: which tasks and stages, the workspaces with real git and DVC, and what is refused before anything is made."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT, write_params
from moco.cluster import sweep as sweeps
from moco.cluster.profile import Profile
from moco.cluster.slurm import PIPELINE, render, submit
from moco.cluster.sweep import make, plan
from moco.errors import UserError
from moco.params import load


@pytest.fixture
def checkout(project: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project in a repository, with one commit."""
    shutil.copy(ROOT / "dvc.yaml", project)
    shutil.copytree(ROOT / "slurm", project / "slurm", ignore=shutil.ignore_patterns("logs"))
    shutil.copytree(ROOT / ".dvc", project / ".dvc", ignore=shutil.ignore_patterns("tmp", "cache"))
    write_params(project, tracking__uri="sqlite:///mlflow.db")
    monkeypatch.chdir(project)
    for name in ("GIT_AUTHOR_NAME", "GIT_AUTHOR_EMAIL", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    git("init", "--quiet", "-b", "main")
    git("config", "user.name", "A Name")
    git("config", "user.email", "name@example.org")
    git("add", "dvc.yaml", "params.yaml", "slurm", ".dvc/config")
    git("commit", "--quiet", "-m", "one")
    return project


def git(*words: str) -> str:
    return subprocess.run(["git", *words], capture_output=True, text=True, check=True).stdout.strip()


def test_every_combination_is_a_task_and_values_are_read_as_params_yaml_reads_them(checkout: Path) -> None:
    found = plan("pipeline", ["pretrain.crop_scale=[0.2, 1.0],[0.1, 1.0]", "train.lr=1,2e-1,3"], "tau")
    assert len(found.tasks) == 6
    assert found.tasks[4] == {"pretrain.crop_scale": [0.1, 1.0], "train.lr": 0.2}
    assert found.folder == checkout / "sweeps/tau" and not found.folder.exists(), "planning makes nothing"


@pytest.mark.parametrize(
    ("job", "key", "once", "shared"),
    [
        ("pipeline", "pretrain.temperature=0.1,0.2", ["baseline"], ("data", "baseline")),
        ("pipeline", "finetune.lr=1,2", ["pretrain", "train", "baseline", "eval"],
         ("data", "pretrain", "train", "baseline", "eval")),
        ("pipeline", "data.generated.seed=1,2", [], ()),
        ("train", "train.lr=1,2", [], ("data", "pretrain")),
        ("train_extra", "train_extra.labels=a.csv,b.csv", [], ("data", "pretrain")),
    ],
)  # fmt: skip
def test_what_no_value_reaches_is_done_once_and_before(
    checkout: Path, job: str, key: str, once: list[str], shared: tuple[str, ...]
) -> None:
    found = plan(job, [key], "a")
    assert found.shared == shared
    said: list[str] = []
    submit(job, Profile(), Path("p.conf"), said.append, dry_run=True, sweep=found)
    texts = said[0].split("\n\n")
    jobs = [text.splitlines()[0].removeprefix("# ") for text in texts]
    assert jobs[: len(once)] == once and sorted(jobs) == sorted(PIPELINE if job == "pipeline" else [job])
    assert ["--array=1-2" in text for text in texts] == [name not in once for name in jobs]


def test_a_script_of_a_sweep_names_workspaces_store_and_one_log_a_task(checkout: Path) -> None:
    lines = render("train", Profile(), "/p q.conf", plan("train", ["train.lr=1,2,3"], "lr")).splitlines()
    for line in (
        "#SBATCH --array=1-3", "#SBATCH --output=slurm/logs/%x-%A_%a.log", "export MOCO_PROFILE='/p q.conf'",
        f"export MOCO_SWEEP={checkout}/sweeps/lr", "export MOCO_SHARED='data pretrain'",
        f"export MLFLOW_TRACKING_URI=sqlite:///{checkout}/mlflow.db",
    ):  # fmt: skip
        assert line in lines


def test_a_server_needs_no_address_in_the_script(checkout: Path) -> None:
    write_params(checkout, tracking__uri="http://user:secret@host:5000")
    assert "secret" not in render("train", Profile(), "p", plan("train", ["train.lr=1,2"], "lr"))


@pytest.mark.parametrize(
    ("job", "setting", "name", "words"),
    [
        ("pipeline", "pretrain.temprature=1", "a", ("pretrain.temprature", "did you mean 'temperature'")),
        ("pipeline", "pretrain.temperature=0.1,warm", "a", ("pretrain.temperature=warm", "expected a number")),
        ("pipeline", "pretrain.temperature", "a", ("KEY=VALUE",)),
        ("pipeline", "pretrain.temperature=", "a", ("KEY=VALUE",)),
        ("pipeline", "pretrain.temperature=[", "a", ("KEY=VALUE",)),
        ("pipeline", "runtime.device=cpu,cuda", "a", ("no stage", "runtime.device")),
        ("train", "pretrain.lr=1,2", "a", ("train does not depend", "pipeline")),
        ("train", "train.lr=1,2", "a b", ("--name a b",)),
        ("train", "train.lr=1,2", "../a", ("--name ../a",)),
        ("train", "train.lr=1,2", "used", ("exists already", "--name")),
    ],
)
def test_what_cannot_be_swept_is_one_line(
    checkout: Path, job: str, setting: str, name: str, words: tuple[str, ...]
) -> None:
    (checkout / "sweeps/used").mkdir(parents=True)
    with pytest.raises(UserError) as caught:
        plan(job, [setting], name)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_workspaces_carry_what_is_not_committed_and_share_the_cache(checkout: Path) -> None:
    write_params(checkout, tracking__uri="sqlite:///mlflow.db", pretrain__seed=5, data__path="images")
    (checkout / "images").mkdir()
    (checkout / "slurm/launch").write_text("changed\n")
    said: list[str] = []
    make(plan("train", ["train.lr=1.5,2.5"], "lr"), said.append)
    assert said == ["lr-1: train.lr=1.5", "lr-2: train.lr=2.5"]
    for number, lr in ((1, 1.5), (2, 2.5)):
        place = checkout / f"sweeps/lr/{number}"
        config = load(place / "params.yaml")
        assert (config.train.lr, config.pretrain.seed) == (lr, 5)
        assert (place / "slurm/launch").read_text() == "changed\n"
        assert (place / "images").resolve() == (checkout / "images").resolve()
        assert git("-C", str(place), "remote", "get-url", "origin") == str(checkout)
        assert git("-C", str(place), "config", "--local", "user.email") == "name@example.org"
        cache = subprocess.run(
            [sys.executable, "-m", "dvc", "cache", "dir"], cwd=place, capture_output=True, text=True, check=True
        )
        assert cache.stdout.strip() == str(checkout / ".dvc/cache")
    assert load(checkout / "params.yaml").train.lr not in (1.5, 2.5), "the project's own settings stay"


def test_sources_that_git_does_not_know_are_refused(checkout: Path) -> None:
    (checkout / "src").mkdir()
    (checkout / "src/mine.py").touch()
    with pytest.raises(UserError, match=r"src/mine\.py: git does not know it.*git add"):
        make(plan("train", ["train.lr=1,2"], "lr"), print)


def test_without_a_repository_one_line_says_so_and_nothing_is_left(checkout: Path) -> None:
    shutil.rmtree(checkout / ".git")
    with pytest.raises(UserError, match="clones the project's repository"):
        make(plan("train", ["train.lr=1,2"], "lr"), print)
    assert not (checkout / "sweeps").exists()


def test_a_workspace_that_fails_takes_the_others_with_it(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: str | None, project: Path, place: Path) -> None:
        if place.name == "2":
            raise UserError("the disk is full")

    monkeypatch.setattr(sweeps, "_link", fail)
    with pytest.raises(UserError, match="disk"):
        make(plan("train", ["train.lr=1,2,3"], "lr"), lambda _: None)
    assert not (checkout / "sweeps/lr").exists()
