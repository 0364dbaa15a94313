"""Job scripts as text, profiles, and what is refused before anything is submitted."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from conftest import ROOT, Moco, assert_one_line_error
from moco.cluster.profile import KEYS, Profile, read_profile
from moco.cluster.slurm import JOBS, PIPELINE, command, minutes, render

AWKWARD = '/scratch/my data/it\'s $HOME "x" #1'


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


def test_two_gpus_are_asked_for_whatever_the_profile_gives_others() -> None:
    assert "#SBATCH --gres=gpu:2" in render("pretrain_2gpu", Profile(gres="gpu:1")).splitlines()
    assert "#SBATCH --gres=gpu:1" in render("pretrain", Profile(gres="gpu:1")).splitlines()


def test_options_follow_the_dependency_and_arguments_the_script() -> None:
    found = command(("--time=5",), ("--params", "p q.yaml"), "afterok:7")
    after = ["--dependency=afterok:7", "--kill-on-invalid-dep=yes"]
    assert found == ["sbatch", "--parsable", *after, "--time=5", "/dev/stdin", "--params", "p q.yaml"]


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


def test_dry_run_shows_the_scripts_and_needs_no_slurm(moco: Moco, project: Path) -> None:
    profile = str(ROOT / "slurm/profiles/generic.conf")
    done = moco("slurm", "submit", "pipeline", "--dry-run", "--profile", profile)
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stdout.splitlines() if line.startswith("exec")] == [
        f'exec slurm/launch {job} "$@"' for job in PIPELINE
    ]


def test_without_sbatch_and_with_wrong_names_one_line_says_so(
    moco: Moco, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_one_line_error(moco("slurm", "submit", "pretrian"), "did you mean 'pretrain'")
    assert_one_line_error(moco("slurm", "submit", "pretrain", "--profile", "absent"), "absent", "generic.conf")
    monkeypatch.setenv("PATH", str(project))
    profile = str(ROOT / "slurm/profiles/generic.conf")
    assert_one_line_error(moco("slurm", "submit", "pretrain", "--profile", profile), "sbatch: not found", "login node")


def test_shell_words_of_the_script_are_plain() -> None:
    for job in JOBS:
        assert shlex.split(render(job).splitlines()[-1]) == ["exec", "slurm/launch", job.removesuffix("_2gpu"), "$@"]


@pytest.fixture
def sbatch(project: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with a profile, and in place of sbatch what writes down that it was called; returns the profile."""
    (project / "bin").mkdir()
    tool = project / "bin/sbatch"
    tool.write_text('#!/bin/sh\necho "$@" >>called\necho "Welcome to the cluster"\necho "42;cluster"\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{project / 'bin'}:/usr/bin:/bin")
    (project / "site.conf").write_text("CPUS=2\n")
    shutil.copy(ROOT / "dvc.yaml", project)
    return project / "site.conf"


def test_a_site_that_greets_gives_an_id_all_the_same(moco: Moco, sbatch: Path) -> None:
    done = moco("slurm", "submit", "train", "--profile", str(sbatch))
    assert done.returncode == 0 and "train: job 42, log slurm/logs/moco-train-42.log" in done.stdout


def test_a_refusal_is_told_with_the_sites_own_reason(moco: Moco, sbatch: Path) -> None:
    (sbatch.parent / "bin/sbatch").write_text(
        "#!/bin/sh\necho 'your account has no hours left' >&2; echo 'sbatch: error: Unspecified error' >&2; exit 1\n"
    )
    done = moco("slurm", "submit", "train", "--profile", str(sbatch))
    assert_one_line_error(done, "no hours left", "Unspecified error")


@pytest.mark.parametrize(
    "words, said",
    [
        (("pretrain", "--dryrun"), "--dryrun"),
        (("train", "--swep", "train.lr=1"), "--swep"),
        (("pretrain_continue", "absent.pth"), "absent.pth: checkpoint not found"),
        (("train", "--sweep", "train.lr=1,2", "--name", "x", "--", "--params=p.yaml"), "--params"),
        (("pretrain", "--option=--time=5:00"), "5:00 is too short"),
        (("pretrain", "--option=-t5"), "5 is too short"),
        (("pretrain", "--option=-t=9"), "--time: 9 is too short"),
    ],
)
def test_what_was_not_meant_is_not_submitted(moco: Moco, sbatch: Path, words: tuple[str, ...], said: str) -> None:
    done = moco("slurm", "submit", *words, "--profile", str(sbatch)) if "--" not in words else moco(
        "slurm", "submit", "--profile", str(sbatch), *words
    )  # fmt: skip
    assert done.returncode != 0 and said in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert not (sbatch.parent / "called").exists()


def test_a_stage_that_keeps_no_state_may_be_short(moco: Moco, sbatch: Path) -> None:
    assert moco("slurm", "submit", "eval", "--option=--time=5:00", "--profile", str(sbatch)).returncode == 0


def test_where_sbatch_submits_nothing_its_words_are_shown(moco: Moco, sbatch: Path) -> None:
    (sbatch.parent / "bin/sbatch").write_text("#!/bin/sh\necho 'sbatch: Job 5 to start tomorrow' >&2\n")
    done = moco("slurm", "submit", "train", "--option=--test-only", "--profile", str(sbatch))
    assert_one_line_error(done, "named no job", "to start tomorrow")


def test_files_of_the_profile_are_looked_at_first(moco: Moco, sbatch: Path) -> None:
    for value, said in (("absent.sif", "not found"), ("site.conf/x.sif", "Not a directory"), ("bin", "is no file")):
        sbatch.write_text(f"IMAGE={value}\n")
        assert_one_line_error(moco("slurm", "submit", "train", "--profile", str(sbatch)), "IMAGE", value, said)
    sbatch.write_text("IMAGE=site.conf\nGRES=gpu:1\n")
    assert "--nv" in moco("slurm", "submit", "train", "--profile", str(sbatch)).stdout


@pytest.mark.parametrize(
    "limit, length",
    [
        ("90", 90),
        ("5:30", 5.5),
        ("1:00:00", 60),
        ("2-0", 2880),
        ("1-2:30", 1590),
        ("1-0:0:30", 1440.5),
        ("UNLIMITED", None),
    ],
)
def test_time_limits_are_read_as_sbatch_reads_them(limit: str, length: float | None) -> None:
    assert minutes(limit) == length
