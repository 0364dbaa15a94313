"""Interrupted pretraining goes on where it stopped, to the same bits."""

from __future__ import annotations

import json
import signal
import socket
import time
from pathlib import Path

import pytest
import torch

from conftest import Moco, assert_one_line_error, write_dataset, write_params
from moco.data.cache import SWEEPING, caches
from moco.tracking.metric_log import metric_history
from process_helpers import Started, wait_for_steps


def losses(log: Path) -> list[float]:
    return [line["metrics"]["loss"] for line in metric_history(log) if "loss" in line["metrics"]]


@pytest.mark.fault("signal")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR2"])
def test_a_signal_saves_and_the_same_command_continues_to_the_same_bits(moco: Moco, project: Path, name: str) -> None:
    write_params(project, pretrain__epochs=12, checkpoint__every=100)
    assert moco("data").returncode == 0
    assert moco("pretrain").returncode == 0
    undisturbed = (project / "models/encoder.pth").read_bytes()
    (project / "models/encoder.pth").unlink()
    (project / "runs").rename(project / "runs-undisturbed")

    number = getattr(signal, name)
    process = Started(project, "pretrain")
    wait_for_steps(process, project, 7)
    process.send_signal(number)
    code, errors = process.finish()
    assert code == 128 + number, errors
    assert "the same command continues" in errors
    assert not (project / "models/encoder.pth").exists()

    done = moco("pretrain")
    assert done.returncode == 0, done.stderr
    assert "continuing from" in done.stderr
    assert (project / "models/encoder.pth").read_bytes() == undisturbed
    (log,) = (project / "runs/pretrain").glob("*/metrics.jsonl")
    steps = [line["step"] for line in metric_history(log) if "loss" in line["metrics"]]
    assert steps == list(range(1, 61)), "every step once"
    (whole,) = (project / "runs-undisturbed/pretrain").glob("*/metrics.jsonl")
    assert losses(log) == losses(whole)


@pytest.mark.fault("kill")
def test_a_killed_run_continues_from_its_last_checkpoint(moco: Moco, project: Path) -> None:
    write_params(project, pretrain__epochs=12, checkpoint__every=1)
    assert moco("data").returncode == 0
    assert moco("pretrain").returncode == 0
    undisturbed = (project / "models/encoder.pth").read_bytes()
    (project / "runs").rename(project / "runs-undisturbed")
    process = Started(project, "pretrain")
    wait_for_steps(process, project, 18)
    process.send_signal(signal.SIGKILL)
    process.finish()
    done = moco("pretrain")
    assert done.returncode == 0, done.stderr
    assert "continuing from" in done.stderr
    assert (project / "models/encoder.pth").read_bytes() == undisturbed
    (log,) = (project / "runs/pretrain").glob("*/metrics.jsonl")
    steps = [line["step"] for line in metric_history(log) if "loss" in line["metrics"]]
    assert steps == list(range(1, 61)), "repeated steps count once"


def test_a_changed_setting_starts_another_run(moco: Moco, project: Path) -> None:
    assert moco("data").returncode == 0
    assert moco("pretrain").returncode == 0
    write_params(project, pretrain__temperature=0.3)
    done = moco("pretrain")
    assert done.returncode == 0 and "continuing" not in done.stderr
    assert len(list((project / "runs/pretrain").iterdir())) == 2


def test_a_finished_run_is_taken_and_not_repeated(moco: Moco, project: Path) -> None:
    assert moco("data").returncode == 0
    assert moco("pretrain").returncode == 0
    made = {path: path.read_bytes() for path in [project / "models/encoder.pth", *project.glob("reports/pretrain/*")]}
    (folder,) = (project / "runs/pretrain").iterdir()
    log = (folder / "metrics.jsonl").read_bytes()
    assert len(made) == 5  # provenance.json among them
    for path in made:
        path.unlink()
    done = moco("pretrain")
    assert done.returncode == 0 and f"taken from {folder.relative_to(project)}" in done.stderr, done.stderr
    assert {path: path.read_bytes() for path in made} == made and (folder / "metrics.jsonl").read_bytes() == log
    (folder / "outputs/models/encoder.pth").write_bytes(b"damaged")
    done = moco("pretrain")
    assert done.returncode == 0 and "encoder.pth: damaged" in done.stderr and "taken from" not in done.stderr
    assert len(list((project / "runs/pretrain").iterdir())) == 2 and (project / "models/encoder.pth").stat().st_size > 9


def test_resume_takes_a_named_checkpoint_and_more_epochs(moco: Moco, project: Path) -> None:
    """Fault 5: the original's --resume, with the epoch taken from the checkpoint."""
    assert moco("data").returncode == 0
    assert moco("pretrain").returncode == 0
    checkpoint = next((project / "runs/pretrain").glob("*/checkpoint_002.pth"))
    write_params(project, pretrain__epochs=4)
    done = moco("pretrain", "--resume", str(checkpoint))
    assert done.returncode == 0, done.stderr
    seen = json.loads((project / "reports/pretrain/metrics.json").read_text())["images_seen"]
    assert seen == 4 * 5 * 8


def test_an_interrupted_resumption_goes_on_from_its_own_state(moco: Moco, project: Path) -> None:
    """Fault 5 once more: a requeued job repeats its command line, --resume included, and must not start over."""
    assert moco("data").returncode == 0
    assert moco("pretrain").returncode == 0
    checkpoint = next((project / "runs/pretrain").glob("*/checkpoint_002.pth"))
    write_params(project, pretrain__epochs=30, checkpoint__every=100)
    logs = set((project / "runs/pretrain").iterdir())
    process = Started(project, "pretrain", "--resume", str(checkpoint))
    while not any('"loss"' in log.read_text() for log in (project / "runs/pretrain").glob("*/metrics.jsonl")
                  if log.parent not in logs):  # fmt: skip
        assert process.runs()
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.finish()[0] == 128 + signal.SIGTERM
    (folder,) = set((project / "runs/pretrain").iterdir()) - logs
    (stopped,) = folder.glob("checkpoint_*.pth")
    done = moco("pretrain", "--resume", str(checkpoint))
    assert done.returncode == 0 and f"continuing from {stopped.relative_to(project)}" in done.stderr, done.stderr
    assert [line["step"] for line in metric_history(folder / "metrics.jsonl") if "loss" in line["metrics"]] == list(
        range(11, 151)
    )


def test_resuming_from_an_older_checkpoint_gives_up_the_later_ones(moco: Moco, project: Path) -> None:
    write_params(project, pretrain__epochs=40, checkpoint__keep=9)
    assert moco("data").returncode == 0
    process = Started(project, "pretrain")
    wait_for_steps(process, project, 30)
    process.send_signal(signal.SIGTERM)
    assert process.finish()[0] == 128 + signal.SIGTERM
    (folder,) = (project / "runs/pretrain").iterdir()
    older = folder / "checkpoint_002.pth"
    last = sorted(folder.glob("checkpoint_*.pth"))[-1]
    done = moco("pretrain", "--resume", str(older))
    assert done.returncode == 0 and f"continuing from {older}" in done.stderr
    log = [line["step"] for line in metric_history(folder / "metrics.jsonl") if "loss" in line["metrics"]]
    assert log == list(range(1, 201)), f"{last} is of the branch that was given up"
    assert (folder / "checkpoint_040.pth").exists()


@pytest.mark.fault("two-jobs")
def test_a_second_process_of_the_same_run_is_refused(moco: Moco, project: Path) -> None:
    write_params(project, pretrain__epochs=2000)
    assert moco("data").returncode == 0
    process = Started(project, "pretrain")
    wait_for_steps(process, project, 2)
    pid = next((project / "runs/pretrain").glob("*/holder")).read_text().split('"pid": ')[1].split(",")[0]
    assert_one_line_error(moco("pretrain"), f"process {pid} on {socket.gethostname()}", "[E-RUN-BUSY]")
    assert process.runs()
    process.send_signal(signal.SIGKILL)
    process.finish()


@pytest.mark.fault("signal")
@pytest.mark.slow
def test_decoding_that_is_stopped_leaves_neither_files_nor_processes(moco: Moco, project: Path) -> None:
    write_dataset(project / "large", unlabeled=5000, size=64)
    text = (project / "params.yaml").read_text().replace("path: dataset", "path: large")
    (project / "params.yaml").write_text(text)
    process = Started(project, "data")
    parent = caches(project / "scratch")
    while not any(path.stat().st_blocks for path in parent.glob(".building-*/unlabeled.u8")):  # workers are at it
        assert process.runs()
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    code, errors = process.finish()
    assert code == 128 + signal.SIGTERM and errors.splitlines()[-1].startswith("stopped by SIGTERM")
    assert [path.name for path in parent.iterdir()] == [SWEEPING]
    assert "Traceback" not in errors


def test_a_checkpoint_of_another_configuration_is_refused_by_name(moco: Moco, project: Path) -> None:
    assert moco("data").returncode == 0
    assert moco("pretrain").returncode == 0
    checkpoint = next((project / "runs/pretrain").glob("*/checkpoint_002.pth"))
    write_params(project, pretrain__width=6)
    assert_one_line_error(
        moco("pretrain", "--resume", str(checkpoint)), "another configuration", "pretrain.width is 4 there and 6 here"
    )


def test_a_checkpoint_that_does_not_know_a_setting_is_refused(moco: Moco, project: Path) -> None:
    assert moco("data").returncode == 0
    assert moco("pretrain").returncode == 0
    checkpoint = next((project / "runs/pretrain").glob("*/checkpoint_002.pth"))
    content = torch.load(checkpoint, weights_only=True)
    del content["params"]["pretrain.dim"]
    torch.save(content, project / "older.pth")
    assert_one_line_error(moco("pretrain", "--resume", "older.pth"), "pretrain.dim is not set there and 16 here")


def test_a_truncated_checkpoint_named_by_the_user_is_one_line(moco: Moco, project: Path) -> None:
    assert moco("data").returncode == 0
    assert moco("pretrain").returncode == 0
    checkpoint = next((project / "runs/pretrain").glob("*/checkpoint_002.pth"))
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    assert_one_line_error(moco("pretrain", "--resume", str(checkpoint)), "checkpoint_002.pth", "damaged")
