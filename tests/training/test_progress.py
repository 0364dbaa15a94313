"""What is said while a run is at work, and what a crash may cost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from loop_helpers import Recorder
from test_loop_time import Clock

from conftest import Moco, write_params
from moco.errors import UserError
from moco.methods.step import ContrastStep
from moco.training import loop, progress
from moco.training.loop import Length
from moco.training.progress import ProgressDisplay


class Wall(Clock):
    """Of the display."""

    def monotonic(self) -> float:
        return self.now


@pytest.mark.fault("progress")
@pytest.mark.parametrize("resumed", [0.0, 0.5])
def test_the_time_left_is_measured_from_the_beginning(
    resumed: float, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run of twelve minutes: its first report comes after two."""
    wall = Wall()
    monkeypatch.setattr(progress, "time", wall)
    with ProgressDisplay("pretrain", terminal=False) as display:
        wall.sleep(30)  # until the first step
        display.start(resumed)
        rest = 1 - resumed
        wall.sleep(120 * rest)
        display.update(resumed + rest * 120 / 720, 10.0, "loss 1.000")
    left = {0.0: ("10:00 left", "9:59 left"), 0.5: ("5:00 left", "4:59 left")}[resumed]
    said = capsys.readouterr().err
    assert any(words in said for words in left), said


@pytest.mark.fault("progress")
def test_there_is_a_line_after_each_long_step(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Steps of a minute, a log every hundred of them."""
    wall = Wall()
    monkeypatch.setattr(progress, "time", wall)
    monkeypatch.setattr(loop, "time", wall)

    class Shown(Recorder):
        display = ProgressDisplay("pretrain", terminal=False)

        def start(self, fraction: float) -> None:
            self.display.start(fraction)

        def update(self, fraction: float, rate: float, words: str) -> None:
            self.display.update(fraction, rate, words)

    Shown(pause=60.0).run(Length(4, None), every=(100, 100, 100))
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("pretrain: ")]
    assert len(lines) == 8 and "left" in lines[0]


@pytest.mark.fault("progress")
def test_long_epochs_are_saved_and_monitored_by_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    """An epoch of 60 steps of a minute each: a state and a look every ten minutes, not one at the end alone."""
    monkeypatch.setattr(loop, "time", Clock())
    whole = Recorder(pause=60.0, timed_monitor=True)
    whole.run(Length(1, None), pool=240, every=(1000, 1, 1))
    for name in ("save", "monitor"):
        steps = [step for event, step in whole.events if event == name]
        assert steps == list(range(10, 61, 10)), name
    chosen = Recorder(pause=60.0)  # a monitor that chooses an epoch does not follow the clock
    chosen.run(Length(1, None), pool=240, every=(1000, 1, 1))
    assert [step for event, step in chosen.events if event == "monitor"] == [60]


@pytest.mark.fault("progress")
def test_states_by_minutes_continue_to_the_same_bits(
    moco: Moco, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here after every step; a crash in the midst of the second epoch loses that step alone."""
    write_params(project, checkpoint__every=100, monitor__every=100)
    assert moco("data").returncode == 0 and moco("pretrain").returncode == 0
    undisturbed = (project / "models/encoder.pth").read_bytes()
    (project / "runs").rename(project / "runs-undisturbed")
    (project / "models/encoder.pth").unlink()
    monkeypatch.setattr(loop, "MINUTES", 0.0)
    call, begun = ContrastStep.__call__, []

    def crashing(self: ContrastStep, indices: Any, images: Any, fraction: float, number: int) -> Any:
        begun.append(number)
        if number == 7 and begun.count(7) == 1:
            raise UserError("the machine is gone")
        return call(self, indices, images, fraction, number)

    monkeypatch.setattr(ContrastStep, "__call__", crashing)
    assert moco("pretrain").returncode != 0
    done = moco("pretrain")
    assert done.returncode == 0 and "continuing from" in done.stderr, done.stderr
    assert begun == [*range(8), *range(7, 10)]
    assert (project / "models/encoder.pth").read_bytes() == undisturbed


@pytest.mark.fault("progress")
def test_the_classifiers_features_and_fit_are_shown(moco: Moco, project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "LINE_EVERY", 0.0)
    monkeypatch.setattr(progress, "FIRST_LINE", 0.0)
    said = ""
    for stage in ("data", "pretrain", "train", "eval"):
        done = moco(stage)
        assert done.returncode == 0, done.stderr
        said += done.stderr
    for words in ("features: ", "linear classifier: ", "features of val: ", "eval: ", "20 of 20 images"):
        assert words in said, words
