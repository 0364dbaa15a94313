"""The launcher that every job runs, with a recorder in place of the container: what it does with signals, marks and
workspaces. Real jobs run in test_node.py."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from conftest import ROOT
from moco.cluster.profile import read_profile
from moco.errors import UserError


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(ROOT / "slurm", tmp_path / "slurm")
    (tmp_path / "dvc.yaml").write_text("stages: {}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MOCO_PROFILE", raising=False)
    return tmp_path


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("IMGE=x\n", ("p.conf:1", "unknown key 'IMGE'", "did you mean 'IMAGE'")),
        ("\n\nIMAGE\n", ("p.conf:3", "KEY=value")),
        ("DATASET_MOUNT=overlaid\n", ("p.conf:1", "overlay")),
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


def outside() -> dict[str, str]:
    """The environment without that of a job, in which the tests themselves may run."""
    return {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}


def launch(project: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["slurm/launch", *arguments], cwd=project, env={**outside(), **environment}, text=True, capture_output=True,
        check=False,
    )  # fmt: skip


def write_profile(project: Path, **values: str) -> str:
    text = "".join(f"{key}={value}\n" for key, value in values.items())
    (project / "site.conf").write_text(text)
    return "site.conf"


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"IMAGE": "absent.sif"}, ("absent.sif: image not found", "IMAGE")),
        ({"DATASET": "absent.sqsh", "IMAGE": "dvc.yaml", "CONTAINER": "true"}, ("absent.sqsh", "DATASET")),
        ({"DATASET": "dvc.yaml", "IMAGE": "dvc.yaml", "CONTAINER": "true"}, ("not a squashfs image", "DATASET")),
        ({"IMAGE": "dvc.yaml", "CONTAINER": "apptainerr"}, ("apptainerr: not found", "CONTAINER")),
        ({"LOCAL_TMP": "/proc/nothing"}, ("/proc/nothing: cannot be written", "LOCAL_TMP")),
    ],
)
def test_a_job_that_cannot_run_says_why_in_one_line(
    project: Path, values: dict[str, str], words: tuple[str, ...]
) -> None:
    done = launch(project, "train", MOCO_PROFILE=write_profile(project, **values))
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    for word in words:
        assert word in done.stderr


def fake(project: Path, name: str, text: str) -> None:
    path = project / "bin" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


STALE = 'case "$*" in *"dvc status"*) exit 1;; esac\n'  # what DVC says of a stage that is not up to date


def test_the_container_command_quotes_nothing_twice(project: Path) -> None:
    """A recorder in place of apptainer: every word arrives whole, the dataset where the profile wants it."""
    image, dataset = project / "my image $1.sif", project / "data 'set'.sqsh"
    image.touch()
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
            assert call[call.index(str(image)) - 2 : call.index(str(image))] == ["--nv", "--writable-tmpfs"]


def job(project: Path, stage: str, start: int, **environment: str) -> str:
    """One start of job 7, in which `recorder` does the work: scontrol and moco write down that they were called."""
    fake(project, "recorder", f'#!/bin/sh\n{STALE}echo "$@" >>record\neval "$WORK"\n')
    fake(project, "scontrol", '#!/bin/sh\necho "scontrol $@" >>record\nexit 1\n')
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


IN_MOCO = 'case "$*" in *"moco pretrain"*) mkdir -p runs/pretrain/k; '


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
    (project / "d.sqsh").write_bytes(b"hsqs")
    (project / "local").mkdir()
    fake(project, "recorder", "#!/bin/sh\nls local >>record\nexit 3\n")
    profile = write_profile(
        project, IMAGE="dvc.yaml", DATASET="d.sqsh", DATASET_COPY="yes", LOCAL_TMP=str(project / "local"),
        CONTAINER=str(project / "bin/recorder"),
    )  # fmt: skip
    done = launch(project, "train", MOCO_PROFILE=profile)
    assert done.returncode == 3, "the exit code of the stage is the job's"
    assert "moco-dataset-" in (project / "record").read_text()
    assert list((project / "local").iterdir()) == []


def test_a_stage_that_is_up_to_date_is_not_done_again(project: Path) -> None:
    fake(project, "recorder", '#!/bin/sh\necho "$@" >>record\n')
    profile = write_profile(project, IMAGE="dvc.yaml", CONTAINER=str(project / "bin/recorder"))
    done = launch(project, "train", MOCO_PROFILE=profile)
    assert "train is up to date" in done.stdout and done.returncode == 0
    assert "moco train" not in (project / "record").read_text()
    launch(project, "eval", "--classifier", "models/finetuned", MOCO_PROFILE=profile)
    assert "moco eval --classifier models/finetuned" in (project / "record").read_text()


def task(project: Path, work: str, **environment: str) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """One start of task 2 of array 40, and what it runs. STAGE: with its arguments; FRESH: what DVC finds unchanged."""
    fake(
        project,
        "recorder",
        """#!/bin/sh
echo "$@" | tr '\\n' ' ' >>record; echo >>record
case "$*" in *"dvc status --quiet $FRESH"*) exit 0;; *"dvc status"*) exit 1;; esac
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
    _, lines = task(project, "true", MLFLOW_TRACKING_URI="sqlite:////store.db", FRESH="data pretrain")
    assert [line.partition("dvc.yaml ")[2].rstrip() for line in lines[:-1]] == [
        "dvc checkout --allow-missing --force data pretrain",
        "dvc repro --single-item data",
        "dvc status --quiet data pretrain",
        "dvc status --quiet train",
        "moco train",
        "dvc commit --force train",
    ]
    assert "git push" in lines[-1] and lines[-1].rstrip().endswith("publish lr-2")
    for line in lines:
        for word in (f"--bind {project}:{project}", f"--pwd {place}", "DVC_EXP_NAME=lr-2",
                     "MLFLOW_TRACKING_URI=sqlite:////store.db"):  # fmt: skip
            assert word in line
    assert (place / "dvc.lock").read_text() == "of the project\n"
    assert [path.name for path in (place / "reports").iterdir()] == ["pretrain"], "train's are another's"
    assert "checkout" not in "".join(task(project, "true", STAGE="eval")[1]), "once for a workspace"


def test_without_an_image_a_task_has_the_name_of_its_experiment(project: Path) -> None:
    (project / "sweeps/lr/2").mkdir(parents=True)
    fake(project, "dvc", "#!/bin/sh\n[ $1 != status ]\n")
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
