"""The metric log: append-only JSON lines, one file a run. It is the truth; everything else is fed from it.

Every line is an object with `event` and `time` (seconds since 1970):
    start     stage, params, tags       a process begins or takes up the run
    resume    step                      metrics of later steps, written before this line, are void
    metrics   step, metrics             numbers by name
    artifact  path                      a file worth keeping with the run; paths are relative to the log's folder
    model     files, tags               a trained classifier: its files, to be registered
    end       status                    FINISHED, FAILED or KILLED
"""

from __future__ import annotations

import errno
import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moco.errors import UserError

FORMAT = 1


class MetricLog:
    """Writes one. Lines are whole: each is one write to a file opened for appending."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self.continued = path.exists() and path.stat().st_size > 0
        # A crash or a full disk in the middle of a line: the next one ends it, so that it is skipped alone.
        self.torn = self.continued and not path.read_bytes().endswith(b"\n")
        self.file = path.open("ab", buffering=0)

    def write(self, event: str, **fields: Any) -> None:
        """Raises UserError where the disk is full."""
        line = json.dumps({"event": event, "time": round(time.time(), 3), **fields}, default=str)
        data = f"{chr(10) if self.torn else ''}{line}\n".encode()
        try:
            self.torn = self.file.write(data) != len(data)
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written: {error.strerror}") from None
        if self.torn:
            raise UserError(f"{self.path}: cannot be written: the disk is full")

    def close(self) -> None:
        """Forces what was written onto the disk. Raises UserError where that fails."""
        try:
            with self.file:
                os.fsync(self.file.fileno())
        except OSError as error:
            if error.errno != errno.EINVAL:  # a file system without fsync
                raise UserError(f"{self.path}: cannot be written: {error.strerror}") from None


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
