"""Training that leaves the track: told, stopped before anything is saved, or taken back as often as configured."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import Moco, assert_one_line_error, write_params
from moco.methods.step import ContrastStep
from moco.tracking.metric_log import metric_history, read_events
from moco.training import features

pytestmark = pytest.mark.fault("divergence")
PER_EPOCH, EPOCHS = 5, 6
Breaks = Callable[[ContrastStep, int], bool]


@pytest.fixture
def break_when(monkeypatch: pytest.MonkeyPatch) -> Callable[[Breaks], None]:
    """Loss and weights become NaN in the steps for which the given function is true."""
    take = ContrastStep.__call__

    def choose(when: Breaks) -> None:
        def step(self: ContrastStep, indices: Any, images: Any, fraction: float, number: int) -> dict[str, Any]:
            metrics = take(self, indices, images, fraction, number)
            if when(self, number):
                metrics["loss"] = metrics["loss"] * float("nan")
                with torch.no_grad():
                    next(self.model.query_encoder.parameters()).fill_(float("nan"))
            return metrics

        monkeypatch.setattr(ContrastStep, "__call__", step)

    return choose


def sound(project: Path) -> list[str]:
    """Names of the checkpoints, all of whose weights are numbers."""
    paths = sorted((project / "runs").glob("pretrain/*/checkpoint_*.pth"))
    for path in paths:
        model = torch.load(path, weights_only=True)["model"]
        assert all(bool(value.isfinite().all()) for value in model.values() if value.is_floating_point()), path
    return [path.name for path in paths]


def prepared(moco: Moco, project: Path, **changes: object) -> float:
    """The configured learning rate."""
    write_params(project, pretrain__epochs=EPOCHS, checkpoint__keep=9, pretrain__schedule="constant", **changes)
    assert moco("data").returncode == 0
    return 0.12


def test_a_learning_rate_that_is_far_too_large_stops_with_one_line(moco: Moco, project: Path) -> None:
    prepared(moco, project, pretrain__lr=1e30)
    assert_one_line_error(moco("pretrain"), "training has diverged", "lower")
    assert sound(project) == []


def test_it_steps_back_with_half_the_rate_and_says_so(
    moco: Moco, project: Path, break_when: Callable[[Breaks], None]
) -> None:
    lr = prepared(moco, project, checkpoint__max_rollbacks=2)
    break_when(lambda step, number: number >= 12 and step.config.lr > 0.6 * lr)
    done = moco("pretrain")
    assert done.returncode == 0, done.stderr
    assert "warning: the loss became nan near step 13: training has diverged" in done.stderr
    assert "back to the last checkpoint with 0.5 of pretrain.lr (step back 1 of 2)" in done.stderr
    assert "checkpoint_002.pth" in done.stderr
    (log,) = (project / "runs/pretrain").glob("*/metrics.jsonl")
    lines = [line for line in metric_history(log) if "loss" in line["metrics"]]
    assert [line["step"] for line in lines] == list(range(1, PER_EPOCH * EPOCHS + 1)), "every step once"
    rates = [line["metrics"]["lr"] for line in lines]
    assert rates[: 2 * PER_EPOCH] == [pytest.approx(rates[0])] * 2 * PER_EPOCH
    assert rates[2 * PER_EPOCH :] == [pytest.approx(rates[0] / 2)] * (EPOCHS - 2) * PER_EPOCH
    assert json.loads((project / "reports/pretrain/metrics.json").read_text())["steps_back"] == 1
    assert sound(project) == [f"checkpoint_{epoch:03}.pth" for epoch in range(1, EPOCHS + 1)]
    assert [event["status"] for event in read_events(log) if event["event"] == "end"] == ["FAILED", "FINISHED"]


def test_steps_back_that_do_not_help_end_and_a_new_start_knows_of_them(
    moco: Moco, project: Path, break_when: Callable[[Breaks], None]
) -> None:
    prepared(moco, project, checkpoint__max_rollbacks=2)
    break_when(lambda step, number: number >= 12)
    for wanted in (2, 0):
        done = moco("pretrain")
        assert_one_line_error(done, "training has diverged")
        assert done.stderr.count("(step back") == wanted
        used = [line.rpartition("/")[2] for line in done.stderr.splitlines() if line.startswith("continuing from")]
        # With the second step back the newest checkpoint is given up, and made again.
        assert used == (["checkpoint_002.pth", "checkpoint_001.pth"] if wanted else ["checkpoint_002.pth"])
    assert sound(project) == ["checkpoint_001.pth", "checkpoint_002.pth"]


def test_weights_that_break_while_the_loss_does_not_are_never_saved(
    moco: Moco, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared(moco, project)
    take = ContrastStep.__call__

    def step(self: ContrastStep, indices: Any, images: Any, fraction: float, number: int) -> dict[str, Any]:
        metrics = take(self, indices, images, fraction, number)
        if number == 3 * PER_EPOCH - 1:
            with torch.no_grad():
                list(self.model.key_encoder.parameters())[-1].view(-1)[0] = float("inf")
        return metrics

    monkeypatch.setattr(ContrastStep, "__call__", step)
    assert_one_line_error(moco("pretrain"), "weights are no numbers any more after step 15")
    assert sound(project) == ["checkpoint_001.pth", "checkpoint_002.pth"]


def test_a_collapse_is_a_divergence(moco: Moco, project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lr = prepared(moco, project, checkpoint__max_rollbacks=1)
    spread = features.feature_std
    calls: list[int] = []

    def collapsed(found: torch.Tensor) -> float:
        calls.append(1)
        return 0.0 if len(calls) == 3 else spread(found)

    monkeypatch.setattr(features, "feature_std", collapsed)
    done = moco("pretrain")
    assert done.returncode == 0, done.stderr
    assert "warning: the features collapsed" in done.stderr and "step back 1 of 1" in done.stderr
    (log,) = (project / "runs/pretrain").glob("*/metrics.jsonl")
    rates = [line["metrics"]["lr"] for line in metric_history(log) if "lr" in line["metrics"]]
    assert rates[-1] == pytest.approx(rates[0] / 2) == pytest.approx(lr * 8 / 256 / 2)


def test_a_branch_goes_on_with_the_rate_of_the_run_that_stepped_back(
    moco: Moco, project: Path, break_when: Callable[[Breaks], None]
) -> None:
    lr = prepared(moco, project, checkpoint__max_rollbacks=1)
    break_when(lambda step, number: number >= 12 and step.config.lr > 0.6 * lr)
    assert moco("pretrain").returncode == 0
    (named,) = (project / "runs/pretrain").glob(f"*/checkpoint_{EPOCHS:03}.pth")
    write_params(project, pretrain__epochs=EPOCHS + 2, pretrain__schedule="constant")
    done = moco("pretrain", "--resume", str(named))
    assert done.returncode == 0, done.stderr
    assert json.loads((project / "reports/pretrain/metrics.json").read_text())["steps_back"] == 1


def test_a_signal_that_comes_with_a_divergence_is_not_forgotten(
    moco: Moco, project: Path, break_when: Callable[[Breaks], None]
) -> None:
    """Slurm's warning comes once."""
    prepared(moco, project, checkpoint__max_rollbacks=2, monitor__log_every=4)
    sent: list[int] = []

    def breaks(step: ContrastStep, number: int) -> bool:
        if number == 12 and not sent:
            sent.append(number)
            os.kill(os.getpid(), signal.SIGUSR2)
            return True
        return False

    break_when(breaks)
    done = moco("pretrain")
    assert done.returncode == 128 + signal.SIGUSR2, done.stderr
    assert "(step back 1 of 2)" in done.stderr and "the same command continues" in done.stderr
    assert moco("pretrain").returncode == 0
    assert json.loads((project / "reports/pretrain/metrics.json").read_text())["steps_back"] == 1


def test_weights_of_the_baseline_that_break_in_its_last_step_give_no_accuracy(moco: Moco, project: Path) -> None:
    write_params(
        project,
        baseline__epochs=1,
        baseline__minutes=None,
        baseline__batch_size=20,
        baseline__warmup=0.0,
        baseline__lr=1e40,
    )
    assert moco("data").returncode == 0
    assert_one_line_error(moco("baseline"), "weights are no numbers any more after step 1")
    assert not (project / "reports/baseline/metrics.json").exists()
