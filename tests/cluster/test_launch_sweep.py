"""The launcher in a task of a sweep: its workspace, what it takes from the project and what it leaves there. With a
recorder in place of the container; real git and DVC are in test_sweep_run.py, real jobs in test_node.py."""

from __future__ import annotations

import fcntl
import os
import subprocess
from pathlib import Path

import pytest
from launch_helpers import IN_MOCO, STALE, fake, launch, launch_project, outside, write_profile  # noqa: F401


def task(project: Path, work: str, **environment: str) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """One start of task 2 of array 40, and what it runs. STAGE: with its arguments; FRESH: what DVC finds unchanged."""
    fake(
        project,
        "recorder",
        """#!/bin/sh
echo "$@" | tr '\\n' ' ' >>record; echo >>record
case "$*" in *"dvc status --json $FRESH"*) echo '{}'; exit 0;; *"dvc status"*) echo '{"x": []}'; exit 0;; esac
eval "$WORK"
""",
    )
    fake(project, "scontrol", '#!/bin/sh\necho "scontrol $@" >>record\nexit 1\n')
    place = {"MOCO_SWEEP": str(project / "sweeps/lr"), "MOCO_SHARED": "data pretrain", "SLURM_ARRAY_JOB_ID": "40",
             "SLURM_ARRAY_TASK_ID": "2", "SLURM_JOB_ID": "7", "FRESH": "nothing", "STAGE": "train"}  # fmt: skip
    place |= {"PATH": f"{project / 'bin'}:{os.environ['PATH']}", "WORK": work, **environment}
    (project / "sweeps/lr/2").mkdir(parents=True, exist_ok=True)
    done = launch(
        project,
        *place["STAGE"].split(),
        MOCO_PROFILE=write_profile(project, IMAGE="dvc.yaml", CONTAINER="recorder"),
        **place,
    )
    record = project / "sweeps/lr/2/record"
    lines = record.read_text().splitlines() if record.exists() else []
    record.unlink(missing_ok=True)
    return done, lines


def test_a_task_of_a_sweep_works_in_its_folder_and_leaves_an_experiment(project: Path) -> None:
    (project / "dvc.lock").write_text("of the project\n")
    for stage in ("pretrain", "train"):
        (project / "reports" / stage).mkdir(parents=True)
    place = project / "sweeps/lr/2"
    work = 'echo "$APPTAINERENV_MLFLOW_TRACKING_URI" >>stores'
    _, lines = task(project, work, MLFLOW_TRACKING_URI="sqlite:////store.db", FRESH="data pretrain")
    assert [line.partition("dvc.yaml ")[2].rstrip() for line in lines[:-1]] == [
        "dvc checkout --allow-missing --force data pretrain",
        "dvc repro --single-item data",
        "dvc status --json data pretrain",
        "dvc status --json train",
        "moco train",
        "dvc commit --force train",
    ]
    assert "git push" in lines[-1] and lines[-1].rstrip().endswith("publish lr-2")
    for line in lines:
        for word in (f"--bind {project}:{project}", f"--pwd {place}", "DVC_EXP_NAME=lr-2"):
            assert word in line
    assert set((place / "stores").read_text().splitlines()) == {"sqlite:////store.db"}
    assert (place / "dvc.lock").read_text() == "of the project\n"
    assert [path.name for path in (place / "reports").iterdir()] == ["pretrain"], "train's are another's"
    assert "checkout" not in "".join(task(project, "true", STAGE="eval")[1]), "once for a workspace"


def test_without_an_image_a_task_has_the_name_of_its_experiment(project: Path) -> None:
    (project / "sweeps/lr/2").mkdir(parents=True)
    fake(project, "dvc", '#!/bin/sh\n[ $1 != status ] || echo "{\\"train\\": []}"\n')
    fake(project, "git", "#!/bin/sh\n")
    fake(project, "moco", '#!/bin/sh\necho "$DVC_EXP_NAME" >>record\n')
    (project / "bare.conf").touch()
    path = f"{project / 'bin'}:{os.environ['PATH']}"
    place = {
        "MOCO_SWEEP": str(project / "sweeps/lr"),
        "SLURM_ARRAY_TASK_ID": "2",
        "MOCO_PROFILE": str(project / "bare.conf"),
    }
    launch(project, "train", PATH=path, **place)
    assert (project / "sweeps/lr/2/record").read_text() == "lr-2\n"


def test_a_task_without_the_results_that_it_builds_on_says_so_and_does_nothing(project: Path) -> None:
    done, lines = task(project, "true")
    assert done.returncode == 1 and "moco train" not in "".join(lines)
    assert done.stderr.count("\n") == 1 and "bring data, pretrain up to date" in done.stderr
    assert not list((project / "sweeps/lr/2/slurm/logs").glob(".shared")), "the next start looks again"


PUBLISHING = 'case "$*" in *" publish lr-2") '


def test_a_signal_while_the_experiment_is_saved_waits(project: Path) -> None:
    works = PUBLISHING + "kill -TERM $PPID; kill -TERM $$; sleep 0.2; touch saved;; esac"
    done, _ = task(project, works, FRESH="data pretrain")
    assert done.returncode == 0 and (project / "sweeps/lr/2/saved").exists()


@pytest.mark.slow
def test_an_experiment_that_cannot_be_left_is_tried_again_and_then_an_error(project: Path) -> None:
    once = PUBLISHING + "[ -e tried ] || { touch tried; exit 1; };; esac"
    done, lines = task(project, once, FRESH="data pretrain")
    assert done.returncode == 0 and "".join(lines).count("git push") == 2
    done, lines = task(project, PUBLISHING + "exit 1;; esac", FRESH="data pretrain")
    assert done.returncode == 1 and "".join(lines).count("git push") == 3
    assert "lr-2 could not be left in" in done.stderr and "submitted again" in done.stderr
    assert not list((project / "sweeps/lr/2/slurm/logs").glob("*.committed"))


def test_two_jobs_do_not_work_in_one_workspace(project: Path) -> None:
    logs = project / "sweeps/lr/2/slurm/logs"
    logs.mkdir(parents=True)
    with (logs / ".task-lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        done, lines = task(project, "true", FRESH="data pretrain")
        assert done.returncode == 1 and not lines
        assert "another job works here" in done.stderr and done.stderr.count("\n") == 1
    left = 'case "$*" in *"moco train"*) sleep 20 >/dev/null 2>&1 & esac'  # what outlives a job holds nothing
    assert task(project, left, FRESH="data pretrain")[0].returncode == 0
    assert task(project, "true", FRESH="data pretrain")[0].returncode == 0


def test_what_dvc_cannot_do_is_said(project: Path) -> None:
    broken = 'case "$*" in *"dvc commit"*) echo "ERROR: the cache is full" >&2; exit 255;; esac'
    done, _ = task(project, broken, FRESH="data pretrain")
    assert done.returncode == 255 and "ERROR: the cache is full" in done.stderr


def test_files_that_arguments_name_are_the_workspaces_or_else_the_projects(project: Path) -> None:
    for name in ("runs/both.pth", "runs/one.pth", "sweeps/lr/2/runs/both.pth"):
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        (project / name).touch()
    work = {"FRESH": "data pretrain", "STAGE": "eval --classifier runs/both.pth runs/one.pth absent"}
    _, lines = task(project, "true", **work)
    assert f"moco eval --classifier runs/both.pth {project}/runs/one.pth absent" in lines[-1], "and no experiment of it"


def test_a_task_that_is_out_of_time_goes_back_alone(project: Path) -> None:
    told = "touch runs/pretrain/k/checkpoint_001.pth; kill -USR2 $PPID; sleep 0.3; exit 140;; esac"
    _, lines = task(project, IN_MOCO + told, STAGE="pretrain", MOCO_SHARED="")
    assert "scontrol requeue 40_2" in lines


def test_a_sweep_without_an_array_is_one_line(project: Path) -> None:
    done = launch(project, "train", MOCO_SWEEP=str(project))
    assert done.returncode != 0 and "sbatch --array" in done.stderr and done.stderr.count("\n") == 1


def test_what_listens_for_a_preemption_does_not_hold_the_workspace(project: Path) -> None:
    """Else a job that was killed outright would keep its successor out for as long as the listener lives."""
    hears = '#!/bin/sh\ncase "$*" in --help) exit;; esac\n[ ! -e /proc/$$/fd/8 ] || echo held >>held\ntouch heard\n'
    fake(project, "srun", hears)
    done, _ = task(project, "while [ ! -e heard ]; do sleep 0.01; done", FRESH="data pretrain")
    assert done.returncode == 0 and not (project / "sweeps/lr/2/held").exists()
