"""One virtual environment and two clones of the project: the code that runs is not that of the current folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT, Moco, assert_one_line_error
from moco.tracking.metric_log import read_events


@pytest.fixture
def clone(project: Path) -> Path:
    """The project's folder is a clone of its own; the moco of the tests is another one's."""
    shutil.copytree(ROOT / "src/moco", project / "src/moco", ignore=shutil.ignore_patterns("__pycache__"))
    return project


def change(path: Path) -> None:
    path.write_text(path.read_text() + "# changed\n")


def start_tags(project: Path) -> dict[str, str]:
    (log,) = (project / "runs/pretrain").glob("*/metrics.jsonl")
    tags: dict[str, str] = next(read_events(log))["tags"]
    return tags


@pytest.mark.fault("foreign-code", 3)
def test_code_of_another_clone_is_refused_where_the_stage_runs_it(clone: Path, moco: Moco) -> None:
    """dvc.lock, commit and patch once named code that had not run."""
    assert moco("data").returncode == 0
    change(clone / "src/moco/encoders/encoder.py")
    done = moco("pretrain")
    assert_one_line_error(
        done, str(ROOT / "src/moco"), "moco/encoders/encoder.py", "PYTHONPATH=src", "[E-RUN-OTHER-CODE]"
    )
    assert not (clone / "models/encoder.pth").exists()
    assert moco("data").returncode == 0, "which does not run that file"
    shutil.copy(ROOT / "src/moco/encoders/encoder.py", clone / "src/moco/encoders/encoder.py")
    (clone / "src/moco/encoders/small_resnet.py").unlink()
    assert_one_line_error(moco("pretrain"), "moco/encoders/small_resnet.py", "[E-RUN-OTHER-CODE]")


@pytest.mark.fault("foreign-code", 2)
def test_other_differences_are_told_and_recorded(clone: Path, moco: Moco) -> None:
    change(clone / "src/moco/cluster/slurm.py")
    assert moco("data").returncode == 0
    done = moco("pretrain")
    assert done.returncode == 0 and "warning: moco runs from" in done.stderr and "moco/cluster/slurm.py" in done.stderr
    tags = start_tags(clone)
    assert tags["code_folder"] == str(ROOT / "src/moco") and tags["code_differs"] == "1 file(s): moco/cluster/slurm.py"


@pytest.mark.fault("foreign-code")
def test_doctor_tells_whose_code_runs(clone: Path, moco: Moco) -> None:
    def line() -> str:
        return next(line for line in moco("doctor").stdout.splitlines() if line[6:].startswith("code "))

    assert line().startswith("note") and "the same at present" in line()
    change(clone / "src/moco/settings/schema.py")
    assert line().startswith("warn") and "moco/settings/schema.py" in line(), "no stage's result depends on it"
    change(clone / "src/moco/encoders/encoder.py")
    assert line().startswith("FAIL") and "2 files differ" in line() and str(ROOT / "src/moco") in line()
    shutil.rmtree(clone / "src")
    assert line().startswith("note") and "none in this folder" in line()


def test_the_same_code_and_an_installed_moco_run_as_ever(clone: Path, moco: Moco) -> None:
    """A container's moco works in a project without sources, as do copies of the same commit."""
    assert "moco runs from" not in moco("data").stderr
    assert moco("pretrain").returncode == 0
    assert "code_differs" not in start_tags(clone)
    shutil.rmtree(clone / "src")
    done = moco("train")
    assert done.returncode == 0 and "moco runs from" not in done.stderr


@pytest.mark.fault("foreign-code")
def test_the_remedy_runs_this_folders_code(clone: Path) -> None:
    change(clone / "src/moco/data/decode.py")
    console = str(Path(sys.executable).parent / "moco")

    def run(**variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [console, "data"], cwd=clone, capture_output=True, text=True, check=False, timeout=120,
            env={**os.environ, **variables},
        )  # fmt: skip

    assert_one_line_error(run(), "moco/data/decode.py", "[E-RUN-OTHER-CODE]")
    done = run(PYTHONPATH="src")
    assert done.returncode == 0 and "moco runs from" not in done.stderr, done.stderr


@pytest.mark.fault("foreign-code")
def test_a_queued_experiment_runs_the_code_that_it_was_queued_with(clone: Path) -> None:
    """The project's code, which is the one installed, may have been edited since."""
    file = clone / "src/moco/stages/data.py"
    file.write_text(file.read_text() + "\nprint('the code of the experiment')\n")
    done = subprocess.run(
        [str(Path(sys.executable).parent / "moco"), "data"], cwd=clone, capture_output=True, text=True, check=False,
        timeout=120, env={**os.environ, "DVC_EXP_NAME": "queued", "DVC_ROOT": "/"},
    )  # fmt: skip
    assert done.returncode == 0 and "the code of the experiment" in done.stdout, done.stderr
