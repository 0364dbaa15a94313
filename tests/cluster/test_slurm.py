"""Job scripts as text, profiles, and what is refused before anything is submitted."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from conftest import ROOT, Moco, assert_one_line_error
from moco.cluster.profile import KEYS, Profile, read_profile
from moco.cluster.slurm import JOBS, command, render
from moco.errors import UserError

AWKWARD = '/scratch/my data/it\'s $HOME "x" #1'


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(ROOT / "slurm", tmp_path / "slurm")
    (tmp_path / "dvc.yaml").write_text("stages: {}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MOCO_PROFILE", raising=False)
    return tmp_path


@pytest.mark.parametrize("job", JOBS)
def test_the_files_in_slurm_are_the_rendered_jobs(job: str) -> None:
    assert (ROOT / f"slurm/{job}.sbatch").read_text() == render(job)


def test_there_is_no_other_job_file() -> None:
    assert {path.stem for path in (ROOT / "slurm").glob("*.sbatch")} == set(JOBS)


def test_a_script_has_what_requeueing_needs_before_its_first_command() -> None:
    lines = render("pretrain").splitlines()
    first = next(i for i, line in enumerate(lines) if not line.startswith("#"))
    directives = [line for line in lines[:first] if line.startswith("#SBATCH")]
    for wanted in ("--requeue", "--open-mode=append", "--signal=B:USR2@300", "--output=slurm/logs/%x-%j.log"):
        assert f"#SBATCH {wanted}" in directives
    assert lines[0] == "#!/bin/bash"


def test_a_profile_becomes_directives_and_empty_values_do_not() -> None:
    profile = Profile(partition="gpu", account="a b", gres="gpu:1", cpus="4", memory="8G", time="1-00:00:00")
    lines = render("train", profile, "p.conf").splitlines()
    assert "#SBATCH --partition=gpu" in lines and "#SBATCH --time=1-00:00:00" in lines
    assert '#SBATCH --account="a b"' in lines
    assert not [line for line in render("train", Profile(), "p.conf").splitlines() if "partition" in line]


@pytest.mark.parametrize("path", [AWKWARD, "plain.conf", "$(touch ran)", "`touch ran`", "a\\b"])
def test_a_shell_reads_the_profiles_path_back_as_it_was(path: str, tmp_path: Path) -> None:
    (tmp_path / "slurm").mkdir()
    launch = tmp_path / "slurm/launch"
    launch.write_text('#!/bin/sh\nprintf "%s\\n" "$MOCO_PROFILE" "$@"\n')
    launch.chmod(0o755)
    text = render("pretrain", Profile(), path)
    done = subprocess.run(
        ["bash", "-s", "--", "a b", "$x"], input=text, cwd=tmp_path, text=True, capture_output=True, check=True
    )
    assert done.stdout.splitlines() == [path, "pretrain", "a b", "$x"]
    assert not (tmp_path / "ran").exists()


def test_options_follow_the_dependency_and_arguments_the_script() -> None:
    found = command(("--time=5",), ("--params", "p q.yaml"), "7")
    assert found == ["sbatch", "--parsable", "--dependency=afterok:7", "--time=5", "/dev/stdin", "--params", "p q.yaml"]


@pytest.mark.parametrize("name", ["generic", "nyu"])
def test_profiles_that_come_along_are_valid_and_the_first_explains_every_key(name: str) -> None:
    read_profile(ROOT / f"slurm/profiles/{name}.conf")
    lines = (ROOT / "slurm/profiles/generic.conf").read_text().splitlines()
    assert sorted(line.partition("=")[0] for line in lines if line and line[0] != "#") == sorted(KEYS)


def test_bash_and_python_read_the_same_keys() -> None:
    text = (ROOT / "slurm/launch").read_text()
    known = text[text.index("case $key in") : text.index("printf -v")]
    assert set(KEYS) == {word for word in known.replace("|", " ").replace(")", " ").split() if word.isupper()}


def test_values_are_taken_as_they_stand(tmp_path: Path) -> None:
    (tmp_path / "p.conf").write_text(f"# x\n\nIMAGE={AWKWARD}\nDATASET=a=b\n")
    profile = read_profile(tmp_path / "p.conf")
    assert (profile.image, profile.dataset) == (AWKWARD, "a=b")


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


def launch(project: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    return subprocess.run(
        ["slurm/launch", *arguments], cwd=project, env={**clean, **environment}, text=True, capture_output=True,
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
            ["dvc", "repro", "--quiet", "--single-item", "data"],
            ["moco", "pretrain", "--resume", "runs/a b.pth"],
            ["dvc", "commit", "--quiet", "--force", "pretrain"],
        ]
        for call in calls:
            place = call.index(wanted[0], call.index("--pwd")) if mount == "overlay" else call.index(wanted[1]) - 1
            assert call[place : place + 2] == wanted
            assert call[call.index(str(image)) - 2 : call.index(str(image))] == ["--nv", "--writable-tmpfs"]


def job(project: Path, stage: str, start: int, **environment: str) -> str:
    """One start of job 7, in which `recorder` does the work: scontrol and moco write down that they were called."""
    fake(project, "recorder", '#!/bin/sh\necho "$@" >>record\neval "$WORK"\n')
    fake(project, "scontrol", '#!/bin/sh\necho "scontrol $@" >>record\nexit 1\n')
    profile = write_profile(project, IMAGE="dvc.yaml", CONTAINER="recorder")
    (project / "record").unlink(missing_ok=True)
    launch(
        project, stage, MOCO_PROFILE=profile, PATH=f"{project / 'bin'}:{os.environ['PATH']}", SLURM_JOB_ID="7",
        SLURM_RESTART_COUNT=str(start), **environment,
    )  # fmt: skip
    return (project / "record").read_text() if (project / "record").exists() else ""


def test_the_exit_code_of_the_stage_is_the_jobs(project: Path) -> None:
    fake(project, "recorder", '#!/bin/sh\ncase "$*" in *"moco train"*) exit 9;; esac\n')
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


def test_dry_run_shows_the_scripts_and_needs_no_slurm(moco: Moco, project: Path) -> None:
    done = moco("slurm", "submit", "pipeline", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stdout.splitlines() if line.startswith("exec")] == [
        f'exec slurm/launch {job} "$@"' for job in ("pretrain", "train", "baseline", "finetune", "eval")
    ]


def test_without_sbatch_and_with_wrong_names_one_line_says_so(
    moco: Moco, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_one_line_error(moco("slurm", "submit", "pretrian"), "did you mean 'pretrain'")
    assert_one_line_error(moco("slurm", "submit", "pretrain", "--profile", "absent"), "absent", "generic.conf")
    monkeypatch.setenv("PATH", str(project))
    assert_one_line_error(moco("slurm", "submit", "pretrain"), "sbatch: not found", "login node")


def test_shell_words_of_the_script_are_plain() -> None:
    for job in JOBS:
        assert shlex.split(render(job).splitlines()[-1]) == ["exec", "slurm/launch", job, "$@"]
