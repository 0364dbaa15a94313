"""A real one-node cluster for tests: Slurm, rootless Apptainer, an unprivileged user. It is made by a script beside
the checkout; without that script the tests that use it skip."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from conftest import ROOT, tiny_params

HPC = ROOT.parent / "shared/hpc/hpc"
MAKER = ROOT.parent / "shared/data/make_cifar10"
FILES = Path(os.environ.get("HPC_ROOT", "/var/tmp/hpc-node")) / "rootfs"  # the node's root, seen from here
BASE = "nvidia/cuda:11.1.1-cudnn8-devel-ubuntu18.04"
SITE = "/share/apps/images/cuda11.1-cudnn8-devel-ubuntu18.04.sif"  # the cluster's own base image
SIF, DATASET = "/share/apps/images/moco.sif", "/scratch/DL21SP/student_dataset.sqsh"
PROJECT = "/scratch/hpc/my project"
LIVE = ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "REQUEUED", "SIGNALING", "PREEMPTED", "STOPPED")


def needed() -> None:
    """Skips where there is no cluster or no engine; a failure where CI says that there must be."""
    if HPC.exists() and shutil.which("docker"):
        command = ["docker", "image", "inspect", BASE]
        if subprocess.run(command, capture_output=True, check=False).returncode == 0:
            return
    reason = "needs the one-node cluster beside the checkout, and a Docker engine with the base image"
    if os.environ.get("MOCO_NO_SKIP"):
        pytest.fail(reason)
    pytest.skip(reason)


def hpc(*command: str, check: bool = True) -> str:
    done = subprocess.run([str(HPC), *command], capture_output=True, text=True, check=False)
    if check:
        assert done.returncode == 0, f"{command}: {done.stdout[-3000:]}{done.stderr[-3000:]}"
    return done.stdout + done.stderr


def node(script: str, check: bool = True) -> str:
    """A script run on the node by its user, in the project's folder."""
    return hpc("exec", "bash", "-c", f"cd {shlex.quote(PROJECT)} && {script}", check=check)


def here(path: str) -> Path:
    """A file of the node, seen from here; relative ones are the project's."""
    return FILES / (f"{PROJECT}/{path}" if not path.startswith("/") else path).lstrip("/")


def write(path: str, text: str) -> None:
    here(path).write_text(text)
    hpc("root", "chown", "hpc:", path if path.startswith("/") else f"{PROJECT}/{path}")


def bring_project(checkout: Path) -> None:
    """A clone of this checkout with what is not committed, owned by the node's user, with small settings."""
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(checkout)], check=True)
    listed = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(listed, capture_output=True, text=True, check=True).stdout.split("\0"):
        if name and (ROOT / name).is_file():
            (checkout / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, checkout / name)
    params = tiny_params(data__source="squashfs", data__path="", data__mounted="/dataset", data__classes=10)
    params["pretrain"].update(width=8, batch_size=64, epochs=4, queue=256, splits=2)
    params["monitor"].update(holdout=0.1, neighbours=20, log_every=5)
    params["train"].update(epochs=30, batch_size=64, holdout=0.1)
    params["baseline"].update(epochs=4, batch_size=64)
    params["finetune"].update(epochs=3, batch_size=64, holdout=0.1)
    params["request"].update(budget=20, answers="people")
    params["train_extra"].update(labels="extra_labels.csv")
    params["eval"].update(batch_size=500)
    params["tracking"].update(uri="sqlite:///mlflow.db")
    params["runtime"].update(scratch="auto")
    (checkout / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    for words in (
        ["config", "user.name", "tests"], ["config", "user.email", "tests@example.org"], ["add", "--all"],
        ["commit", "--quiet", "--message", "as tested"],
    ):  # fmt: skip
        subprocess.run(["git", "-C", str(checkout), *words], check=True)
    hpc("root", "rm", "-rf", PROJECT)
    shutil.copytree(checkout, here(PROJECT), symlinks=True)
    hpc("root", "chown", "-R", "hpc:", PROJECT)


def bring_dataset(folder: Path) -> None:
    """Real photographs in the contract's form: 2,000 unlabelled, 500 labelled, 2,000 of 10,000 to measure on."""
    numbers = ["--labelled", "500", "--unlabelled", "2000", "--no-sqsh"]
    subprocess.run([sys.executable, str(MAKER), str(folder), *numbers], check=True)
    labels = torch.load(folder / "dataset/val_label_tensor.pt", weights_only=True)
    torch.save(labels[:2000].clone(), folder / "dataset/val_label_tensor.pt")
    for number in range(2000, len(labels)):
        (folder / f"dataset/val/{number}.png").unlink()
    here(DATASET).unlink(missing_ok=True)
    pack = ["mksquashfs", str(folder / "dataset"), str(here(DATASET)), "-keep-as-directory", "-all-root", "-quiet"]
    subprocess.run([*pack, "-no-progress"], check=True)
    shutil.copy(folder / "oracle_label_tensor.pt", here("/scratch/hpc"))  # every label of the pool


def build_sif(target: str, bootstrap: str, base: str, *options: str) -> None:
    """By the project's definition. Nothing is compressed: that would take most of the time."""
    words = [
        "apptainer", "build", "--force", "--mksquashfs-args", "-noI -noD -noF -noX", "--build-arg", "TORCH_INDEX=",
        "--build-arg", f"BOOTSTRAP={bootstrap}", "--build-arg", f"BASE={base}", *options, target, "apptainer.def",
    ]  # fmt: skip
    node(f"export APPTAINER_TMPDIR=/scratch/hpc APPTAINER_CACHEDIR=/scratch/hpc/.apptainer; {shlex.join(words)}")


def profile(name: str, **values: str) -> str:
    settings = {"IMAGE": SIF, "DATASET": DATASET, "PARTITION": "main", "CPUS": "1", "MEMORY": "4G", "TIME": "30:00"}
    write(name, "".join(f"{key}={value}\n" for key, value in {**settings, **values}.items()))
    return name


def sbatch(job: str, used: str, *options: str, arguments: tuple[str, ...] = ()) -> str:
    """By plain sbatch, as on a login node that has nothing but the checkout; returns the job's id."""
    words = ["sbatch", "--parsable", "--cpus-per-task=1", "--mem=4G", *options, f"slurm/{job}.sbatch", *arguments]
    return node(f"MOCO_PROFILE={shlex.quote(used)} {shlex.join(words)}").strip().splitlines()[-1].split(";")[0]


def state(job: str) -> str:
    return re.findall(r"JobState=(\w+)", hpc("exec", "scontrol", "show", "job", job))[0]


def log_of(job: str) -> str:
    return "".join(path.read_text() for path in here("slurm/logs").glob(f"*-{job}.log"))


def release(job: str) -> None:
    """Slurm lets a job that was put back wait for two minutes; tests do not."""
    hpc("root", "scontrol", "update", f"JobId={job}", "StartTime=now", check=False)


def wait_for(job: str, condition: Callable[[str], bool], seconds: float = 180) -> None:
    """Until the job's log is as wanted."""
    deadline = time.monotonic() + seconds
    while not condition(log := log_of(job)):
        now = state(job)
        ended = now not in LIVE and not condition(log_of(job))  # it may have written and ended in between
        assert time.monotonic() < deadline and not ended, f"job {job} is {now}: {log[-3000:]}"
        if now == "PENDING":
            release(job)
        time.sleep(0.5)


def trains(log: str) -> bool:
    """Whether the latest start of a pretraining job has come as far as its steps."""
    return "pretrain: 2000 images" in log.rpartition("launch: pretrain, job")[2]


def finish(job: str, seconds: float = 600) -> str:
    """Waits for the job; returns its log. Fails unless it completed."""
    deadline = time.monotonic() + seconds
    while (now := state(job)) in LIVE:
        assert time.monotonic() < deadline, f"job {job} is {now}: {log_of(job)[-3000:]}"
        time.sleep(1)
    assert now == "COMPLETED", f"{now}: {log_of(job)[-3000:]}"
    return log_of(job)


def preempt(job: str) -> None:
    """A short job of the partition that comes first takes the whole node."""
    words = ["sbatch", "--parsable", "--partition=high", "--cpus-per-task=2", "--output=/dev/null", "--wrap=true"]
    other = node(shlex.join(words)).strip().splitlines()[-1]
    deadline = time.monotonic() + 120
    while state(other) != "COMPLETED" or state(job) not in ("PENDING", "RUNNING"):
        assert time.monotonic() < deadline, f"job {job} was not preempted: {log_of(job)[-3000:]}"
        time.sleep(0.5)
