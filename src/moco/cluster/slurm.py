"""Jobs for Slurm: their text, which is a pure function of job and profile, and their submission."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from moco.cluster.profile import Profile
from moco.errors import Say, UserError
from moco.params import nearest

# Seconds before the time limit at which Slurm warns: enough to end a step and to write a checkpoint.
WARNING = 300
LOGS = Path("slurm/logs")
PIPELINE = ("pretrain", "train", "baseline", "finetune", "eval")
JOBS = ("pretrain", "pretrain_continue", "train", "train_extra", "baseline", "finetune", "eval")


def _directive(option: str, value: str) -> str:
    """An #SBATCH line. sbatch splits it as a shell would, so awkward values are quoted."""
    return f'#SBATCH {option}="{value}"' if shlex.quote(value) != value else f"#SBATCH {option}={value}"


def render(job: str, profile: Profile | None = None, profile_path: str = "") -> str:
    """The script of a job. Without a profile: the text of slurm/JOB.sbatch, which takes what sites decide from
    sbatch's command line and MOCO_PROFILE."""
    lines = ["#!/bin/bash", f"#SBATCH --job-name=moco-{job}"]
    if profile is not None:
        wanted = {
            "--partition": profile.partition, "--account": profile.account, "--gres": profile.gres,
            "--cpus-per-task": profile.cpus, "--mem": profile.memory, "--time": profile.time,
        }  # fmt: skip
        lines += [_directive(option, value) for option, value in wanted.items() if value]
    lines += [
        "# Preempted and requeued, a job appends to its log and continues from its checkpoint.",
        "#SBATCH --requeue",
        "#SBATCH --open-mode=append",
        f"#SBATCH --output={LOGS}/%x-%j.log",
        "# To this script alone, before the time limit; NCCL keeps USR1 for itself.",
        f"#SBATCH --signal=B:USR2@{WARNING}",
    ]
    if profile_path:
        lines.append(f"export MOCO_PROFILE={shlex.quote(profile_path)}")
    return "\n".join([*lines, f'exec slurm/launch {job} "$@"']) + "\n"


def command(options: Sequence[str], arguments: Sequence[str], after: str | None) -> list[str]:
    """sbatch with the script on its standard input. options: for sbatch, they win over the script's own;
    arguments: for the stage; after: id of the job to wait for."""
    dependency = [f"--dependency=afterok:{after}"] if after else []
    return ["sbatch", "--parsable", *dependency, *options, "/dev/stdin", *arguments]


def check_job(name: str) -> None:
    """Raises UserError for a job that does not exist."""
    known = (*JOBS, "pipeline")
    if name not in known:
        raise UserError(f"no job '{name}'{nearest(name, known)}; known: {', '.join(known)}")


def submit(
    name: str, profile: Profile, profile_path: Path, say: Say, *, options: Sequence[str] = (),
    arguments: Sequence[str] = (), dry_run: bool = False,
) -> list[str]:  # fmt: skip
    """Submits a job, or the pipeline as jobs that wait for each other; returns their ids.

    Raises UserError where image or dataset are missing, there is no sbatch, or Slurm refuses.
    """
    check_job(name)
    jobs = PIPELINE if name == "pipeline" else (name,)
    if arguments and len(jobs) > 1:
        raise UserError("arguments for a stage need one stage, not the pipeline")
    texts = {job: render(job, profile, str(profile_path)) for job in jobs}
    if dry_run:
        say("\n".join(f"# {job}\n{text}" for job, text in texts.items()))
        return []
    _check(profile, profile_path)
    LOGS.mkdir(parents=True, exist_ok=True)
    ids: list[str] = []
    for job, text in texts.items():
        ids.append(_sbatch(command(options, arguments, ids[-1] if ids else None), text, job))
        say(f"{job}: job {ids[-1]}, log {LOGS / f'moco-{job}-{ids[-1]}.log'}")
    return ids


def _check(profile: Profile, path: Path) -> None:
    if shutil.which("sbatch") is None:
        raise UserError("sbatch: not found; submit from a login node of the cluster, outside of any container")
    if not Path("dvc.yaml").is_file():
        raise UserError(f"{Path.cwd()}: no dvc.yaml here; submit from the project's folder")
    for key, value in (("IMAGE", profile.image), ("DATASET", profile.dataset)):
        if value and not Path(value).is_file():
            raise UserError(f"{path}: {key}: {value} not found")


def _sbatch(arguments: list[str], text: str, job: str) -> str:
    done = subprocess.run(arguments, input=text, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise UserError(f"{job}: Slurm refuses the job: {reason}")
    return done.stdout.strip().split(";")[0]
