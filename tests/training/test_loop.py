"""The loop: every batch once, in order, however often it is interrupted."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from moco.data.batches import EpochSampler, Fetcher
from moco.errors import Interrupted, UserError
from moco.training import loop
from moco.training.interrupt import StopFlag
from moco.training.loop import Hooks, Length, LoopState, run_loop

POOL, BATCH, PER_EPOCH = 11, 4, 2  # three images are left out of each epoch


@dataclass
class Recorder:
    """A run with everything it did written down."""

    stop_at: int | None = None  # a signal arrives during this step
    stop: StopFlag = field(default_factory=StopFlag)
    batches: list[tuple[int, tuple[int, ...]]] = field(default_factory=list)
    fractions: list[float] = field(default_factory=list)
    logs: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    events: list[tuple[str, int]] = field(default_factory=list)
    saved: dict[str, Any] = field(default_factory=dict)
    updates: list[float] = field(default_factory=list)
    metrics: Callable[[int], dict[str, Any]] = lambda number: {"loss": torch.tensor(float(number))}
    pause: float = 0.0
    save_pause: float = 0.0

    def step(self, indices: np.ndarray, images: Tensor, fraction: float, number: int) -> dict[str, Any]:
        assert images[:, 0, 0, 0].tolist() == indices.tolist(), "images belong to their indices"
        assert images.dtype is torch.uint8
        self.batches.append((number, tuple(indices.tolist())))
        self.fractions.append(fraction)
        time.sleep(self.pause)
        if number == self.stop_at:
            self.stop.signal = signal.SIGTERM
        return self.metrics(number)

    def save(self, state: LoopState) -> None:
        time.sleep(self.save_pause)
        self.events.append(("save", state.step))
        self.saved = dict(state.as_dict())

    def monitor(self) -> dict[str, float]:
        self.events.append(("monitor", len(self.batches)))
        return {"knn_accuracy": 0.5}

    def update(self, fraction: float, rate: float, words: str) -> None:
        assert rate > 0
        self.updates.append(fraction)

    def run(
        self, length: Length, state: LoopState | None = None, *, every: tuple[int, int, int] = (1, 1, 1),
        pool: int = POOL,
    ) -> LoopState:  # fmt: skip
        """every: steps between logs, epochs between monitoring, epochs between saving."""
        state = state or LoopState()
        images = np.arange(pool, dtype=np.uint8)[:, None, None, None].repeat(3, 3)
        hooks = Hooks(
            lambda metrics, step: self.logs.append((step, metrics)), every[0], self, self.stop,
            self.monitor, every[1], self.save, every[2],
        )  # fmt: skip
        sampler = EpochSampler(np.arange(pool), BATCH, seed=3)
        run_loop(self.step, sampler, Fetcher(images, pin=False), length, state, hooks)
        return state

    def metric(self, name: str) -> list[tuple[int, float]]:
        return [(step, metrics[name]) for step, metrics in self.logs if name in metrics]


EPOCHS = Length(4, None)
STEPS = 4 * PER_EPOCH


def undisturbed() -> Recorder:
    whole = Recorder()
    whole.run(EPOCHS)
    return whole


def test_a_run_of_epochs_sees_every_image_once_an_epoch_but_the_remainder() -> None:
    whole = Recorder()
    state = whole.run(EPOCHS)
    assert [number for number, _ in whole.batches] == list(range(STEPS))
    epochs = [whole.batches[i][1] + whole.batches[i + 1][1] for i in range(0, STEPS, PER_EPOCH)]
    assert all(len(set(epoch)) == 8 for epoch in epochs)
    assert len(set(epochs)) == 4, "every epoch has an order of its own"
    assert whole.fractions == [i / STEPS for i in range(STEPS)]
    assert (state.step, state.epoch, state.batch) == (STEPS, 4, 0)
    assert state.seconds > 0


@pytest.mark.parametrize("stop_at", range(STEPS))
def test_interrupted_at_any_step_and_resumed_it_sees_the_same_batches(stop_at: int) -> None:
    whole = undisturbed()
    first = Recorder(stop_at=stop_at)
    with pytest.raises(Interrupted) as caught:
        first.run(EPOCHS)
    assert caught.value.signal == signal.SIGTERM
    assert first.saved["step"] == len(first.batches) == stop_at + 1, "the step under way is finished and saved"
    second = Recorder()
    state = second.run(EPOCHS, LoopState(**first.saved))
    assert first.batches + second.batches == whole.batches
    assert first.fractions + second.fractions == whole.fractions
    assert (state.step, state.epoch, state.batch) == (STEPS, 4, 0)
    assert state.seconds > first.saved["seconds"]
    monitored = [step for step, _ in first.metric("knn_accuracy") + second.metric("knn_accuracy")]
    assert monitored == [2, 4, 6, 8], "what an interruption put off is made up for"
    assert second.events[-1] == ("save", STEPS)


@pytest.mark.parametrize("stop_at", range(STEPS))
def test_lines_of_the_log_are_the_same_after_an_interruption_in_their_midst(stop_at: int) -> None:
    def metrics(number: int) -> dict[str, Any]:
        return {"loss": torch.tensor(0.1 * number**2), "lr": 0.3 * number}

    whole = Recorder(metrics=metrics)
    whole.run(EPOCHS, every=(3, 99, 99))
    first = Recorder(stop_at=stop_at, metrics=metrics)
    with pytest.raises(Interrupted):
        first.run(EPOCHS, every=(3, 99, 99))
    second = Recorder(metrics=metrics)
    second.run(EPOCHS, LoopState(**first.saved), every=(3, 99, 99))
    for name in ("loss", "lr"):
        assert first.metric(name) + second.metric(name) == whole.metric(name)


def test_interrupted_after_every_step_it_still_ends() -> None:
    whole, seen, state = undisturbed(), [], LoopState()
    for number in range(STEPS):
        part = Recorder(stop_at=number)
        with pytest.raises(Interrupted):
            part.run(EPOCHS, state)
        seen += part.batches
        state = LoopState(**part.saved)
    assert seen == whole.batches
    last = Recorder()
    last.run(EPOCHS, state)
    assert last.batches == []


def test_a_finished_run_does_nothing_more() -> None:
    whole = undisturbed()
    again = Recorder()
    again.run(EPOCHS, LoopState(**whole.saved))
    assert again.batches == [] and again.events == [] and again.logs == []


@pytest.mark.parametrize(
    ("every", "monitored", "saved"),
    [((1, 1, 1), [2, 4, 6, 8], [2, 4, 6, 8]), ((1, 3, 2), [6, 8], [4, 8]), ((1, 99, 99), [8], [8])],
)
def test_monitoring_and_saving_come_when_promised_and_at_the_end(
    every: tuple[int, int, int], monitored: list[int], saved: list[int]
) -> None:
    whole = Recorder()
    whole.run(EPOCHS, every=every)
    assert [step for name, step in whole.events if name == "monitor"] == monitored
    assert [step for name, step in whole.events if name == "save"] == saved
    assert whole.events[-2:] == [("monitor", 8), ("save", 8)], "the last save knows the last monitoring"
    assert whole.metric("knn_accuracy") == [(step, 0.5) for step in monitored]
    assert whole.saved["step"] == STEPS


@pytest.mark.parametrize("tensors", [True, False])
def test_metrics_are_means_over_the_steps_since_the_last_log(tensors: bool) -> None:
    def metrics(number: int) -> dict[str, Any]:
        return {"loss": torch.tensor(float(number)) if tensors else float(number), "lr": 0.5}

    whole = Recorder(metrics=metrics)
    whole.run(EPOCHS, every=(3, 99, 99))
    assert whole.metric("loss") == [(3, 1.0), (6, 4.0), (8, 6.5)]
    assert whole.metric("lr") == [(3, 0.5), (6, 0.5), (8, 0.5)]
    assert [value for _, value in whole.metric("epoch")] == [1.5, 3.0, 4.0]
    assert whole.updates == [3 / 8, 6 / 8, 1.0]
    shares = [value for _, value in whole.metric("data_wait_share")]
    assert all(0 <= share <= 1 for share in shares)


def test_the_rate_counts_images_and_leaves_saving_out() -> None:
    whole = Recorder(pause=0.02, save_pause=0.2)
    whole.run(Length(2, None), every=(2, 99, 1))
    rates = [rate for _, rate in whole.metric("images_per_second")]
    assert len(rates) == 2
    assert all(60 < rate <= BATCH / 0.02 for rate in rates), rates  # 4 images in 0.02 s and a little
    minutes = [value for _, value in whole.metric("minutes")]
    assert minutes[1] * 60 > 0.2, "saving counts as time of the run"


def test_the_rate_does_not_gain_from_metrics_that_are_read_slowly(monkeypatch: pytest.MonkeyPatch) -> None:
    mean, pauses = loop._mean, iter((0.2,))
    monkeypatch.setattr(loop, "_mean", lambda values: (time.sleep(next(pauses, 0)), mean(values))[1])
    whole = Recorder(pause=0.02)
    whole.run(Length(3, None), every=(2, 99, 1))
    assert all(0 < rate <= BATCH / 0.02 for _, rate in whole.metric("images_per_second"))


def test_a_run_of_minutes_ends_near_its_time_with_a_full_schedule() -> None:
    seconds = 0.6
    whole = Recorder(pause=0.01)
    began = time.perf_counter()
    state = whole.run(Length(10**6, seconds / 60), every=(5, 10, 10))
    assert seconds <= time.perf_counter() - began < seconds + 1
    assert state.seconds >= seconds
    assert whole.fractions == sorted(whole.fractions) and whole.fractions[0] == 0
    assert 0.8 < whole.fractions[-1] <= 1, "the schedule reaches its end"
    assert whole.updates[-1] == 1
    assert whole.events[-2:] == [("monitor", state.step), ("save", state.step)]
    assert whole.logs[-2][0] == whole.logs[-1][0] == state.step


def test_time_spent_before_an_interruption_counts() -> None:
    later = Recorder(pause=0.01)
    began = time.perf_counter()
    later.run(Length(10**6, 1.0), LoopState(seconds=59.8))
    assert time.perf_counter() - began < 2
    assert later.fractions[0] == pytest.approx(59.8 / 60)


def test_a_run_whose_time_runs_out_while_saving_still_ends_with_monitoring() -> None:
    whole = Recorder(save_pause=0.3)
    state = whole.run(Length(10**6, 0.25 / 60), every=(100, 100, 1))
    assert whole.events[-2:] == [("monitor", state.step), ("save", state.step)]
    assert whole.logs[-1][1] == {"knn_accuracy": 0.5}
    assert "loss" in whole.logs[-2][1]


def test_interrupted_as_its_time_runs_out_it_still_ends_with_monitoring() -> None:
    length = Length(10**6, 0.01 / 60)
    first = Recorder(stop_at=0, pause=0.02)
    with pytest.raises(Interrupted):
        first.run(length)
    assert [name for name, _ in first.events] == ["save"]
    later = Recorder()
    state = later.run(length, LoopState(**first.saved))
    assert (later.batches, later.events) == ([], [("monitor", 0), ("save", 1)])
    again = Recorder()
    again.run(length, state)
    assert again.events == [], "it is over"


@pytest.mark.parametrize(("length", "steps"), [(Length(1, 10.0), 2), (Length(3, None), 6)])
def test_epochs_end_a_run_even_when_minutes_are_left(length: Length, steps: int) -> None:
    whole = Recorder()
    assert whole.run(length).step == steps


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_a_user_error(value: float) -> None:
    whole = Recorder(metrics=lambda number: {"loss": torch.tensor(value if number == 2 else 1.0)})
    with pytest.raises(UserError, match=r"diverged") as caught:
        whole.run(EPOCHS)
    assert "\n" not in str(caught.value)
    assert [step for step, _ in whole.metric("loss")] == [1, 2]


def test_a_state_after_divergence_is_never_saved() -> None:
    """Logging is rarer than saving here: what is saved must be checked all the same."""
    whole = Recorder(metrics=lambda number: {"loss": torch.tensor(math.nan if number >= 3 else 1.0)})
    with pytest.raises(UserError, match="diverged"):
        whole.run(EPOCHS, every=(100, 100, 1))
    assert whole.events == [("save", 2)]
    stopped = Recorder(stop_at=3, metrics=lambda number: {"loss": math.nan if number >= 3 else 1.0})
    with pytest.raises(UserError, match="diverged"):
        stopped.run(EPOCHS, every=(100, 100, 100))
    assert stopped.events == []


def test_a_pool_smaller_than_the_batch_is_one_smaller_batch() -> None:
    whole = Recorder()
    state = whole.run(Length(3, None), pool=3)
    assert [sorted(indices) for _, indices in whole.batches] == [[0, 1, 2]] * 3
    assert (state.step, state.epoch) == (3, 3)


def test_an_error_in_the_step_reaches_the_caller() -> None:
    def metrics(number: int) -> dict[str, Any]:
        raise RuntimeError("inside the step")

    whole = Recorder(metrics=metrics)
    with pytest.raises(RuntimeError, match="inside the step"):
        whole.run(EPOCHS)
    assert whole.events == []
