"""Real signals, sent to this process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from moco.errors import Interrupted
from moco.training.interrupt import end_with_dvc, raise_on_signals, watch_signals

WATCHED = [signal.SIGTERM, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP]


@pytest.fixture(autouse=True)
def harmless() -> Iterator[list[int]]:
    """A signal that gets past the code under test is noted, and does not end the tests."""
    seen: list[int] = []
    before = {number: signal.signal(number, lambda n, frame: seen.append(n)) for number in WATCHED}
    yield seen
    for number, handler in before.items():
        signal.signal(number, handler)


def send(number: int) -> None:
    os.kill(os.getpid(), number)
    signal.sigpending()  # a call into the interpreter: the handler has run when it returns


@pytest.mark.parametrize("number", WATCHED)
def test_a_signal_sets_the_flag_and_nothing_else(number: signal.Signals) -> None:
    with watch_signals() as flag:
        assert flag.signal is None
        send(number)
        assert flag.signal == number


def test_the_second_ctrl_c_stops_at_once() -> None:
    with watch_signals() as flag:
        send(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)
        assert flag.signal == signal.SIGINT


def test_a_warning_twice_does_not_stop_at_once() -> None:
    with watch_signals() as flag:
        send(signal.SIGUSR2)
        send(signal.SIGTERM)
        assert flag.signal == signal.SIGTERM


@pytest.mark.parametrize("failing", [False, True])
def test_handlers_from_before_are_restored(failing: bool, harmless: list[int]) -> None:
    before = [signal.getsignal(number) for number in WATCHED]
    with suppress(ValueError), watch_signals() as flag:
        if failing:
            raise ValueError
    assert [signal.getsignal(number) for number in WATCHED] == before
    for number in WATCHED:
        send(number)
    assert harmless == WATCHED
    assert flag.signal is None


def test_a_terminal_that_closes_stops_nothing_under_nohup() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with watch_signals() as flag, raise_on_signals():
        send(signal.SIGHUP)
    assert flag.signal is None and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def test_what_is_said_after_the_terminal_has_closed_goes_nowhere(tmp_path: Path) -> None:
    code = """if True:
        import sys, time
        from pathlib import Path
        from moco.training.interrupt import watch_signals
        with watch_signals() as flag:
            Path("began").touch()
            while flag.signal is None:
                time.sleep(0.01)
            for _ in range(2):
                print("stopped", file=sys.stderr, flush=True)
                print("stopped", flush=True)
            Path("saved").touch()
        sys.exit(7)
    """
    ours, theirs = os.openpty()
    process = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, stdout=theirs, stderr=theirs)
    os.close(theirs)
    while not (tmp_path / "began").exists():
        assert process.poll() is None
        time.sleep(0.01)
    os.close(ours)
    process.send_signal(signal.SIGHUP)
    assert process.wait(30) == 7 and (tmp_path / "saved").exists()


def test_usr1_is_left_to_others() -> None:
    before = signal.getsignal(signal.SIGUSR1)
    with watch_signals():
        assert signal.getsignal(signal.SIGUSR1) is before


def test_an_interruption_tells_its_signal() -> None:
    error = Interrupted(signal.SIGTERM, saved=True)
    assert error.signal == signal.SIGTERM
    assert str(error) == "stopped by SIGTERM; the state is saved, the same command continues"
    assert "continues" not in str(Interrupted(signal.SIGTERM, saved=False))


@pytest.mark.parametrize("number", WATCHED)
def test_outside_the_loop_a_signal_raises_and_handlers_of_errors_do_not_take_it(number: signal.Signals) -> None:
    with pytest.raises(Interrupted) as caught, raise_on_signals():
        try:
            send(number)
        except Exception:
            pytest.fail("taken for an error")
    assert caught.value.signal == number


# What DVC is to a stage: it starts a shell, which starts the stage.
DVC = """
import os, subprocess, sys
stage = [sys.executable, "-c", sys.argv[1]]
command = {"direct": stage, "shell": ["sh", "-c", '"$@"; true', "sh", *stage]}[sys.argv[2]]
subprocess.run(command, env={**os.environ, "DVC_STAGE": "pretrain"})
"""
IN_STAGE = """
import time
from moco.errors import Interrupted
from moco.training.interrupt import end_with_dvc, raise_on_signals
try:
    with raise_on_signals():
        end_with_dvc()
        print("at work", flush=True)
        time.sleep(60)
except Interrupted as stopped:
    print("stopped by", stopped.signal, flush=True)
"""


@pytest.mark.fault("dvc-gone")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("way", ["direct", "shell"])
def test_a_stage_is_told_to_stop_when_dvc_has_ended_in_any_way(number: signal.Signals, way: str) -> None:
    words = [sys.executable, "-c", DVC, IN_STAGE, way]
    dvc = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert dvc.stdout is not None and dvc.stdout.readline() == "at work\n"
    dvc.send_signal(number)
    assert dvc.wait(timeout=30) == -number
    said, told = dvc.communicate(timeout=30)
    assert said == f"stopped by {int(signal.SIGTERM)}\n" and "dvc has ended" in told


def test_a_command_that_dvc_has_not_started_watches_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DVC_STAGE", raising=False)
    threads = threading.active_count()
    end_with_dvc()
    assert threading.active_count() == threads
