"""The loop and time: how long a run is, and what its rates count."""

from __future__ import annotations

import pytest
from loop_helpers import BATCH, Recorder

from moco.errors import Interrupted
from moco.training import loop
from moco.training.loop import Length, LoopState


class Clock:
    """In place of module `time`: it passes where somebody sleeps, and a microsecond at each look."""

    now = 0.0

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def perf_counter(self) -> float:
        self.sleep(1e-6)
        return self.now


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "time", Clock())


def test_the_rate_counts_images_and_leaves_saving_out() -> None:
    whole = Recorder(pause=0.02, save_pause=0.2)
    whole.run(Length(2, None), every=(2, 99, 1))
    rates = [rate for _, rate in whole.metric("images_per_second")]
    assert rates == pytest.approx([BATCH / 0.02] * 2, rel=1e-3)
    minutes = [value * 60 for _, value in whole.metric("minutes")]
    assert minutes == pytest.approx([2 * 0.02, 4 * 0.02 + 0.2], rel=1e-3), "saving counts as time of the run"


def test_the_rate_does_not_gain_from_metrics_that_are_read_slowly(monkeypatch: pytest.MonkeyPatch) -> None:
    mean, pauses = loop._mean, iter((0.2,))
    monkeypatch.setattr(loop, "_mean", lambda values: (loop.time.sleep(next(pauses, 0)), mean(values))[1])
    whole = Recorder(pause=0.02)
    whole.run(Length(3, None), every=(2, 99, 1))
    rates = [rate for _, rate in whole.metric("images_per_second")]
    assert rates == pytest.approx([2 * BATCH / (2 * 0.02 + 0.2), BATCH / 0.02, BATCH / 0.02], rel=1e-3)


def test_a_run_of_minutes_ends_at_its_time_with_a_full_schedule() -> None:
    whole = Recorder(pause=0.01)
    state = whole.run(Length(10**6, 0.6 / 60), every=(5, 10, 10))
    assert 0.6 <= state.seconds < 0.611
    assert whole.fractions == sorted(whole.fractions) and whole.fractions[0] == 0
    assert 0.98 < whole.fractions[-1] <= 1, "the schedule reaches its end"
    assert whole.updates[-1] == 1
    assert whole.events[-2:] == [("monitor", state.step), ("save", state.step)]
    assert whole.logs[-2][0] == whole.logs[-1][0] == state.step


def test_time_spent_before_an_interruption_counts() -> None:
    later = Recorder(pause=0.01)
    later.run(Length(10**6, 1.0), LoopState(seconds=59.8))
    assert 19 <= len(later.batches) <= 20
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
