"""Jobs on a real one-node cluster: Slurm, rootless Apptainer, an unprivileged user, real photographs."""

from __future__ import annotations

import csv
import json
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from node_helpers import (
    BASE,
    DATASET,
    FILES,
    HPC,
    PROJECT,
    SIF,
    SITE,
    bring_dataset,
    bring_project,
    build_sif,
    finish,
    here,
    hpc,
    needed,
    node,
    preempt,
    profile,
    sbatch,
    trains,
    wait_for,
    write,
)  # fmt: skip

from conftest import ROOT
from moco.cluster.slurm import PIPELINE

pytestmark = [
    pytest.mark.slow, pytest.mark.cluster, pytest.mark.timeout(1200),
    pytest.mark.filterwarnings("default"),  # MLflow and SQLAlchemy deprecate things among themselves
]  # fmt: skip
BARE = f'apptainer exec --containall --cleanenv --bind "$PWD:/project" --pwd /project --overlay {DATASET}:ro'
# The site's own certificates; nothing but what a login node needs.
INSTALL = "SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt make --silent TORCH=none install"
STEPS_PER_EPOCH, LOG_EVERY = 2000 // 64, 5


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The node with a SIF made from the site's own base image, a dataset, and a checkout of what is here."""
    needed()
    hpc("up")
    bring_project(tmp_path_factory.mktemp("node") / "project")
    bring_dataset(tmp_path_factory.mktemp("images"))
    try:
        build_sif(SIF, "localimage", SITE)
        yield
    finally:
        node(f"rm -f {SIF}")  # 6 GB, made anew by every run


def settings(uri: str = "sqlite:///mlflow.db", **pretrain: object) -> None:
    params = yaml.safe_load(here("params.yaml").read_text())
    params["pretrain"].update(pretrain)
    params["tracking"]["uri"] = uri
    write("params.yaml", yaml.safe_dump(params, sort_keys=False))


def changed_stages(status: str) -> list[str]:
    """Return the stages that `dvc status` lists."""
    return re.findall(r"^([\w-]+):$", status, re.MULTILINE)


def test_the_sif_tests_itself_and_its_packages_are_those_of_the_lock(cluster: None) -> None:
    assert "loss" in node(f"apptainer test {SIF}")
    versions = node(f"apptainer exec {SIF} python -c 'import torch, dvc; print(torch.__version__, dvc.__version__)'")
    torch_version, dvc_version = versions.split()[:2]
    assert torch_version.startswith("2.6.0") and f"dvc=={dvc_version} " in here("requirements/image.txt").read_text()


def test_from_a_docker_archive_and_again_from_the_result_with_other_sources(cluster: None) -> None:
    """With the first step alone, which needs no big download."""
    first, second = "/scratch/hpc/first.sif", "/scratch/hpc/second.sif"
    archive, options = here("/scratch/base.tar"), ("--notest", "--build-arg", "STEPS=system")
    source = "src/moco/errors.py"
    before = here(source).read_text()
    subprocess.run(["docker", "save", BASE, "--output", str(archive)], check=True)
    archive.chmod(0o644)
    try:
        build_sif(first, "docker-archive", "/scratch/base.tar", *options)
        assert "squashfuse" in node(f"apptainer exec {first} sh -c 'command -v squashfuse'")
        write(source, before + "TOUCHED = True\n")
        build_sif(second, "localimage", first, *options)
        assert "TOUCHED" in node(f"apptainer exec {second} tail -n 1 /opt/moco-build/{source}")
    finally:
        archive.unlink()
        write(source, before)
        node(f"rm -f {first} {second}")


def test_exec_and_run_work_contained_and_with_an_overlay(cluster: None) -> None:
    """The whole pipeline, then parts of it."""
    assert "usage" in node(f"apptainer run {SIF} --help").lower()
    settings(epochs=1, uri="")
    write("extra_labels.csv", extra_labels())
    said = node(f"{BARE} {SIF} dvc repro")
    assert "2000 unlabeled, 500 train, 2000 val images of 32x32 pixels" in said and "eval: top-1" in said
    assert changed_stages(node(f"{BARE} {SIF} dvc status")) == ["data"]  # which is always looked at
    assert "FAIL" not in node(f"{BARE} {SIF} moco doctor")
    run = BARE.replace(" exec ", " run ")
    assert "top-1" in node(f"{run} {SIF} eval --classifier models/finetuned")
    node("rm -rf runs models reports dvc.lock")  # the jobs below begin anew


def test_nothing_of_the_login_shell_or_its_modules_leaks_in(cluster: None) -> None:
    node("mkdir -p /scratch/hpc/leak && echo 'raise SystemExit(9)' >/scratch/hpc/leak/torch.py")
    leaks = "SHELL=/bin/no-such-shell PYTHONPATH=/scratch/hpc/leak PYTHONHOME=/nowhere LC_ALL=xx_XX.latin1"
    bare = BARE.replace(" --cleanenv", " --bind /scratch/hpc")
    assert "Running stage 'data'" in node(f"{leaks} {bare} {SIF} dvc repro --force data")


def test_an_image_is_carried_to_the_cluster_and_made_a_sif_there(cluster: None, tmp_path: Path) -> None:
    """The base image, which is small; ssh and scp are stand-ins that reach the node as its user."""
    for tool, script in {
        "ssh": 'shift; exec "$HPC" exec bash -c "cd; $*"',
        "scp": 'to="$FILES/home/hpc/${2#*:}"; cp "$1" "$to" && "$HPC" root chown hpc: "/home/hpc/${2#*:}"',
    }.items():
        (tmp_path / tool).write_text(f"#!/bin/sh\nset -eu\nHPC={shlex.quote(str(HPC))} FILES={FILES}\n{script}\n")
        (tmp_path / tool).chmod(0o755)
    moco = [shutil.which("moco") or "moco", "image", "push-sif", "--tag", BASE]
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}

    target = "me@login:~/carried one.sif"
    done = subprocess.run([*moco, target], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "exec moco" in node("apptainer inspect --runscript ~/'carried one.sif'")
    assert "moco doctor --step" in node("apptainer inspect --test ~/'carried one.sif'")
    assert node("cd; ls | grep carried").split("\n")[0] == "carried one.sif"
    assert len(node("cd; ls | grep carried").splitlines()) == 1, "what was sent is gone"
    node("rm ~/'carried one.sif'")


def submit(*words: str) -> dict[str, str]:
    """By the command, on the node, where it is installed without torch; returns the jobs' ids."""
    said = node(f"{INSTALL} && .venv/bin/moco slurm submit {shlex.join(words)}")
    return dict(re.findall(r"^(\w+): job (\d+)", said, re.MULTILINE))


def test_all_jobs_run_in_the_sif_and_end_in_accuracies(cluster: None) -> None:
    """Some by plain sbatch, most as the pipeline, whose first stage is up to date by then."""
    settings(epochs=2, uri="")  # MLflow takes seconds of every job; those below have it
    write("extra_labels.csv", extra_labels())
    used = profile("copy.conf", DATASET_COPY="yes", DATASET_MOUNT="overlay", LOCAL_TMP="/tmp")
    assert "copying" in finish(sbatch("pretrain", used, "--time=10"))
    settings(epochs=4, uri="")
    (checkpoint,) = here("runs/pretrain").glob("*/checkpoint_001.pth")
    named = str(checkpoint.relative_to(here(PROJECT)))
    assert f"continuing from {named}" in finish(sbatch("pretrain_continue", used, "--time=10", arguments=(named,)))
    jobs = submit("pipeline", "--profile", used)
    assert list(jobs) == list(PIPELINE)
    logs = {job: finish(number) for job, number in jobs.items()}
    assert "pretrain is up to date" in logs["pretrain"] and "pretrain: encoder" not in logs["pretrain"]
    assert "train_extra: 500 labels added to 500" in logs["train_extra"]
    assert "request: 20 images by maxherding" in logs["request"]
    assert "eval: top-1" in logs["eval"]
    for stage in ("train", "train_extra", "finetune", "eval", "eval-classifier_extra"):
        measured = json.loads(here(f"reports/{stage}/metrics.json").read_text())
        assert 0.15 < measured["val_accuracy"] < 1, f"{stage}: {measured}"
    assert changed_stages(node(f"{BARE} {SIF} dvc status")) == ["data"]  # which is always looked at
    assert not list(here("/tmp").glob("moco-dataset-*")), "the copy is gone with its job"
    identity = re.search(r"ID:\s+(\S+)", node(f"apptainer sif header {SIF}"))
    assert identity is not None
    for log in here("runs").glob("*/*/metrics.jsonl"):
        assert f'"image_digest": "sif:{identity[1]}"' in log.read_text(), log


def test_a_sweep_ends_in_one_experiment_a_task(cluster: None) -> None:
    node("rm -rf sweeps")
    settings()
    jobs = submit("train", "--profile", profile("bind.conf"), "--sweep", "train.lr=0.5,5", "--name", "lr")
    for task in (1, 2):
        finish(f"{jobs['train']}_{task}")
    rows = list(csv.DictReader(node(".venv/bin/dvc exp show --csv 2>/dev/null").splitlines()))
    found = {row["Experiment"]: row for row in rows if row["Experiment"]}
    assert {name: float(row["train.lr"]) for name, row in found.items()} == {"lr-1": 0.5, "lr-2": 5.0}
    runs = {run.data.tags.get("dvc_experiment"): run for run in mlflow_runs("train%")}
    for task in (1, 2):
        measured = json.loads(here(f"sweeps/lr/{task}/reports/train/metrics.json").read_text())["val_accuracy"]
        assert 0.15 < measured < 1
        assert str(measured) in found[f"lr-{task}"].values()
        assert runs[f"lr-{task}"].data.metrics["val_accuracy"] == measured
    node(".venv/bin/dvc exp apply lr-2")
    model = "models/classifier/model_sub.pth"
    assert here(model).read_bytes() == here(f"sweeps/lr/2/{model}").read_bytes()


def extra_labels() -> str:
    """True labels of images of the pool that are not in train, whose images are the pool's first 500."""
    labels = torch.load(here("/scratch/hpc/oracle_label_tensor.pt"), weights_only=True)
    return "image,label\n" + "".join(f"{row}.png,{labels[row]}\n" for row in range(500, 1000))


def undisturbed() -> Callable[[], bytes]:
    """Starts the same pretraining beside the jobs, in a checkout of its own; returns what waits for its encoder."""
    aside = f"{PROJECT} undisturbed"
    hpc("root", "rm", "-rf", aside)
    shutil.copytree(here(PROJECT), here(aside), symlinks=True)
    shutil.rmtree(here(f"{aside}/runs"), ignore_errors=True)
    hpc("root", "chown", "-R", "hpc:", aside)
    inside = f'apptainer exec --bind "$PWD" --pwd "$PWD" --overlay {DATASET}:ro {SIF}'
    script = f"cd {shlex.quote(aside)} && {inside} sh -c 'moco data && moco pretrain'"
    running = subprocess.Popen([str(HPC), "exec", "bash", "-c", script], stderr=subprocess.PIPE)

    def encoder() -> bytes:
        _, errors = running.communicate(timeout=600)
        assert running.returncode == 0, errors
        return here(f"{aside}/models/encoder.pth").read_bytes()

    return encoder


def test_preempted_three_times_and_out_of_time_once_the_weights_are_those_of_an_undisturbed_run(cluster: None) -> None:
    epochs = 36
    settings(epochs=epochs)
    node("rm -rf runs/pretrain models/encoder.pth")
    reference = undisturbed()
    job = sbatch("pretrain", profile("bind.conf"), "--time=1", "--signal=B:USR2@10")
    wait_for(job, lambda log: "back into the queue" in log)
    hpc("root", "scontrol", "update", f"JobId={job}", "TimeLimit=10")
    for start in (1, 2, 3):
        wait_for(job, lambda log, start=start: f", start {start}," in log and trains(log))
        preempt(job)
    wait_for(job, lambda log: ", start 4," in log)
    log = finish(job)
    assert log.count("stopped by SIGTERM; the state is saved") == 3, log
    assert here("models/encoder.pth").read_bytes() == reference()
    assert "up to date" in node(f"{BARE} {SIF} dvc status pretrain")
    (run_folder,) = here("runs/pretrain").iterdir()
    steps = epochs * STEPS_PER_EPOCH
    assert logged_steps(f"pretrain-{run_folder.name}") == [*range(LOG_EVERY, steps, LOG_EVERY), steps]

    hpc("exec", "scontrol", "requeue", job)  # as Slurm does with a job that was preempted in its last seconds
    wait_for(job, lambda log: "was done before; nothing to do" in log)
    assert len(list(here("runs/pretrain").iterdir())) == 1, "what is done is not done again"


def mlflow_runs(name: str) -> list[Any]:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{here('mlflow.db')}")
    (experiment,) = [found.experiment_id for found in client.search_experiments() if found.name != "Default"]
    return list(client.search_runs([experiment], f"attributes.run_name LIKE '{name}'"))


def logged_steps(name: str) -> list[int]:
    """Of the loss in MLflow, where there must be one run of that name alone."""
    from mlflow.tracking import MlflowClient

    (run,) = mlflow_runs(name)
    assert run.info.status == "FINISHED"
    history = MlflowClient(f"sqlite:///{here('mlflow.db')}").get_metric_history(run.info.run_id, "loss")
    return [point.step for point in history]


def test_two_tasks_share_one_pretraining(cluster: None) -> None:
    settings(epochs=3, uri="")
    node("rm -rf runs/pretrain models/encoder.pth")
    log = finish(sbatch("pretrain", profile("two.conf"), "--time=10", "--ntasks=2"))
    assert "2 processes" in log, log
    assert here("models/encoder.pth").is_file()
    assert len(list(here("runs/pretrain").iterdir())) == 1
    assert "up to date" in node(f"{BARE} {SIF} dvc status pretrain")
