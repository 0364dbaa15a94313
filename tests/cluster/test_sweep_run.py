"""Sweeps from their submission to their experiments, with real git, DVC and launcher. In place of Slurm a script that
runs each job at once, and in place of the stages one that writes down what they were made from, both in seconds."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from sweep_helpers import git, repository

from conftest import ROOT, write_params
from moco.cluster.profile import Profile
from moco.cluster.slurm import PIPELINE, submit
from moco.cluster.sweep import plan
from moco.errors import UserError

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

# Every result names the values and results that it was made from.
MOCO = f"""#!{sys.executable}
import json, os, pathlib, sys, time, yaml
params = yaml.safe_load(open("params.yaml"))
stage = sys.argv[1] + ("_extra" if "--classifier" in sys.argv else "")
if os.environ.get("FAIL") == stage: sys.exit(f"{{stage}} fails")
spec = yaml.safe_load(open("dvc.yaml"))["stages"][stage]
deps = [dep.replace("${{finetune.classifier}}", params["finetune"]["classifier"]) for dep in spec["deps"]]
files = [pathlib.Path(dep) for dep in deps if dep.startswith("models")]
files = [path / "model" if path.is_dir() else path for path in files]
made = {{"stage": stage, "params": {{key: params.get(key) for key in spec["params"] if "." not in key}},
        "from": [json.loads(path.read_text()) for path in files]}}
for kind in ("outs", "plots", "metrics"):
    for out in spec.get(kind, []):
        path = pathlib.Path(out if isinstance(out, str) else next(iter(out)))
        path = path / "model" if path.parent.name == "models" and not path.suffix else path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("step,loss\\n1,1\\n" if path.suffix == ".csv" else json.dumps(made))
done = pathlib.Path("runs", stage, "key", "done")
done.parent.mkdir(parents=True, exist_ok=True)
done.write_text(os.environ.get("SLURM_JOB_ID", ""))
"""
# As Slurm would: the batch script, once for each task, with what a job finds in its environment.
SBATCH = f"""#!{sys.executable}
import os, pathlib, re, subprocess, sys
text = sys.stdin.read()
jobs = pathlib.Path(os.environ["JOBS"]); number = 100 + len(list(jobs.glob("*.args")))
(jobs / f"{{number}}.args").write_text(" ".join(sys.argv[1:]))
if re.search(rf"job-name=moco-{{os.environ.get('REFUSE', 'none')}}\\n", text):
    sys.exit("sbatch: error: invalid partition")
print(number, flush=True)
array = re.search(r"--array=1-(\\d+)", text)
for task in range(1, int(array[1]) + 1) if array else [0]:
    place = {{"SLURM_ARRAY_JOB_ID": str(number), "SLURM_ARRAY_TASK_ID": str(task)}} if array else {{}}
    with (jobs / f"{{number}}_{{task}}.log").open("w") as log:
        done = subprocess.run(["bash", "-s"], input=text, text=True, stdout=log, stderr=subprocess.STDOUT,
                              env={{**os.environ, **place, "SLURM_JOB_ID": str(number * 100 + task)}})
        log.write(f"exit {{done.returncode}}")
"""


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    project = tmp_path / "a project"
    project.mkdir()
    shutil.copytree(ROOT / "src", project / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in (".gitignore", ".dvcignore"):
        shutil.copy(ROOT / name, project)
    shutil.copytree(ROOT / "labels", project / "labels")
    write_params(project)
    tools = tmp_path / "tools"
    tools.mkdir()
    for name, text in (("moco", MOCO), ("sbatch", SBATCH), ("scancel", '#!/bin/sh\necho "$@" >"$JOBS/cancelled"\n')):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    (tmp_path / "jobs").mkdir()
    monkeypatch.setenv("JOBS", str(tmp_path / "jobs"))
    monkeypatch.setenv("PATH", f"{tools}:{Path(sys.executable).parent}:{os.environ['PATH']}")
    for name in list(os.environ):
        if name.startswith("SLURM") or name in ("MOCO_PROFILE", "FAIL", "REFUSE"):
            monkeypatch.delenv(name)
    repository(project, monkeypatch)
    (project / "site.conf").write_text("")
    return project


def send(job: str, *sweep: str, name: str, arguments: tuple[str, ...] = ()) -> list[str]:
    profile = Path("site.conf")
    return submit(job, Profile(), profile, lambda _: None, arguments=arguments, sweep=plan(job, sweep, name))


def jobs(project: Path, pattern: str = "*.log") -> dict[str, str]:
    return {path.stem: path.read_text() for path in sorted((project.parent / "jobs").glob(pattern))}


def experiments() -> dict[str, str]:
    """Commit by name."""
    lines = git("for-each-ref", "--format=%(refname:lstrip=4) %(objectname)", "refs/exps/*/*/*").splitlines()
    return dict(line.split() for line in lines)


def made(commit: str, stage: str) -> Any:
    return json.loads(git("show", f"{commit}:reports/{stage}/metrics.json"))


@pytest.mark.long
def test_a_pipeline_sweep_ends_in_experiments_made_from_their_own_values(checkout: Path) -> None:
    (checkout / "src/mine.py").write_text("new and not committed\n")
    git("add", "src/mine.py")
    git("config", "diff.external", "true")  # what a user may have set, and would make the changes disappear
    git("config", "clone.defaultRemoteName", "other")
    write_params(checkout, pretrain__seed=7)
    ids = send("pipeline", "train.lr=0.25", name="lr")
    logs = jobs(checkout)
    assert all(log.endswith("exit 0") for log in logs.values()), logs
    assert len(ids) == len(PIPELINE) and len(logs) == len(ids), "pretrain once, as train.lr does not reach it"
    arguments = jobs(checkout, "*.args")
    waits = [re.findall(r"--dependency=(\S+)", words) for words in arguments.values()]
    assert waits == [[], ["afterok:100"], *([f"aftercorr:{job}"] for job in range(101, 99 + len(PIPELINE)))]
    ((name, commit),) = experiments().items()
    assert name == "lr-1"
    for stage in ("train", "finetune", "eval", "request", "train_extra", "eval-classifier_extra"):
        found = made(commit, stage)
        while found["stage"] != "train":
            found = found["from"][-1]
        assert found["params"]["train"]["lr"] == 0.25, stage
        (encoder,) = (source for source in found["from"] if source["stage"] == "pretrain")
        assert encoder["params"]["pretrain"]["seed"] == 7
    tree = git("ls-tree", "-r", "--name-only", commit).splitlines()
    assert "src/mine.py" in tree, "what the tasks ran"
    assert "reports/eval/predictions.csv" not in tree, "DVC's cache has it"
    models = "models/finetuned/model"
    subprocess.run(["dvc", "exp", "apply", "--quiet", "lr-1"], check=True)
    assert (checkout / models).read_text() == (checkout / "sweeps/lr/1" / models).read_text()

    git("add", "src/mine.py")
    with pytest.raises(UserError, match="exists already"):
        send("pipeline", "train.lr=1", name="lr")
    shutil.rmtree(checkout / "sweeps/lr")
    with pytest.raises(UserError, match=r"lr-1: an experiment of this name exists.*dvc exp remove"):
        send("pipeline", "train.lr=1", name="lr")
    assert not (checkout / "sweeps/lr").exists()


def test_a_task_takes_no_results_of_other_settings(checkout: Path) -> None:
    """Neither where the project has none, nor where its settings changed meanwhile. Its results are in git."""
    send("train", "train.lr=0.25", name="none")
    log = jobs(checkout)["100_1"]
    assert log.endswith("exit 1") and log.count("error: ") == 1 and "bring data, pretrain up to date" in log, log
    subprocess.run(["dvc", "repro", "--quiet", "pretrain"], check=True)
    git("add", "--all")
    git("commit", "--quiet", "-m", "results")
    write_params(checkout, pretrain__seed=8)
    send("train", "train.lr=0.25", name="changed")
    assert "params.yaml" in (log := jobs(checkout)["101_1"]) and "bring data, pretrain up to date" in log, "and why"
    assert not experiments()
    subprocess.run(["dvc", "repro", "--quiet", "pretrain"], check=True)
    send("train", "train.lr=0.25", name="changed")  # the same again, in the same workspace
    assert jobs(checkout)["102_1"].endswith("exit 0")
    assert set(experiments()) == {"changed-1"}


@pytest.mark.long
def test_a_pipeline_that_slurm_refuses_in_part_leaves_no_jobs_and_a_failed_task_can_be_sent_again(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAIL", "pretrain")
    monkeypatch.setenv("REFUSE", "train")
    with pytest.raises(UserError, match=r"train: .*invalid partition; the jobs before it are cancelled: 100, 101$"):
        send("pipeline", "pretrain.seed=1", name="seed")
    assert (checkout.parent / "jobs/cancelled").read_text() == "100 101\n"
    assert jobs(checkout)["101_1"].endswith("exit 1") and not experiments()
    monkeypatch.delenv("FAIL")
    monkeypatch.delenv("REFUSE")
    send("pipeline", "pretrain.seed=1", name="seed")
    assert set(experiments()) == {"seed-1"}
    monkeypatch.setenv("REFUSE", "train")
    with pytest.raises(UserError, match=r"train: .*invalid partition$"):
        send("train", "train.lr=1", name="lr")
    assert not (checkout / "sweeps/lr").exists(), "nothing was submitted that could run there"


def test_tasks_leave_results_of_their_own_alone_even_when_one_was_ended_as_it_published(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a project whose reports are committed. A git that kills its own shell ends the first publication half-way, and
    then Slurm puts the same job back."""
    subprocess.run(["dvc", "repro", "--quiet", "eval"], check=True)
    git("add", "--all")
    git("commit", "--quiet", "-m", "results")
    (checkout / "src/mine.py").write_text("new\n")
    git("add", "src/mine.py")
    (checkout / "dvc.yaml").write_text((checkout / "dvc.yaml").read_text() + "\n# not committed\n")
    real, tool = shutil.which("git"), checkout.parent / "tools/git"
    kills = f'[ "$1" = commit-tree ] && mkdir "$JOBS/killed" 2>/dev/null && kill -KILL $PPID\nexec {real} "$@"\n'
    tool.write_text(f"#!/bin/sh\n{kills}")
    tool.chmod(0o755)
    send("train", "train.lr=0.25,0.5", name="lr")
    assert all(log.endswith("exit 0") for log in jobs(checkout).values()), jobs(checkout)
    place = checkout / "sweeps/lr/1"
    for name in (".job-10001.committed", ".index"):
        (place / "slurm/logs" / name).unlink(missing_ok=True)
    environment = {
        "MOCO_SWEEP": str(checkout / "sweeps/lr"), "MOCO_SHARED": "data pretrain", "MOCO_PROFILE": "site.conf",
        "SLURM_ARRAY_TASK_ID": "1", "SLURM_JOB_ID": "10001", "SLURM_RESTART_COUNT": "1",
    }  # fmt: skip
    again = subprocess.run(
        ["slurm/launch", "train"], env={**os.environ, **environment}, capture_output=True, check=True
    )
    assert b"up to date" in again.stdout and (checkout.parent / "jobs/killed").exists()
    for name, lr in (("lr-1", 0.25), ("lr-2", 0.5)):
        commit = experiments()[name]
        assert made(commit, "train")["params"]["train"]["lr"] == lr
        assert yaml.safe_load(git("show", f"{commit}:params.yaml"))["train"]["lr"] == lr
        tree = git("ls-tree", "-r", "--name-only", commit).splitlines()
        assert "src/mine.py" in tree and "reports/pretrain/metrics.json" in tree
        assert "not committed" in git("show", f"{commit}:dvc.yaml")
        assert not [path for path in tree if path.startswith("reports/eval")], "of another classifier"
    shown = subprocess.run(["dvc", "exp", "show", "--csv"], capture_output=True, text=True, check=True).stdout
    assert [line.count("lr-") for line in shown.splitlines() if "lr-" in line] == [1, 1]
