"""`moco pretrain` in two processes, as torchrun starts them: one run, whatever happens to them."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from conftest import Moco, assert_one_line_error, write_dataset, write_params
from moco.tracking.metric_log import metric_history, read_events
from process_helpers import finish, start_two, wait_for_steps

STEPS = 60
SETTINGS = {"pretrain__epochs": 12, "pretrain__batch_norm": "split", "pretrain__shuffle": True}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "moco.cli"]


def assert_whole(project: Path, undisturbed: Path) -> None:
    """One run, every step once, and weights and losses of the undisturbed one to the bit."""
    (log,) = (project / "runs/pretrain").glob("*/metrics.jsonl")
    (whole,) = (undisturbed / "runs/pretrain").glob("*/metrics.jsonl")
    ours, theirs = ([(e["step"], e["metrics"]["loss"]) for e in metric_history(path) if "loss" in e["metrics"]]
                    for path in (log, whole))  # fmt: skip
    assert [step for step, _ in ours] == list(range(1, STEPS + 1))
    assert ours == theirs
    assert (project / "models/encoder.pth").read_bytes() == (undisturbed / "models/encoder.pth").read_bytes()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project in which two processes have finished a run. Neither had a decoded cache: both wanted to build it."""
    project = tmp_path_factory.mktemp("undisturbed")
    write_dataset(project / "dataset")
    write_params(project, **SETTINGS)
    subprocess.run([sys.executable, "-m", "moco.cli", "data"], cwd=project, check=True, capture_output=True)
    shutil.rmtree(project / "scratch")
    codes, errors = finish(start_two(project))
    assert codes == [0, 0], errors
    assert "in 2 processes" in errors[0] and errors[0].count("building it") + errors[1].count("building it") <= 1
    assert errors[1] == "", "rank 0 alone speaks"
    return project


@pytest.fixture
def again(undisturbed: Path, tmp_path: Path) -> Path:
    """The same project before its run."""
    for name in ("dataset", "scratch"):
        (tmp_path / name).symlink_to(undisturbed / name)
    (tmp_path / "models").mkdir()
    shutil.copy(undisturbed / "models/manifest.json", tmp_path / "models")
    write_params(tmp_path, **SETTINGS)
    return tmp_path


def test_two_processes_leave_the_files_of_one_run(undisturbed: Path) -> None:
    (folder,) = (undisturbed / "runs/pretrain").iterdir()
    assert (folder / "done").exists() and len(list(folder.glob("checkpoint_*.pth"))) == 2
    assert [event["event"] for event in read_events(folder / "metrics.jsonl")].count("start") == 1
    state = torch.load(folder / "checkpoint_012.pth", weights_only=True)
    assert not [name for name in state["model"] if "module." in name]
    assert (undisturbed / "reports/pretrain/monitor.csv").exists()


def test_another_number_of_processes_is_told(moco: Moco, project: Path) -> None:
    assert moco("data").returncode == 0
    assert moco("pretrain").returncode == 0
    (checkpoint,) = (project / "runs/pretrain").glob("*/checkpoint_001.pth")
    torch.save({**torch.load(checkpoint, weights_only=True), "processes": 4}, project / "of-four.pth")
    done = moco("pretrain", "--resume", "of-four.pth")
    assert done.returncode == 0 and "begun in 4 process(es), going on in 1" in done.stderr


@pytest.mark.fault("signal")
def test_torchrun_ended_by_sigterm_continues_to_the_same_bits(again: Path, undisturbed: Path) -> None:
    process = subprocess.Popen([*TORCHRUN, "pretrain"], cwd=again, stderr=subprocess.PIPE, text=True)
    wait_for_steps(None, again, 17)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0
    assert errors.count("stopped by SIGTERM; the state is saved, the same command continues") == 1, errors
    assert not (again / "models/encoder.pth").exists()
    codes, texts = finish(start_two(again))
    assert codes == [0, 0] and "continuing from" in texts[0], texts
    assert_whole(again, undisturbed)


@pytest.mark.fault("signal")
def test_a_signal_to_one_process_ends_both_with_its_code(again: Path, undisturbed: Path) -> None:
    processes = start_two(again)
    wait_for_steps(processes[0], again, 7)
    processes[1].send_signal(signal.SIGUSR2)
    codes, errors = finish(processes)
    assert codes == [128 + signal.SIGUSR2] * 2, errors
    assert "stopped by SIGUSR2; the state is saved" in errors[0] and errors[1] == ""
    codes, errors = finish(start_two(again))
    assert codes == [0, 0], errors
    assert_whole(again, undisturbed)


@pytest.mark.fault("kill-process")
@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_process_ends_the_other_and_the_run_continues(again: Path, undisturbed: Path, killed: int) -> None:
    processes = start_two(again)
    wait_for_steps(processes[0], again, 18)
    processes[killed].send_signal(signal.SIGKILL)
    codes, errors = finish(processes)
    assert codes[killed] == -signal.SIGKILL and codes[1 - killed] == 1, errors
    (line,) = [line for line in errors[1 - killed].splitlines() if line.startswith("error: ")]
    assert f"process {1 - killed} of 2 lost the others" in line and "Traceback" not in errors[1 - killed]
    codes, errors = finish(start_two(again))
    assert codes == [0, 0] and "continuing from" in errors[0], errors
    assert_whole(again, undisturbed)


@pytest.mark.fault("divergence")
def test_a_collapse_ends_both_with_one_line(again: Path) -> None:
    write_params(again, **SETTINGS, pretrain__lr=3000.0)
    codes, errors = finish(start_two(again))
    assert codes == [1, 1], errors
    (line,) = [line for text in errors for line in text.splitlines() if line.startswith("error: ")]
    assert "diverged" in line or "collapsed" in line
    assert "Traceback" not in "".join(errors)


@pytest.mark.fault("divergence")
def test_both_step_back_together(again: Path) -> None:
    write_params(again, **SETTINGS, pretrain__lr=3000.0, checkpoint__max_rollbacks=20)
    codes, errors = finish(start_two(again))
    assert codes == [0, 0], errors
    assert "(step back 1 of 20)" in errors[0] and errors[1] == "", "rank 0 alone speaks"
    (log,) = (again / "runs/pretrain").glob("*/metrics.jsonl")
    lines = [line for line in metric_history(log) if "loss" in line["metrics"]]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert int((log.parent / "steps_back").read_text()) == errors[0].count("(step back")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"batch_size": 9}, ("pretrain.batch_size", "9 images", "multiple of 2")),
        ({"batch_size": 2}, ("pretrain.batch_size", "two for each")),
        ({"splits": 3, "batch_norm": "split"}, ("pretrain.splits", "multiple of 2")),
        ({"splits": 4, "batch_norm": "split", "batch_size": 10}, ("pretrain.splits", "one of the parts")),
        ({"batch_norm": "sync"}, ("pretrain.batch_norm", "CUDA")),
    ],
)
def test_settings_that_cannot_be_shared_are_one_line(
    moco: Moco, project: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, object], words: tuple[str, ...]
) -> None:
    write_params(project, **{f"pretrain__{name}": value for name, value in changes.items()})
    for name, value in {
        "WORLD_SIZE": "2",
        "RANK": "0",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "a",
        "MASTER_PORT": "1",
    }.items():
        monkeypatch.setenv(name, value)
    assert_one_line_error(moco("pretrain"), *words)


def test_half_an_environment_and_other_stages_are_one_line(
    moco: Moco, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert_one_line_error(moco("pretrain"), "RANK", "torchrun")
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    for stage in ("data", "train", "baseline", "eval"):
        assert_one_line_error(moco(stage), f"moco {stage} runs in one process")
