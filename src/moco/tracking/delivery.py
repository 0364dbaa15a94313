"""The process that carries a run's metric log to MLflow and other sinks while the run goes on: beside it, so that
whatever a server does, or does not do, costs the training nothing.

    moco.environment.python_module("moco.tracking.delivery", RUN-FOLDER)

Its standard input tells which store (one line of JSON), and by its end that the run has ended, in whatever way. What
could not be brought there stands in the one line that it writes.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import time
from pathlib import Path

from moco.settings.tracking import TrackingConfig
from moco.tracking.metric_log import NAME, close_abandoned
from moco.tracking.sinks import Sink, sinks

EVERY = 10.0  # seconds between two deliveries
LAST_TRIES = 3  # at the run's end: a busy SQLite file, a server that starts again


def deliver(folder: Path, config: TrackingConfig) -> str:
    """Bring the log to its stores until the run has ended; return what went wrong in the end, or ''."""
    places = sinks(folder, config)
    ended, wait = False, 0.0  # at first at once: MLflow takes seconds to import
    while not ended:
        ended, wait = _ended_within(wait), EVERY
        if ended:
            close_abandoned(folder / NAME, quiet=0)
        problems = [problem for sink in places if (problem := _replay(sink, LAST_TRIES if ended else 1))]
    return "; ".join(problems)


def _replay(sink: Sink, tries: int) -> str:
    """Return what went wrong at the last try, or ''."""
    problem = ""
    for attempt in range(tries):
        time.sleep(attempt)
        try:
            sink.replay()
        except Exception as error:  # MLflow and its HTTP layers raise many kinds
            problem = sink.explain(error)
        else:
            return ""
    return problem


def _ended_within(seconds: float) -> bool:
    return bool(select.select([sys.stdin], [], [], seconds)[0])


def _line() -> bytes:
    """Return the first line, and read nothing beyond it, which a buffer would take."""
    line = b""
    while not line.endswith(b"\n") and (byte := os.read(sys.stdin.fileno(), 1)):
        line += byte
    return line


def main() -> None:
    """Deliver the log of the run's folder in the first argument, and print what went wrong, if anything."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # they are the run's; this ends with it
    config = TrackingConfig(**json.loads(_line()))
    problem = deliver(Path(sys.argv[1]), config)
    if problem:
        print(problem, flush=True)


if __name__ == "__main__":
    main()
