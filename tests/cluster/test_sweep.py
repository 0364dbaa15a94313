"""Sweeps: which tasks and stages, the workspaces with real git and DVC, and what is refused before anything is made."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from sweep_helpers import git, repository

from conftest import write_params
from moco.cluster import workspaces
from moco.cluster.profile import Profile
from moco.cluster.slurm import PIPELINE, render, submit
from moco.cluster.sweep import Sweep
from moco.cluster.sweep import plan as plan_or_none
from moco.cluster.workspaces import make
from moco.errors import UserError
from moco.settings.reading import load


@pytest.fixture
def checkout(project: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project in a repository, with one commit."""
    write_params(project, tracking__uri="sqlite:///mlflow.db")
    repository(project, monkeypatch)
    return project


def plan(job: str, settings: list[str], name: str | None) -> Sweep:
    found = plan_or_none(job, settings, name)
    assert found is not None
    return found


def test_every_combination_is_a_task_and_values_are_read_as_params_yaml_reads_them(checkout: Path) -> None:
    found = plan("pipeline", ["pretrain.crop_scale=[0.2, 1.0],[0.1, 1.0]", "train.lr=1,2e-1,3"], "tau")
    assert len(found.tasks) == 6
    assert found.tasks[4].values == {"pretrain.crop_scale": [0.1, 1.0], "train.lr": 0.2}
    assert found.folder == checkout / "sweeps/tau" and not found.folder.exists(), "planning makes nothing"


@pytest.mark.parametrize(
    ("job", "key", "once", "shared"),
    [
        ("pipeline", "pretrain.temperature=0.1,0.2", ["baseline"], ("data", "baseline")),
        ("pipeline", "finetune.lr=1,2",
         ["pretrain", "train", "baseline", "eval", "request", "train_extra", "eval_extra"],
         ("data", "pretrain", "train", "baseline", "request", "train_extra", "eval", "eval_extra")),
        ("pipeline", "train_extra.labels=a.csv,b.csv",
         ["pretrain", "train", "baseline", "finetune", "eval", "request"],
         ("data", "pretrain", "train", "baseline", "finetune", "request", "eval")),
        ("pipeline", "finetune.classifier=classifier,classifier_extra",
         ["pretrain", "train", "baseline", "eval", "request", "train_extra", "eval_extra"],
         ("data", "pretrain", "train", "baseline", "request", "train_extra", "eval", "eval_extra")),
        ("pipeline", "data.generated.seed=1,2", [], ()),
        ("finetune", "finetune.lr=1,2", [], ("data", "pretrain", "train")),
        ("finetune", "finetune.classifier=classifier,classifier_extra", [],
         ("data", "pretrain", "train", "request", "train_extra")),
        ("train", "train.lr=1,2", [], ("data", "pretrain")),
        ("train_extra", "train_extra.labels=a.csv,b.csv", [], ("data", "pretrain", "train", "request")),
        ("pretrain", "data.generated.seed=1,2", [], ()),
    ],
)  # fmt: skip
def test_what_no_value_reaches_is_done_once_and_before(
    checkout: Path, job: str, key: str, once: list[str], shared: tuple[str, ...]
) -> None:
    for name in ("a.csv", "b.csv"):
        (checkout / name).touch()
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
        ("train", "train.lr=2020-13-45,1", "a", ("KEY=VALUE",)),
        ("train", "train.lr=2020-10-10,1", "a", ("KEY=VALUE",)),
        ("train", "train.lr=!!int x", "a", ("KEY=VALUE",)),
        ("train", "train.lr={[a]: 1}", "a", ("KEY=VALUE",)),
        ("train", "train.lr=&a [*a]", "a", ("KEY=VALUE",)),
        ("finetune", "train.lr=1,2", "a", ("train depends on it too", "finetune needs", "pipeline")),
        ("train", "data.generated.seed=1,2", "a", ("pretrain depends on it too", "pipeline")),
        ("train_extra", "train_extra.labels=absent.csv", "a", ("train_extra.labels: absent.csv: not found",)),
    ],
)
def test_what_cannot_be_swept_is_one_line(
    checkout: Path, job: str, setting: str, name: str, words: tuple[str, ...]
) -> None:
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
        assert "images" not in git("-C", str(place), "status", "--short")
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


def test_settings_that_say_no_sweep_or_say_it_twice_are_one_line(checkout: Path) -> None:
    assert plan_or_none("train", [], None) is None
    with pytest.raises(UserError, match="--name lr: is a sweep's"):
        plan_or_none("train", [], "lr")
    with pytest.raises(UserError, match=r"train\.lr is swept already"):
        plan("train", ["train.lr=1,2", "train.lr=3"], None)
    for broken in ("", "stages: [", "stages:\n  data: moco data\n", "x: 1\n"):
        (checkout / "dvc.yaml").write_text(broken)
        with pytest.raises(UserError, match=r"dvc\.yaml: no stages can be read"):
            plan("train", ["train.lr=1,2"], None)
    (checkout / "dvc.yaml").unlink()
    with pytest.raises(UserError, match=r"no dvc\.yaml here"):
        plan("train", ["train.lr=1,2"], None)


def test_each_task_finds_the_file_that_its_own_settings_name(checkout: Path) -> None:
    for name in ("a.csv", "b.csv", "labels/of another round ä.csv"):
        (checkout / name).parent.mkdir(exist_ok=True)
        (checkout / name).write_text(name)
    make(plan("train_extra", ["train_extra.labels=a.csv,b.csv"], "extra"), lambda _: None)
    assert [
        (checkout / f"sweeps/extra/{n}").joinpath(f"{name}.csv").read_text() for n, name in ((1, "a"), (2, "b"))
    ] == [
        "a.csv",
        "b.csv",
    ]
    assert not (checkout / "sweeps/extra/1/b.csv").exists()
    for n in (1, 2):  # for DVC, which compares the folder as a whole
        assert (checkout / f"sweeps/extra/{n}/labels/of another round ä.csv").is_file()


def test_changes_arrive_byte_for_byte_whatever_git_is_set_to(checkout: Path) -> None:
    (checkout / "slurm/launch").write_bytes(b"one\r\ntwo \t\r\n\xff")
    (checkout / "presets").mkdir(exist_ok=True)
    (checkout / "presets/mine.yaml").write_text("new\n")
    git("add", "presets/mine.yaml")
    for key, value in (("diff.external", "true"), ("color.diff", "always"), ("diff.noprefix", "true")):
        git("config", key, value)
    make(plan("train", ["train.lr=1,2"], "lr"), lambda _: None)
    for place in (checkout / "sweeps/lr/1", checkout / "sweeps/lr/2"):
        assert (place / "slurm/launch").read_bytes() == b"one\r\ntwo \t\r\n\xff"
        assert (place / "presets/mine.yaml").read_text() == "new\n"


def test_workspaces_are_used_again_only_for_the_same_job_sources_and_settings(checkout: Path) -> None:
    """Results, notes and commits of them are no other sources."""
    (checkout / "src").mkdir()
    for name in ("dvc.lock", "README.md", "src/code.py"):
        (checkout / name).touch()
    git("add", "--all")
    git("commit", "--quiet", "-m", "results")
    assert make(plan("train", ["train.lr=1,2"], "lr"), lambda _: None)
    (checkout / "sweeps/lr/1/result").touch()
    (checkout / "dvc.lock").write_text("new results")
    (checkout / "README.md").write_text("a note")
    git("commit", "--quiet", "-a", "-m", "newer results")
    assert not make(plan("train", ["train.lr=1,2"], "lr"), lambda _: None)
    for job, values in (("train", "train.lr=1,3"), ("pipeline", "train.lr=1,2")):
        with pytest.raises(UserError, match="exists already, of another job"):
            make(plan(job, [values], "lr"), lambda _: None)
    (checkout / "src/code.py").write_text("changed")
    with pytest.raises(UserError, match="exists already, of another job"):
        make(plan("train", ["train.lr=1,2"], "lr"), lambda _: None)
    (checkout / "sweeps/lr/made-from").unlink()
    with pytest.raises(UserError, match="unfinished"):
        make(plan("train", ["train.lr=1,2"], "lr"), lambda _: None)
    assert (checkout / "sweeps/lr/1/result").exists(), "what is there stays"


def test_a_path_that_leads_elsewhere_from_a_workspace_is_refused(checkout: Path) -> None:
    write_params(checkout, data__path="../images")
    with pytest.raises(UserError, match=r"data\.path: \.\./images: leads out of the project"):
        plan("train", ["train.lr=1,2"], "lr")


def test_a_name_whose_experiments_exist_is_refused(checkout: Path) -> None:
    reference = f"refs/exps/{'ab'}/{'c' * 38}"
    git("update-ref", f"{reference}/lr-1-other", "HEAD")  # of a sweep named lr-1-other or of none
    make(plan("train", ["train.lr=1,2"], "lr"), lambda _: None)
    shutil.rmtree(checkout / "sweeps")
    git("update-ref", f"{reference}/lr-2", "HEAD")
    with pytest.raises(UserError, match=r"lr-2: an experiment of this name exists.*--name"):
        make(plan("train", ["train.lr=1,2"], "lr"), lambda _: None)
    assert not (checkout / "sweeps").exists()


def test_of_two_submissions_at_once_the_second_leaves_the_first_alone(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = plan("train", ["train.lr=1,2"], "lr")
    monkeypatch.setattr(workspaces, "_made", lambda *_: False)  # both looked before either had made anything
    make(found, lambda _: None)
    with pytest.raises(UserError, match="cannot be made: File exists"):
        make(found, lambda _: None)
    assert (checkout / "sweeps/lr/2/params.yaml").exists()


def test_without_a_repository_one_line_says_so(checkout: Path) -> None:
    shutil.rmtree(checkout / ".git")
    with pytest.raises(UserError, match="clones the project's repository"):
        make(plan("train", ["train.lr=1,2"], "lr"), print)


def test_a_workspace_that_fails_takes_the_others_with_it(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: str | None, project: Path, place: Path) -> None:
        if place.name == "2":
            raise UserError("the disk is full")

    monkeypatch.setattr(workspaces, "_link", fail)
    with pytest.raises(UserError, match="disk"):
        make(plan("train", ["train.lr=1,2,3"], "lr"), lambda _: None)
    assert not (checkout / "sweeps/lr").exists()
