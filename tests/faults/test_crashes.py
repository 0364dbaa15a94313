"""SIGKILL at random moments of every stage that takes long: the same command goes on, to the same bits."""

from __future__ import annotations

import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from fault_helpers import history, kill_after, left_over, must, results, start

from conftest import write_dataset, write_params
from process_helpers import make_ready

pytestmark = pytest.mark.slow
STAGES = ("data", "pretrain", "train", "finetune", "request")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, float]]:
    """A project in which every stage has run, and how many seconds each took."""
    project, seconds = tmp_path_factory.mktemp("undisturbed"), dict[str, float]()
    write_dataset(project / "dataset", unlabeled=3000, train=40)
    write_params(
        project, pretrain__epochs=3, pretrain__batch_size=32, monitor__log_every=5, checkpoint__every=1,
        finetune__epochs=60, train__epochs=60, request__budget=40,
    )  # fmt: skip
    make_ready()
    for stage in STAGES:
        began = time.monotonic()
        must(project, stage)
        seconds[stage] = time.monotonic() - began
    return project, seconds


def tried(
    undisturbed: tuple[Path, dict[str, float]], project: Path, stage: str, kills: int, chance: random.Random
) -> int:
    """Kills the stage at work so often, each time where the one before left it; then lets it end."""
    whole, seconds = undisturbed
    shutil.copytree(whole, project, ignore=shutil.ignore_patterns("runs", "scratch"))
    if stage != "data":
        shutil.copytree(whole / "scratch", project / "scratch")
    for path in results(whole, stage):
        (project / path).unlink(missing_ok=True)
    done = 0
    while done < kills:
        alive = kill_after(project, stage, chance.uniform(0.1, 1.0) * seconds[stage])
        done += alive and bool(list(project.glob(f"runs/{stage}/*/*.jsonl")) or list(project.glob("scratch/*/.build*")))
        if not alive or list(project.glob("runs/*/*/done")):  # it had ended: from the beginning once more
            shutil.rmtree(project / "runs", ignore_errors=True)
    must(project, stage)
    assert results(project, stage) == results(whole, stage)
    if stage != "data":
        assert history(project, stage) == history(whole, stage), "every step once, with its value"
    assert left_over(project) == []
    return done


@pytest.mark.fault("kill")
@pytest.mark.parametrize("stage", STAGES)
def test_killed_three_times_anywhere_a_stage_ends_in_the_same_bits(
    undisturbed: tuple[Path, dict[str, float]], tmp_path: Path, stage: str, tries: Callable[[int], None]
) -> None:
    tries(tried(undisturbed, tmp_path / "project", stage, 3, random.Random(stage)))


@pytest.mark.long
@pytest.mark.fault("kill")
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("stage", STAGES)
def test_killed_twenty_times_anywhere_a_stage_ends_in_the_same_bits(
    undisturbed: tuple[Path, dict[str, float]], tmp_path: Path, stage: str, tries: Callable[[int], None]
) -> None:
    chance, done = random.Random(), 0
    for number in range(5):
        done += tried(undisturbed, tmp_path / f"project-{number}", stage, 4, chance)
    tries(done)


@pytest.mark.fault("second-sigint")
def test_the_second_ctrl_c_stops_at_once_and_nothing_is_lost(
    undisturbed: tuple[Path, dict[str, float]], tmp_path: Path
) -> None:
    whole, _ = undisturbed
    project = tmp_path / "project"
    shutil.copytree(whole, project, ignore=shutil.ignore_patterns("runs"))
    (project / "models/encoder.pth").unlink()
    process = start(project, "pretrain")
    while not list((project / "runs").glob("pretrain/*/checkpoint_001.pth")):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=120)
    assert process.returncode in (130, 128 + signal.SIGINT) and "Traceback" not in said, said
    must(project, "pretrain")
    assert results(project, "pretrain") == results(whole, "pretrain")
    assert history(project, "pretrain") == history(whole, "pretrain")
    assert left_over(project) == []
