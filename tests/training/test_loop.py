"""The loop: every batch once, in order, however often it is interrupted."""

from __future__ import annotations

import math
import signal
from typing import Any

import pytest
import torch
from loop_helpers import PER_EPOCH, Recorder

from moco.errors import Interrupted, UserError
from moco.training.loop import Length, LoopState

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
    assert whole.updates == [n / 8 for n in range(1, 9)], "shown after every step, however rare the log is"
    shares = [value for _, value in whole.metric("data_wait_share")]
    assert all(0 <= share <= 1 for share in shares)


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
