"""Jobs for Slurm: their text, which is a pure function of job and profile, and their submission."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import stat
import subprocess
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

from moco.cluster.profile import Profile
from moco.cluster.sweep import PARAMS, Sweep
from moco.cluster.workspaces import make
from moco.errors import Say, UserError
from moco.settings.reading import load, nearest
from moco.tracking.store import shared_uri

# Seconds before the time limit at which Slurm warns: enough to end a step and to write a checkpoint.
WARNING = 300
LOGS = Path("slurm/logs")
# How variables begin that Slurm sets in an allocation, and those among them that say how to reach Slurm itself.
OF_A_JOB = (
    "SLURM_", "SLURMD_", "SBATCH_CPU_BIND", "SBATCH_MEM_BIND", "SRUN_", "PMI_", "PMIX_", "CUDA_VISIBLE_DEVICES",
    "ROCR_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL",
)  # fmt: skip
OF_SLURM = ("SLURM_CONF", "SLURM_JWT", "SLURM_CLUSTERS", "SLURM_TIME_FORMAT")
TWO_GPUS = "_2gpu"  # a job of this ending is the stage before it, on two GPUs of one node
PIPELINE = ("pretrain", "train", "baseline", "finetune", "eval", "request", "train_extra", "eval_extra")
JOBS = (*PIPELINE, "pretrain_2gpu", "pretrain_continue")


def _directive(option: str, value: str) -> str:
    """Return an #SBATCH line. sbatch splits it as a shell would, so awkward values are quoted."""
    return f'#SBATCH {option}="{value}"' if shlex.quote(value) != value else f"#SBATCH {option}={value}"


def render(job: str, profile: Profile | None = None, profile_path: str = "", sweep: Sweep | None = None) -> str:
    """Return the script of a job.

    Without a profile it is the text of slurm/JOB.sbatch, which takes what sites decide from sbatch's command line and
    MOCO_PROFILE. With a sweep it is a job array.
    """
    lines = ["#!/bin/bash", f"#SBATCH --job-name=moco-{job}"]
    stage = job.removesuffix(TWO_GPUS)
    site = profile or Profile()
    wanted = {
        "--partition": site.partition, "--account": site.account, "--gres": site.gres if stage == job else "gpu:2",
        "--cpus-per-task": site.cpus, "--mem": site.memory, "--time": site.time,
    }  # fmt: skip
    lines += [_directive(option, value) for option, value in wanted.items() if value]
    if sweep is not None:
        lines += ["# One task for every combination of values.", f"#SBATCH --array=1-{len(sweep.tasks)}"]
    lines += [
        "# Preempted and requeued, a job appends to its log and continues from its checkpoint.",
        "#SBATCH --requeue",
        "#SBATCH --open-mode=append",
        f"#SBATCH --output={LOGS}/%x-{'%A_%a' if sweep else '%j'}.log",
        "# To this script alone, before the time limit; NCCL keeps USR1 for itself.",
        f"#SBATCH --signal=B:USR2@{WARNING}",
    ]
    exports = {"MOCO_PROFILE": profile_path}
    if sweep is not None:
        exports |= {"MOCO_SWEEP": str(sweep.folder), "MOCO_SHARED": " ".join(sweep.shared),
                    "MLFLOW_TRACKING_URI": shared_uri(sweep.config.tracking)}  # fmt: skip
    lines += [f"export {name}={shlex.quote(value)}" for name, value in exports.items() if value]
    return "\n".join([*lines, f'exec slurm/launch {stage} "$@"']) + "\n"


def command(options: Sequence[str], arguments: Sequence[str], after: str | None) -> list[str]:
    """Return the sbatch command, which reads the script from its standard input.

    options: for sbatch, they override the script's own. arguments: for the stage. after: what to wait for, as sbatch's
    --dependency takes it. A job that waits for one that fails is cancelled.
    """
    dependency = [f"--dependency={after}", "--kill-on-invalid-dep=yes"] if after else []
    return ["sbatch", "--parsable", *dependency, *options, "/dev/stdin", *arguments]


def check_job(name: str) -> None:
    """Raise UserError for a job that does not exist."""
    known = (*JOBS, "pipeline")
    if name not in known:
        raise UserError(f"no job '{name}'{nearest(name, known)}; known: {', '.join(known)}")


def submit(
    name: str, profile: Profile, profile_path: Path, say: Say, *, options: Sequence[str] = (),
    arguments: Sequence[str] = (), dry_run: bool = False, sweep: Sweep | None = None,
) -> list[str]:  # fmt: skip
    """Submit a job, or the pipeline as jobs that wait for each other, and return their ids.

    Of a sweep, the stages that are the same in every task come first, and run once. Then each task waits for its own
    part of the array before.

    Raises UserError where image or dataset are missing, there is no sbatch, or Slurm refuses.
    """
    check_job(name)
    _check_time(name, profile, profile_path, options)
    _check_arguments(name, arguments, sweep)
    jobs = _pipeline(sweep) if name == "pipeline" else (name,)
    if arguments and len(jobs) > 1:
        raise UserError("arguments for a stage need one stage, not the pipeline")
    path = str(profile_path if sweep is None else profile_path.absolute())
    once = [(job, None) for job in jobs if sweep is None or (len(jobs) > 1 and job not in sweep.varied)]
    arrays = [(job, sweep) for job in jobs if (job, None) not in once]
    texts = [(job, array, render(job, profile, path, array)) for job, array in [*once, *arrays]]
    if dry_run:
        say("\n".join(f"# {job}\n{text}" for job, _, text in texts))
        return []
    _check(profile, profile_path, say)
    made = make(sweep, say) if sweep is not None else False
    try:
        LOGS.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{LOGS}: cannot be made: {error.strerror}; jobs write their logs there") from None
    ids: list[str] = []
    before = None
    for job, array, text in texts:
        after = f"{'aftercorr' if array and before else 'afterok'}:{ids[-1]}" if ids else None
        try:
            ids.append(_sbatch(command(options, arguments, after), text, job))
        except UserError as error:
            if sweep is not None and made and not ids:
                shutil.rmtree(sweep.folder, ignore_errors=True)
            raise _cancelled(ids, error) from None
        before = array
        log = LOGS / f"moco-{job}-{ids[-1]}{'_*' if array else ''}.log"
        say(f"{job}: job {ids[-1]}{f'_[1-{len(array.tasks)}]' if array else ''}, log {log}")
    return ids


def _pipeline(sweep: Sweep | None) -> tuple[str, ...]:
    """Return the jobs of the pipeline, each after those that it needs.

    Fine-tuning waits for labels only where it uses them. Raises UserError where params.yaml, which decides that without
    a sweep, is wrong.
    """
    configs = [load(PARAMS)] if sweep is None else [task.config for task in sweep.tasks]
    if all(config.finetune.classifier == "classifier" for config in configs):
        return PIPELINE
    return (*(job for job in PIPELINE if job != "finetune"), "finetune")


def _cancelled(ids: Sequence[str], error: UserError) -> UserError:
    """Cancel the jobs that were submitted before the one that Slurm refused.

    Returns the error with what became of those jobs. Half a pipeline is of no use.
    """
    if not ids:
        return error
    try:
        code = subprocess.run(["scancel", *ids], capture_output=True, check=False).returncode
    except FileNotFoundError:
        code = 127
    said = "cancelled" if code == 0 else f"still there (scancel ended with {code})"
    return UserError(f"{error}; the jobs before it are {said}: {', '.join(ids)}")


def minutes(limit: str) -> float | None:
    """Return the minutes of a time limit; None where the text is none.

    The formats are those of sbatch: minutes, M:S, H:M:S, D-H, D-H:M or D-H:M:S.
    """
    found = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", limit.strip())
    if found is None:
        return None
    days, *rest = found.groups()
    parts = [int(part) for part in rest if part is not None]
    if days is not None:
        hours, mins, seconds = [*parts, 0, 0][:3]
    elif len(parts) == 3:
        hours, mins, seconds = parts
    else:
        hours, mins, seconds = 0, *[*parts, 0][:2]
    return int(days or 0) * 1440 + hours * 60 + mins + seconds / 60


def _check_time(job: str, profile: Profile, path: Path, options: Sequence[str]) -> None:
    """Raise UserError where the time limit of a job that keeps a state is too short.

    Such a job is warned WARNING seconds before its end. A limit close to that would send the job back to the queue as
    soon as it starts.
    """
    options = [re.sub("^-t=?(?=.)", "--time=", option) for option in options]
    words = [word for option in options for word in option.split("=", 1)]
    if "--signal" in words or not job.startswith(("pretrain", "finetune", "pipeline")):
        return
    given = dict(pairwise(words))
    own = given.get("--time", given.get("-t"))
    limit, place = (profile.time, f"{path}: TIME") if own is None else (own, "--time")
    length = minutes(limit)
    if length is not None and 0 < length * 60 < 2 * WARNING:
        raise UserError(
            f"{place}: {limit} is too short: jobs are told {WARNING // 60} minutes before their end to save and "
            f"go back into the queue; at least {2 * WARNING // 60} minutes, or --option=--signal=B:USR2@SECONDS"
        )


def _check_arguments(job: str, arguments: Sequence[str], sweep: Sweep | None) -> None:
    if sweep is not None and any(word.split("=")[0] == "--params" for word in arguments):
        raise UserError("--params: a task of a sweep has its own params.yaml; put the values there")
    if job == "pretrain_continue" and sweep is None:
        missing = [word for word in arguments if not word.startswith("-") and not Path(word).is_file()]
        if missing:
            raise UserError(f"{missing[0]}: checkpoint not found; without one the run of these settings continues")


def _check(profile: Profile, path: Path, say: Say) -> None:
    if shutil.which("sbatch") is None:
        raise UserError("sbatch: not found; submit from a login node of the cluster, outside of any container")
    if not Path("dvc.yaml").is_file():
        raise UserError(f"{Path.cwd()}: no dvc.yaml here; submit from the project's folder")
    for key, value in (("IMAGE", profile.image), ("DATASET", profile.dataset)):
        try:
            if value and not stat.S_ISREG(Path(value).stat().st_mode):
                raise UserError(f"{path}: {key}: {value} is no file")
        except OSError as error:
            reason = "not found" if isinstance(error, FileNotFoundError) else f"cannot be read: {error.strerror}"
            raise UserError(f"{path}: {key}: {value} {reason}") from None
    if "gpu" in profile.gres and profile.image and not re.search(r"--(nv|nvccli|rocm)\b", profile.container_options):
        say(f"warning: {path}: GRES asks for GPUs, and CONTAINER_OPTIONS has no --nv: the image would not see them")


def outside_of_jobs(environment: Mapping[str, str]) -> dict[str, str]:
    """Return an environment without the allocation that this process may run in.

    sbatch would take its numbers of tasks and processors for the new job's, and the job its GPUs and restarts for its
    own."""
    inside = "SLURM_JOB_ID" in environment
    return {
        name: value for name, value in environment.items()
        if not inside or name in OF_SLURM or not name.startswith(OF_A_JOB)
    }  # fmt: skip


def _sbatch(arguments: list[str], text: str, job: str) -> str:
    """Submit a job and return its id. The id stands on a line of its own, since some sites' sbatch prints more."""
    done = subprocess.run(
        arguments, input=text, capture_output=True, text=True, check=False, env=outside_of_jobs(os.environ)
    )
    if done.returncode != 0:
        reason = "; ".join(line.strip() for line in done.stderr.splitlines() if line.strip())
        raise UserError(f"{job}: Slurm refuses the job: {reason or f'exit code {done.returncode}'}")
    found = [line.split(";")[0] for line in done.stdout.splitlines() if re.fullmatch(r"\d+(;\S+)?", line.strip())]
    if not found:
        said = " ".join((done.stdout + done.stderr).split())[:200]
        raise UserError(f"{job}: sbatch named no job, so none waits; it said: {said or 'nothing'}")
    return found[-1]
