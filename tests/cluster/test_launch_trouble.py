"""What the launcher does where others are in its way: DVC's lock, Slurm of other ages and rules, a signal too early."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from launch_helpers import IN_MOCO, SILENT, STALE, fake, launch, launch_project, outside, write_profile  # noqa: F401

LOCKED = 'echo "ERROR: Unable to acquire lock. Most likely another DVC process is running" >&2; exit 255'


def start(project: Path, *arguments: str, work: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """A start of job 7 with `work` in place of the image; waiting takes no time."""
    fake(project, "recorder", f'#!/bin/sh\necho "$@" >>record\n{work}\n{STALE}')
    fake(project, "sleep", '#!/bin/sh\n[ "$1" != 10 ] || echo slept >>record\n')
    profile = write_profile(project, IMAGE="dvc.yaml", CONTAINER="recorder")
    path = f"{project / 'bin'}:{os.environ['PATH']}"
    environment = {"MOCO_PROFILE": profile, "PATH": path, "SLURM_JOB_ID": "7", **environment}
    return launch(project, *arguments, **environment)


def record(project: Path) -> str:
    return (project / "record").read_text()


def test_what_arguments_change_is_not_recorded_as_dvcs_own_command(project: Path) -> None:
    assert start(project, "train", "--params", "other.yaml").returncode == 0
    assert "moco train --params other.yaml" in record(project) and "dvc commit" not in record(project)


def test_somebodys_dvc_is_waited_for_and_nothing_is_trained_twice(project: Path) -> None:
    twice = "[ -e twice ] || { [ ! -e once ] || touch twice; touch once; " + LOCKED + "; }"
    work = f'case "$*" in *"dvc commit"*) {twice};; esac'
    done = start(project, "train", work=work)
    assert done.returncode == 0 and done.stderr.count("another DVC is at work") == 1
    assert record(project).count("moco train") == 1 and record(project).count("slept") == 2
    assert record(project).count("dvc commit") == 3


def test_dvc_that_stays_locked_ends_the_job_and_nothing_counts_as_done(project: Path) -> None:
    for busy in ("dvc commit", " dvc "):
        (project / "record").unlink(missing_ok=True)
        done = start(project, "train", work=f'case "$*" in *"{busy}"*) {LOCKED};; esac')
        assert done.returncode != 0 and record(project).count("slept") == 59, "between sixty attempts"
        assert not (project / "slurm/logs/.job-7.committed").exists()
        assert ("moco train" in record(project)) == (busy == "dvc commit")
    assert not list((project / "slurm/logs").glob(".dvc-7")), "what DVC said is in the log, and nowhere else"


def test_a_stage_of_somebodys_dvc_that_is_at_work_is_waited_for_too(project: Path) -> None:
    busy = "ERROR: 'data.txt' is busy, it is being blocked by: (PID 1): dvc repro"
    done = start(project, "train", work=f'[ -e once ] || {{ touch once; echo "{busy}" >&2; exit 255; }}')
    assert done.returncode == 0 and record(project).count("slept") == 1
    assert busy in done.stderr, "as DVC says it, at once"


def test_a_stage_that_real_dvc_cannot_judge_is_not_trained(project: Path) -> None:
    """Its exit code is 1 then, as for one that is out of date where it is asked for codes."""
    dvc = Path(sys.executable).with_name("dvc")
    for command in (["git", "init", "--quiet"], [dvc, "init", "--quiet"]):
        subprocess.run(command, cwd=project, check=True, capture_output=True)
    work = f'case "$*" in *"dvc status"*) shift $(($# - 3)); exec {dvc} "$@";; esac'
    (project / "dvc.yaml").write_text("stages: {train: {cmd: 'true', deps: [site.conf]}}\n")
    assert start(project, "train", work=work).returncode == 0
    assert "moco train" in record(project), "never run, so not up to date"
    (project / "record").unlink()
    subprocess.run([dvc, "commit", "--force", "--quiet", "train"], cwd=project, check=True)
    done = start(project, "train", work=work)
    assert "train is up to date" in done.stdout and "moco train" not in record(project)
    (project / "record").unlink()
    (project / "dvc.lock").write_text("schema: '2.0'\nstages: [broken\n")
    done = start(project, "train", work=work)
    assert done.returncode != 0 and "dvc.lock" in done.stderr
    assert "moco train" not in record(project)


def test_where_slurm_does_not_put_a_job_back_the_log_says_what_to_do(project: Path) -> None:
    fake(project, "scontrol", "#!/bin/sh\necho 'Requeue is disabled' >&2; exit 1\n")
    work = IN_MOCO + "touch runs/pretrain/k/checkpoint_001.pth; kill -USR2 $PPID; /bin/sleep 0.3; exit 140;; esac"
    done = start(project, "pretrain", work=work)
    assert done.returncode == 140 and "submit it again, it goes on from what is saved" in done.stdout


def test_a_signal_while_the_dataset_is_copied_puts_the_job_back(project: Path) -> None:
    (project / "d.sqsh").write_bytes(b"hsqs")
    fake(project, "cp", "#!/bin/sh\nkill -USR2 $PPID; /bin/sleep 0.3\n")
    fake(project, "scontrol", f'#!/bin/sh\n{SILENT}echo "scontrol $@" >>record\n')
    fake(project, "recorder", "#!/bin/sh\necho never >>record\n")
    fake(project, "sleep", "#!/bin/sh\n")
    (project / "local").mkdir()
    left = project / "local/moco-dataset-7-abcdef"
    left.mkdir()
    profile = write_profile(
        project, IMAGE="dvc.yaml", CONTAINER="recorder", DATASET="d.sqsh", DATASET_COPY="yes", LOCAL_TMP="local"
    )
    path = f"{project / 'bin'}:{os.environ['PATH']}"
    done = launch(project, "pretrain", MOCO_PROFILE=profile, PATH=path, SLURM_JOB_ID="7", SLURM_RESTART_COUNT="1")
    assert record(project) == "scontrol requeue 7\n", done.stderr
    assert list((project / "local").iterdir()) == [], "neither this copy nor that of a start that was killed"


def test_a_preemption_is_heard_of_with_older_slurm_too(project: Path) -> None:
    for known in ("", "--overlap"):
        fake(project, "srun", f'#!/bin/sh\ncase "$*" in --help) echo "{known}"; exit;; esac\necho "$@" >>srun-record\n')
        start(project, "train", work="while [ ! -e srun-record ]; do /bin/sleep 0.01; done")
        assert ("--overlap" in (project / "srun-record").read_text()) == bool(known)
        (project / "srun-record").unlink()


def test_gpus_are_counted_where_slurm_does_not_say_how_many(project: Path) -> None:
    fake(project, "srun", '#!/bin/sh\ncase "$*" in *torchrun*) echo "$@" >>spread;; esac\n')
    fake(project, "scontrol", "#!/bin/sh\necho first\n")
    start(project, "pretrain", SLURM_JOB_GPUS="0,1", SLURM_JOB_NODELIST="first")
    assert "--nproc-per-node 2" in (project / "spread").read_text()


def test_a_profile_from_windows_reads_the_same(project: Path) -> None:
    (project / "w.conf").write_bytes(b"IMAGE=dvc.yaml\r\nCONTAINER=true\r\n\r\n# x\r\n")
    assert launch(project, "train", MOCO_PROFILE="w.conf").returncode == 0


def test_a_path_that_no_container_can_mount_is_one_line(project: Path) -> None:
    other = project.rename(project.with_name("a,b"))
    done = launch(other, "train", MOCO_PROFILE=write_profile(other, IMAGE="dvc.yaml", CONTAINER="true"))
    assert done.returncode == 1 and "comma or colon" in done.stderr and done.stderr.count("\n") == 1


def test_modules_may_read_what_is_not_set(project: Path) -> None:
    profile = write_profile(project, MODULES="apptainer/1.3", IMAGE="dvc.yaml", CONTAINER="true")
    script = 'module() { echo "loads $2 $NEVER_SET"; }; export -f module; exec slurm/launch train'
    done = subprocess.run(
        ["bash", "-c", script], cwd=project, env={**outside(), "MOCO_PROFILE": profile}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0 and "loads apptainer/1.3" in done.stdout, done.stderr


def test_a_gpu_that_plain_sbatch_did_not_ask_for_is_missed_aloud(project: Path) -> None:
    profile = write_profile(project, GRES="gpu:1", IMAGE="dvc.yaml", CONTAINER="true")
    assert "sbatch --gres=gpu:1" in launch(project, "train", MOCO_PROFILE=profile).stdout
    assert "--gres" not in launch(project, "train", MOCO_PROFILE=profile, CUDA_VISIBLE_DEVICES="0").stdout


JOB = """JobId=7 JobName=gpu-test
   Requeue=1 Restarts={restarts} BatchFlag=1 Reboot=0 ExitCode=0:0
   Partition=gpu AllocNode:Sid=login:1
   NumNodes=1 NumCPUs=2 NumTasks={tasks} CPUs/Task=2 ReqB:S:C:T=0:0:*:*
   AllocTRES=cpu=2,node=1{gpus}
   Command=/home/me/gres=gpu/slurm/pretrain.sbatch
"""
THEIRS = {
    "SLURM_RESTART_COUNT": "2", "SLURM_GPUS_ON_NODE": "4", "SLURM_JOB_GPUS": "0,1,2,3",
    "CUDA_VISIBLE_DEVICES": "0,1,2,3",
    "SLURM_NTASKS": "4", "SLURM_CPUS_PER_TASK": "16", "SLURM_JOB_NODELIST": "first",
}  # fmt: skip


@pytest.mark.fault("environment", 7)
def test_numbers_of_the_allocation_that_a_job_was_submitted_from_are_not_believed(project: Path) -> None:
    """As plain sbatch passes them on; what Slurm says of the job itself counts, where it says something."""
    fake(project, "srun", '#!/bin/sh\ncase "$*" in *torchrun*) echo "$@" >>spread;; esac\n')

    def starts(answer: str) -> str:
        """Return what the stage and srun were started with."""
        (project / "job").write_text(answer)
        (project / "record").unlink(missing_ok=True)
        (project / "spread").unlink(missing_ok=True)
        shutil.rmtree(project / "slurm/logs", ignore_errors=True)
        fake(project, "scontrol", '#!/bin/sh\ncase "$*" in *"show job 7"*) cat job;; *hostnames*) echo first;; esac\n')
        said = start(project, "pretrain", work='echo "count ${SLURM_RESTART_COUNT:-}" >>record', **THEIRS)
        assert "start " in said.stdout, said.stderr
        spread = (project / "spread").read_text() if (project / "spread").exists() else ""
        return said.stdout + record(project) + spread

    alone = starts(JOB.format(restarts=0, tasks=1, gpus=""))
    assert "torchrun" not in alone and "moco pretrain" in alone
    assert "start 0," in alone and "CUDA_VISIBLE_DEVICES=0" not in alone.split("start 0,")[1]
    for name in THEIRS.keys() - {"SLURM_JOB_NODELIST"}:
        assert f"{name}={THEIRS[name]} is another allocation's" in alone, name
    assert "CUDA_VISIBLE_DEVICES=0,1,2,3 is another" in alone
    own = starts(JOB.format(restarts=2, tasks=4, gpus=",gres/gpu=4"))
    assert "--nproc-per-node 4" in own and "start 2," in own and "--cpus-per-task=2" in own
    unknown = starts("")
    assert "--nproc-per-node 4" in unknown and "another allocation" not in unknown, "Slurm does not say"


@pytest.mark.fault("environment")
def test_a_choice_of_gpus_is_kept_where_slurm_manages_none(project: Path) -> None:
    """The user's or the site's own; without it torch would take the first GPU, perhaps somebody else's."""
    (project / "job").write_text(JOB.format(restarts=0, tasks=1, gpus=""))
    fake(project, "scontrol", '#!/bin/sh\ncase "$*" in *"show job 7"*) cat job;; esac\n')
    start(project, "pretrain", work='echo "gpus ${CUDA_VISIBLE_DEVICES:-unset}" >>record', CUDA_VISIBLE_DEVICES="1")
    assert "gpus 1" in record(project)
