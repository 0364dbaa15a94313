"""The screen as a whole: one line a check, and no traceback whatever is missing or broken."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from conftest import write_params
from moco.doctor import doctor
from moco.doctor.checks import Finding, attempt, fail
from moco.errors import UserError

LINE = re.compile(r"(ok   |note |warn |FAIL ) ([a-z]+( namespaces)?) +\S.*")


@pytest.fixture(autouse=True)
def outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a container nor a job, whatever the suite itself runs in; one thread, as two steps need no more."""
    torch.set_num_threads(1)
    for name in ("APPTAINER_CONTAINER", "SINGULARITY_CONTAINER", "SLURM_JOB_ID", "SLURM_JOB_PARTITION"):
        monkeypatch.delenv(name, raising=False)


def run(step: bool = False) -> tuple[int, dict[str, str]]:
    """Exit code, and the lines by the checks' names."""
    said: list[str] = []
    code = doctor.run(Path("params.yaml"), step, said.append)
    for line in said:
        assert LINE.fullmatch(line), line
        assert line[:4] not in ("warn", "FAIL") or "; " in line, line
    return code, {line[6:22].strip(): line for line in said}


def test_a_sound_project_gives_one_line_a_check(project: Path) -> None:
    before = torch.get_rng_state()
    code, lines = run(step=True)
    names = "container code libc driver gpu squashfs user_namespaces slurm params dataset scratch mlflow dvc git step"
    assert list(lines) == [name.replace("_", " ") for name in names.split()]
    assert code == int(any(line.startswith("FAIL") for line in lines.values()))
    for name in ("params", "dataset", "scratch", "step"):
        assert lines[name].startswith("ok"), lines[name]
    assert re.search(r"2 steps on cpu in \w+: loss \d\.\d+ and \d\.\d+, weights moved, \d+\.\d s", lines["step"])
    assert sorted(path.name for path in project.iterdir()) == ["dataset", "params.yaml"]  # nothing is left behind
    assert torch.equal(before, torch.get_rng_state())


def test_without_parameters_the_project_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    _, lines = run()
    assert lines["project"].startswith("note  project          no params.yaml here")
    assert not {"params", "dataset", "scratch", "mlflow", "dvc", "git", "step"} & set(lines)


def test_a_wrong_parameter_file_is_a_failure_and_the_rest_goes_on(project: Path) -> None:
    write_params(project, pretrain__epochs=0)
    code, lines = run(step=True)
    assert code == 1
    assert re.match(r"FAIL  params +params\.yaml:\d+: pretrain\.epochs: 0 must be at least 1; ", lines["params"])
    assert "once params is valid" in lines["project"]
    assert lines["step"].startswith("ok")
    assert "dataset" not in lines and "git" in lines


def test_a_check_that_raises_is_a_failure_with_its_reason(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(text: str) -> None:
        raise ZeroDivisionError("what nobody foresaw")

    monkeypatch.setattr("moco.settings.reading.yaml.SafeLoader", broken)
    code, lines = run()
    assert code == 1
    assert "FAIL  params           the check could not be made (ZeroDivisionError: " in lines["params"]


def test_without_torch_every_check_still_answers(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("torch", "mlflow", "dvc", "docker"):
        monkeypatch.setitem(sys.modules, name, None)  # as if not installed
    code, lines = run(step=True)
    assert code == 1
    assert lines["step"].startswith("FAIL") and "import of torch" in lines["step"], lines["step"]
    assert "driver" not in lines and "jobs are submitted" in lines["torch"]
    assert lines["dvc"].startswith("note") and lines["mlflow"].startswith("note")


def test_importing_the_doctor_loads_no_torch() -> None:
    """A torch that cannot be loaded, as on a host with an old libc, must be found and not stumbled over."""
    code = "import sys; from moco.doctor import doctor; sys.exit('torch' in sys.modules or 'mlflow' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def raising(error: Exception) -> Callable[[], Finding]:
    def check() -> Finding:
        raise error

    return check


def test_errors_become_findings() -> None:
    own = attempt("x", raising(UserError("a: b; do c")))
    assert own == fail("x", "a: b", "do c")
    assert attempt("x", raising(UserError("a: b"))).remedy
    foreign = attempt("x", raising(ValueError("\n first\nsecond " + "long " * 200)))
    assert foreign.found == "the check could not be made (ValueError: first)"
    assert "\n" not in fail("x", "a\nb", "c\nd").line()


def test_names_of_files_do_not_steer_the_terminal() -> None:
    assert "\x1b" not in Finding("FAIL", "dataset", "a\x1b[2Jb: not found").line()
