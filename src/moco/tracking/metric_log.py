"""The metric log: append-only JSON lines, one file a run. It is the truth; everything else is fed from it.

Every line is an object with `event` and `time` (seconds since 1970):
    start     stage, params, tags       a process begins or takes up the run
    resume    step                      metrics of later steps, written before this line, are void
    metrics   step, metrics             numbers by name
    artifact  path, folder              a file worth keeping with the run
    model     path, name, metrics       a trained classifier
    end       status                    FINISHED, FAILED or KILLED
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FORMAT = 1


class MetricLog:
    """Writes one. Lines are whole: each is one write to a file opened for appending."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        torn = path.exists() and not path.read_bytes().endswith(b"\n") and path.stat().st_size > 0
        self.file = path.open("a", encoding="utf-8")
        if torn:  # a crash in the middle of a line: end it, so that it is skipped alone
            self.file.write("\n")

    def write(self, event: str, **fields: Any) -> None:
        line = {"event": event, "time": round(time.time(), 3), **fields}
        self.file.write(json.dumps(line, default=str) + "\n")
        self.file.flush()

    def sync(self) -> None:
        """Forces what was written onto the disk."""
        os.fsync(self.file.fileno())

    def close(self) -> None:
        self.sync()
        self.file.close()


def read_events(path: Path) -> Iterator[dict[str, Any]]:
    """Every whole line, in order. A torn line (crash while writing) is passed over."""
    with path.open(encoding="utf-8") as file:
        for line in file:
            try:
                event = json.loads(line)
            except ValueError:
                continue
            if isinstance(event, dict) and "event" in event:
                yield event


def metric_history(path: Path) -> list[dict[str, Any]]:
    """The valid metric lines in order of their steps; void ones (see `resume`) are left out."""
    kept: list[dict[str, Any]] = []
    for event in read_events(path):
        if event["event"] == "metrics":
            kept.append(event)
        elif event["event"] == "resume":
            kept = [line for line in kept if line["step"] <= event["step"]]
    return kept


def finite(metrics: dict[str, float]) -> dict[str, float]:
    """Without NaN and infinity, which JSON does not have."""
    return {name: float(value) for name, value in metrics.items() if math.isfinite(value)}
