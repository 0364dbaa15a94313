"""Threads wait asleep on cores that others use."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from moco.cores import used

STAT = """cpu  999 999 999 999 999 999 999 999 999 999
cpu0 100 5 50 1000 10 1 1 {steal} 40 0
cpu1 {user} 5 50 {idle} {iowait} 1 1 0 0 0
cpu10 700 700 700 700 700 700 700 700 0 0
intr 5
"""
ALONE = "import os; os.sched_setaffinity(0, {{{core}}}); from moco.cli import main; main()"
NOTE = "note: others use these cores as well; threads wait for each other asleep"


@pytest.mark.parametrize(
    ("changes", "cores", "expected"),
    [
        ({"user": 210}, {1}, 1.0),
        ({"user": 210}, {0, 1}, 1.0),  # nothing passed on the other
        ({"user": 205, "idle": 505}, {1}, 0.5),
        ({"user": 205, "iowait": 25}, {1}, 0.2),  # who waits for a disk leaves the core
        ({"steal": 4, "idle": 512}, {0, 1}, 0.25),  # time that the host gave to other machines
        ({"user": 210}, {0}, 0.0),
        ({"user": 210}, {7}, 0.0),  # a core that is off
        ({}, {0, 1}, 0.0),
    ],
)
def test_share_of_the_cores_that_others_use(changes: dict[str, int], cores: set[int], expected: float) -> None:
    before = {"user": 200, "idle": 500, "iowait": 5, "steal": 0}
    assert used(STAT.format(**before), STAT.format(**before | changes), cores) == expected


@pytest.fixture
def busy_core() -> Iterator[int]:
    """The last core of this process, on which another is at work."""
    core = max(os.sched_getaffinity(0))
    program = f"import os; os.sched_setaffinity(0, {{{core}}}); print(flush=True)\nwhile True: pass"
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as other:
        assert other.stdout
        other.stdout.readline()
        yield core
        other.kill()


def said(core: int, command: str, folder: Path, **variables: str) -> str:
    """What the command, which finds no params.yaml, writes to stderr on that core alone."""
    ours = {"GOMP_SPINCOUNT", "OMP_NUM_THREADS", "OMP_WAIT_POLICY"}
    environment = {name: value for name, value in os.environ.items() if name not in ours} | variables
    program = [sys.executable, "-c", ALONE.format(core=core), command]
    done = subprocess.run(
        program, check=False, env=environment, cwd=folder, capture_output=True, text=True, timeout=120
    )
    return done.stderr


def test_commands_that_compute_wait_asleep_where_a_core_is_used(busy_core: int, tmp_path: Path) -> None:
    lines = said(busy_core, "train", tmp_path, OMP_DISPLAY_ENV="VERBOSE").splitlines()
    assert lines[0] == NOTE
    assert any("GOMP_SPINCOUNT = '1000'" in line for line in lines)  # libgomp's own word, when torch loads it


@pytest.mark.parametrize(("command", "variables"), [
    ("train", {"OMP_WAIT_POLICY": "active"}), ("train", {"GOMP_SPINCOUNT": "5"}), ("train", {"OMP_NUM_THREADS": "1"}),
    ("data", {}),
])  # fmt: skip
def test_what_the_environment_says_stays_and_other_commands_do_not_look(
    command: str, variables: dict[str, str], busy_core: int, tmp_path: Path
) -> None:
    assert NOTE not in said(busy_core, command, tmp_path, **variables)
