"""Threads wait asleep on cores that others use."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from conftest import write_params
from moco.accel import openmp
from moco.cli.main import _load

STAT = """cpu  999 999 999 999 999 999 999 999 999 999
cpu0 100 5 50 1000 10 1 1 {steal} 40 0
cpu1 {user} 5 50 {idle} {iowait} 1 1 0 0 0
cpu10 700 700 700 700 700 700 700 700 0 0
intr 5
"""
BEFORE = {"user": 200, "idle": 500, "iowait": 5, "steal": 0}
OURS = ("GOMP_SPINCOUNT", "OMP_NUM_THREADS", "OMP_WAIT_POLICY")
Finds = Callable[[list[float]], list[float]]
NOTE = "note: others use these cores as well; threads wait for each other asleep"


@pytest.mark.parametrize(
    ("changes", "ours", "expected"),
    [
        ({"user": 210}, {1}, 1.0),
        ({"user": 210}, {0, 1}, 1.0),
        ({"user": 205, "idle": 505}, {1}, 0.5),
        ({"user": 205, "iowait": 25}, {1}, 0.2),  # who waits for a disk leaves the core
        ({"user": 210, "steal": 4}, {0, 1}, 2.0),  # time that the host gave to other machines
        ({"user": 205, "idle": 505, "iowait": 1}, {1}, 0.5),  # counted backwards
        ({"user": 210}, {0}, 0.0),
        ({"user": 210}, {7}, 0.0),  # a core that is off
        ({}, {0, 1}, 0.0),
    ],
)
def test_how_many_cores_are_at_work(changes: dict[str, int], ours: set[int], expected: float) -> None:
    assert openmp.busy_cores(STAT.format(**BEFORE), STAT.format(**BEFORE | changes), ours) == expected


def test_a_core_that_comes_on_between_the_looks_is_left_out() -> None:
    before, after = STAT.format(**BEFORE), STAT.format(**BEFORE | {"user": 210})
    without = "\n".join(line for line in before.splitlines() if not line.startswith("cpu0 "))
    assert openmp.busy_cores(without, after, {0, 1}) == 1.0


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Finds:
    """As a process before torch is there and whose environment says nothing; what each look finds can be set."""
    for name in OURS:
        monkeypatch.setenv(name, "")  # so that what a test sets is taken back
        monkeypatch.delenv(name)
    monkeypatch.delitem(sys.modules, "torch")

    def finds(looks: list[float]) -> list[float]:
        monkeypatch.setattr(openmp, "_busy", lambda: looks.pop(0))
        return looks

    return finds


@pytest.mark.parametrize(("looks", "asleep", "left"), [
    ([0.5, 2.0, 0.5], True, 0), ([0.4, 1, 1], False, 2), ([1, 0.4, 1], False, 1), ([1, 1, 0.4], False, 0),
])  # fmt: skip
def test_others_have_to_be_at_work_for_more_than_a_moment(
    looks: list[float], asleep: bool, left: int, free: Finds
) -> None:
    found = free(looks)
    assert openmp.use_passive_wait_if_cores_are_busy() is asleep
    assert os.environ.get("GOMP_SPINCOUNT") == (openmp.SPINS if asleep else None)
    assert len(found) == left


@pytest.mark.parametrize("said", [{"OMP_WAIT_POLICY": "active"}, {"GOMP_SPINCOUNT": "5"}, {"OMP_NUM_THREADS": "1"}])
def test_what_the_environment_says_stays(said: dict[str, str], free: Finds, monkeypatch: pytest.MonkeyPatch) -> None:
    free([])
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    assert not openmp.use_passive_wait_if_cores_are_busy()
    assert {name: os.environ[name] for name in OURS if name in os.environ} == said


def test_nothing_is_set_once_torch_has_read_it(free: Finds, monkeypatch: pytest.MonkeyPatch) -> None:
    free([])
    monkeypatch.setitem(sys.modules, "torch", sys)
    assert not openmp.use_passive_wait_if_cores_are_busy()


@pytest.mark.parametrize("text", [None, "cpu0 1 2 three 4 5 6 7 8\ncpu1 a\n"])
def test_a_system_that_does_not_tell_changes_nothing(
    text: str | None, free: Finds, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openmp, "COUNTERS", tmp_path / "stat")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    if text:
        (tmp_path / "stat").write_text(text)
    assert not openmp.use_passive_wait_if_cores_are_busy()
    monkeypatch.delattr(os, "sched_getaffinity")
    assert not openmp.use_passive_wait_if_cores_are_busy()


@pytest.mark.parametrize(("threads", "device", "world", "looked"), [
    (0, "auto", "1", True), (2, "cpu", "1", True), (1, "cpu", "1", False), (0, "cuda:1", "1", False),
    (0, "auto", "2", False),
])  # fmt: skip
def test_commands_look_where_threads_will_wait(
    threads: int, device: str, world: str, looked: bool, project: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    write_params(project, runtime__threads=threads, runtime__device=device)
    monkeypatch.setenv("WORLD_SIZE", world)
    monkeypatch.setattr("moco.cli.main.use_passive_wait_if_cores_are_busy", lambda: True)
    _load(project / "params.yaml")
    assert (NOTE in capsys.readouterr().err) is looked


@pytest.fixture
def busy_core() -> Iterator[int]:
    """The last core of this process, on which another is at work for at most two minutes."""
    if not hasattr(os, "sched_setaffinity") or not openmp.COUNTERS.exists():
        pytest.skip("needs Linux, where libgomp computes for torch")
    core = max(os.sched_getaffinity(0))
    program = f"""
import os, time
os.sched_setaffinity(0, {{{core}}})
print(flush=True)
while time.monotonic() < {os.times().elapsed} + 120: pass
"""
    other = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    try:
        assert other.stdout
        other.stdout.readline()
        yield core
    finally:
        other.kill()
        other.communicate()


def test_libgomp_hears_of_it(busy_core: int, project: Path) -> None:
    write_params(project, runtime__threads=0)
    program = f"import os; os.sched_setaffinity(0, {{{busy_core}}}); from moco.cli.main import main; main()"
    environment = {name: value for name, value in os.environ.items() if name not in OURS}
    command, show = [sys.executable, "-c", program, "train"], {"OMP_DISPLAY_ENV": "VERBOSE"}
    done = subprocess.run(
        command, check=False, env=environment | show, cwd=project, capture_output=True, text=True, timeout=120
    )
    lines = done.stderr.splitlines()
    assert lines[0] == NOTE
    assert any("GOMP_SPINCOUNT = '1000'" in line for line in lines), "libgomp's own word, when torch loads it"
    assert lines[-1].startswith("error: models/manifest.json"), "the stage has begun"
