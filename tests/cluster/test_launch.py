"""The launcher that every job runs, with a recorder in place of the container: what it does with signals, marks and
workspaces. Real jobs run in test_node.py."""

from __future__ import annotations

import os
import subprocess
import uuid
from pathlib import Path

import pytest
from launch_helpers import FRESH, IN_MOCO, SILENT, STALE, fake, launch, launch_project, outside, write_profile  # noqa: F401

from moco.cluster.profile import read_profile
from moco.cluster.slurm import outside_of_jobs
from moco.errors import UserError
from moco.tracking.origin import sif_identity

IDENTITY = uuid.UUID("00112233-4455-6677-8899-aabbccddeeff")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("IMGE=x\n", ("p.conf:1", "unknown key 'IMGE'", "did you mean 'IMAGE'")),
        ("\n\nIMAGE\n", ("p.conf:3", "KEY=value")),
        ("DATASET_MOUNT=overlaid\n", ("p.conf:1", "overlay")),
        ("#\nTIME='0:30:00'\n", ("p.conf:2", "TIME", "remove the quotation marks")),
        ('DATASET_MOUNT="bind"\n', ("p.conf:1", "DATASET_MOUNT", "remove the quotation marks")),
    ],
)
def test_a_wrong_profile_is_one_line_for_both_readers(project: Path, text: str, words: tuple[str, ...]) -> None:
    (project / "p.conf").write_text(text)
    with pytest.raises(UserError) as caught:
        read_profile(project / "p.conf")
    for word in words:
        assert word in str(caught.value)
    done = launch(project, "train", MOCO_PROFILE="p.conf")
    assert done.returncode == 1 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"IMAGE": "absent.sif"}, ("absent.sif: image not found", "IMAGE")),
        ({"DATASET": "absent.sqsh", "IMAGE": "dvc.yaml", "CONTAINER": "true"}, ("absent.sqsh", "DATASET")),
        ({"DATASET": "dvc.yaml", "IMAGE": "dvc.yaml", "CONTAINER": "true"}, ("not a squashfs image", "DATASET")),
        ({"DATASET": "slurm", "IMAGE": "dvc.yaml", "CONTAINER": "true"}, ("slurm: dataset image not found", "DATASET")),
        ({"DATASET": "/dev/null", "IMAGE": "dvc.yaml", "CONTAINER": "true"}, ("/dev/null", "DATASET")),
        ({"IMAGE": "dvc.yaml", "CONTAINER": "apptainerr"}, ("apptainerr: not found", "CONTAINER")),
        ({"DATASET": "a:b.sqsh", "IMAGE": "dvc.yaml", "CONTAINER": "true"}, ("a:b.sqsh", "comma or colon")),
        ({"LOCAL_TMP": "a,b", "IMAGE": "dvc.yaml", "CONTAINER": "true"}, ("a,b", "comma or colon")),
        ({"LOCAL_TMP": "/proc/nothing"}, ("/proc/nothing: cannot be written", "LOCAL_TMP")),
    ],
)
def test_a_job_that_cannot_run_says_why_in_one_line(
    project: Path, values: dict[str, str], words: tuple[str, ...]
) -> None:
    (project / "a,b").mkdir()
    (project / "a:b.sqsh").write_bytes(b"hsqs")
    done = launch(project, "train", MOCO_PROFILE=write_profile(project, **values))
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    for word in words:
        assert word in done.stderr


def test_the_container_command_quotes_nothing_twice(project: Path) -> None:
    """A recorder in place of apptainer: every word arrives whole, the dataset where the profile wants it."""
    image, dataset = project / "my image $1.sif", project / "data 'set'.sqsh"
    image.write_bytes(
        b"#!/usr/bin/env run-singularity\n\0" + b"SIF_MAGIC\0" + b"01\0" + b"02\0" + IDENTITY.bytes + bytes(64)
    )
    dataset.write_bytes(b"hsqs")
    fake(project, "recorder", '#!/bin/sh\nfor word; do printf "%s\\n" "$word"; done >>record; echo END >>record\n')
    path = f"{project / 'bin'}:{os.environ['PATH']}"
    for mount, wanted in (("overlay", ["--overlay", f"{dataset}:ro"]),
                          ("bind", ["--bind", f"{dataset}:/dataset:image-src=/dataset,ro"])):  # fmt: skip
        (project / "record").unlink(missing_ok=True)
        profile = write_profile(
            project, IMAGE=str(image), DATASET=str(dataset), DATASET_MOUNT=mount, CONTAINER="recorder",
            CONTAINER_OPTIONS="--nv --writable-tmpfs",
        )  # fmt: skip
        done = launch(project, "pretrain_continue", "runs/a b.pth", MOCO_PROFILE=profile, PATH=path)
        assert done.returncode == 0, done.stderr
        calls = [call.splitlines() for call in (project / "record").read_text().split("END\n")[:-1]]
        assert [call[call.index(str(image)) + 1 :] for call in calls] == [
            ["dvc", "repro", "--single-item", "data"],
            ["moco", "pretrain", "--resume", "runs/a b.pth"],
            ["dvc", "commit", "--force", "pretrain"],
        ]
        for call in calls:
            place = call.index(wanted[0], call.index("--pwd")) if mount == "overlay" else call.index(wanted[1]) - 1
            assert call[place : place + 2] == wanted
            assert f"MOCO_IMAGE_DIGEST=sif:{IDENTITY}" in call
            assert call[call.index(str(image)) - 2 : call.index(str(image))] == ["--nv", "--writable-tmpfs"]
    assert sif_identity(str(image)) == f"sif:{IDENTITY}", "as a run finds it that sees its image"
    assert sif_identity(str(dataset)) is sif_identity(None) is sif_identity(str(project)) is None


def test_a_password_reaches_the_container_but_not_the_list_of_processes(project: Path) -> None:
    fake(project, "recorder", '#!/bin/sh\necho "$@" >>record\nenv | grep ENV_MLFLOW >>record\n')
    fake(project, "singularity-ce", '#!/bin/sh\nexec recorder "$@"\n')
    path = f"{project / 'bin'}:{os.environ['PATH']}"
    for container, prefix in (("recorder", "APPTAINERENV"), ("singularity-ce", "SINGULARITYENV")):
        (project / "record").unlink(missing_ok=True)
        profile = write_profile(project, IMAGE="dvc.yaml", CONTAINER=container)
        launch(
            project, "pretrain", MOCO_PROFILE=profile, PATH=path, MLFLOW_TRACKING_PASSWORD="a secret",
            MLFLOW_TRACKING_URI="http://u:secret@h",
        )  # fmt: skip
        lines = (project / "record").read_text().splitlines()
        assert f"{prefix}_MLFLOW_TRACKING_PASSWORD=a secret" in lines
        assert f"{prefix}_MLFLOW_TRACKING_URI=http://u:secret@h" in lines
        assert [line for line in lines if "secret" in line and not line.startswith(prefix)] == []


def job(project: Path, stage: str, start: int, **environment: str) -> str:
    """One start of job 7, in which `recorder` does the work: scontrol and moco write down that they were called."""
    fake(project, "recorder", f'#!/bin/sh\n{STALE}echo "$@" >>record\neval "$WORK"\n')
    fake(project, "scontrol", f'#!/bin/sh\n{SILENT}echo "scontrol $@" >>record\nexit 1\n')
    profile = write_profile(project, IMAGE="dvc.yaml", CONTAINER="recorder")
    (project / "record").unlink(missing_ok=True)
    launch(
        project, stage, MOCO_PROFILE=profile, PATH=f"{project / 'bin'}:{os.environ['PATH']}", SLURM_JOB_ID="7",
        SLURM_RESTART_COUNT=str(start), **environment,
    )  # fmt: skip
    return (project / "record").read_text() if (project / "record").exists() else ""


def test_the_exit_code_of_the_stage_is_the_jobs(project: Path) -> None:
    fake(project, "recorder", f'#!/bin/sh\n{STALE}case "$*" in *"moco train"*) exit 9;; esac\n')
    profile = write_profile(project, IMAGE="dvc.yaml", CONTAINER=str(project / "bin/recorder"))
    assert launch(project, "train", MOCO_PROFILE=profile).returncode == 9


def test_what_a_job_has_finished_is_not_done_again_whatever_came_afterwards(project: Path) -> None:
    finishes = IN_MOCO + "echo 7 >runs/pretrain/k/done; exit 143;; esac"
    assert "dvc commit" in job(project, "pretrain", 0, WORK=finishes), "done, but ended by a signal at its very end"
    assert job(project, "pretrain", 1, WORK=finishes) == "", "committed: nothing at all"
    (project / "slurm/logs/.job-7.committed").unlink()
    again = job(project, "pretrain", 1, WORK="true")
    assert "moco pretrain" not in again and "dvc commit" in again
    assert "moco pretrain" in job(project, "pretrain", 0, WORK="true"), "another job of the same number"


def test_a_job_that_runs_out_of_time_goes_back_only_while_it_gets_on(project: Path) -> None:
    told = "kill -USR2 $PPID; sleep 0.3; exit 140;; esac"
    saves, idles = IN_MOCO + "touch runs/pretrain/k/checkpoint_001.pth; " + told, IN_MOCO + told
    back = "scontrol requeue 7"
    assert back in job(project, "pretrain", 0, WORK=saves)
    assert back in job(project, "pretrain", 1, WORK=idles), "this start may have gone into the cache"
    assert back not in job(project, "pretrain", 2, WORK=idles)
    assert back not in job(project, "train", 0, WORK='case "$*" in *"moco train"*) ' + told)


def test_a_copied_dataset_is_gone_afterwards(project: Path) -> None:
    (project / "d:1.sqsh").write_bytes(b"hsqs")  # the copy alone is mounted
    (project / "local").mkdir()
    fake(project, "recorder", "#!/bin/sh\nls local >>record\nexit 3\n")
    profile = write_profile(
        project, IMAGE="dvc.yaml", DATASET="d:1.sqsh", DATASET_COPY="yes", LOCAL_TMP=str(project / "local"),
        CONTAINER=str(project / "bin/recorder"),
    )  # fmt: skip
    done = launch(project, "train", MOCO_PROFILE=profile)
    assert done.returncode == 3, "the exit code of the stage is the job's"
    assert "moco-dataset-" in (project / "record").read_text()
    assert list((project / "local").iterdir()) == []


def test_a_stage_that_is_up_to_date_is_not_done_again(project: Path) -> None:
    fake(project, "recorder", f'#!/bin/sh\necho "$@" >>record\n{FRESH}')
    profile = write_profile(project, IMAGE="dvc.yaml", CONTAINER=str(project / "bin/recorder"))
    done = launch(project, "train", MOCO_PROFILE=profile)
    assert "train is up to date" in done.stdout and done.returncode == 0
    assert "moco train" not in (project / "record").read_text()
    launch(project, "eval", "--classifier", "models/finetuned", MOCO_PROFILE=profile)
    assert "moco eval --classifier models/finetuned" in (project / "record").read_text()


def test_on_several_gpus_srun_starts_one_torchrun_a_node_with_a_process_for_each(project: Path) -> None:
    fake(project, "srun", '#!/bin/sh\ncase "$*" in *torchrun*) echo "$@" >>spread;; esac\n')
    fake(project, "scontrol", "#!/bin/sh\nprintf 'first\\nsecond\\n'\n")
    work = {"WORK": "true", "SLURM_GPUS_ON_NODE": "4", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "nodes"}
    fake(project, "recorder", f"#!/bin/sh\n{STALE}")
    profile = write_profile(project, IMAGE="dvc.yaml", CONTAINER="recorder")
    path = f"{project / 'bin'}:{os.environ['PATH']}"
    launch(project, "pretrain", MOCO_PROFILE=profile, PATH=path, SLURM_JOB_ID="7", **work)
    (line,) = (project / "spread").read_text().splitlines()
    for words in ("--ntasks=2 --ntasks-per-node=1", "recorder", "torchrun --nnodes 2 --node-rank NODE_RANK",
                  "--nproc-per-node 4 --master-addr first", "--no-python moco pretrain"):  # fmt: skip
        assert words in line, line


def test_jobs_of_one_project_do_not_meet_at_dvcs_lock(project: Path) -> None:
    fake(
        project,
        "recorder",
        f"""#!/bin/sh
case "$*" in *" dvc "*) mkdir busy || echo clash >>clashes; sleep 0.2; rmdir busy;; esac
{STALE}""",
    )
    profile = write_profile(project, IMAGE="dvc.yaml", CONTAINER=str(project / "bin/recorder"))
    jobs = [
        subprocess.Popen(["slurm/launch", stage], cwd=project, env={**outside(), "MOCO_PROFILE": profile})
        for stage in ("train", "baseline", "pretrain")
    ]
    assert [job.wait() for job in jobs] == [0, 0, 0]
    assert not (project / "clashes").exists()


@pytest.mark.fault("environment")
def test_a_job_is_submitted_without_the_allocation_that_it_is_submitted_from() -> None:
    theirs = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_RESTART_COUNT": "1", "SLURM_GPUS_ON_NODE": "2",
              "CUDA_VISIBLE_DEVICES": "0,1", "SBATCH_CPU_BIND": "quiet"}  # fmt: skip
    ours = {
        "PATH": "/bin",
        "SBATCH_ACCOUNT": "mine",
        "SLURM_CONF": "/etc/slurm.conf",
        "MLFLOW_TRACKING_URI": "http://h",
    }
    assert outside_of_jobs({**theirs, **ours}) == ours
    login = {"CUDA_VISIBLE_DEVICES": "0", "SLURM_CPUS_PER_TASK": "2", **ours}
    assert outside_of_jobs(login) == login, "what a user sets on a login node is meant"
