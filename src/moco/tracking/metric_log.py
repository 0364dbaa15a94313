"""The metric log: append-only JSON lines, one file a run. It is the truth; everything else is fed from it.

Every line is an object with `event` and `time` (seconds since 1970); docs/metric-log.md describes them for others:
    start       format, stage, name,    a process begins or takes up the run
                params, tags,
                dataset, pipeline
    resume      step, git_commit,       metrics of later steps, written before this line, are void; code from then on
                git_dirty
    metrics     step, metrics           numbers by name
    system      metrics                 the machine, by name
    checkpoint  step, path, metrics     a state was saved; metrics: the last value of each
    artifact    path                    a file worth keeping with the run; paths are relative to the log's folder
    model       files, tags, needs      a trained classifier: its files, to be registered; needs: its packages
    end         status                  FINISHED, FAILED or KILLED
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import math
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from moco.errors import UserError
from moco.redaction import redact_tree

FORMAT = 2
NAME = "metrics.jsonl"
LOCK = "lock"  # beside the log, held by the process that makes the run
SHOWN = ("params", "tags", "dataset", "pipeline")  # fields of texts that come from settings and the environment
QUIET = 600.0  # seconds without a line after which a run that nobody holds counts as dead


NEWER = f"of a newer format than {FORMAT}, the newest that this version of moco knows"
# Keys that an event must have, with the types of their values.
KEYS: dict[str, dict[str, type | tuple[type, ...]]] = {
    "start": {"stage": str, "name": str, "params": dict, "tags": dict},
    "resume": {"step": int}, "metrics": {"step": int, "metrics": dict}, "system": {"metrics": dict},
    "checkpoint": {"step": int, "path": str, "metrics": dict}, "artifact": {"path": str},
    "model": {"files": list, "tags": dict, "needs": dict, "image": list}, "end": {"status": str},
}  # fmt: skip
# The same for what may be missing, or empty.
OPTIONAL: dict[str, dict[str, type]] = {
    "dataset": {"name": str, "digest": str, "source": dict, "images": dict},
    "pipeline": {"key": str, "name": str, "params": dict, "tags": dict},
}
STATUSES = ("FINISHED", "FAILED", "KILLED")


def event_problem(event: dict[str, Any]) -> str:
    """Return why an event of the log cannot be read, '' where it can. Unknown events are well."""
    return next(_problems(event), "") if event["event"] in tuple(KEYS) else ""


def _problems(event: dict[str, Any]) -> Iterator[str]:
    kind, form = event["event"], event.get("format", FORMAT)
    if not _number(form) or form > FORMAT:
        yield NEWER
    if not _number(event.get("time")):
        yield f"event '{kind}' has no time"
    for name, expected in KEYS[kind].items():
        if not isinstance(event.get(name), expected):
            yield f"event '{kind}' has no valid '{name}'"
    if not all(_number(value) for value in event.get("metrics", {}).values()):
        yield f"event '{kind}' has a metric that is not a number"
    if kind == "end" and event["status"] not in STATUSES:
        yield f"event 'end' has the status '{event['status'][:40]}'"
    if kind == "model" and not all(isinstance(path, str) for path in event["files"]):
        yield "event 'model' has no valid 'files'"
    for name, keys in OPTIONAL.items():
        part = event.get(name)
        if part and not (isinstance(part, dict) and all(isinstance(part.get(k), t) for k, t in keys.items())):
            yield f"event '{kind}' has no valid '{name}'"


def _number(value: Any) -> bool:
    return isinstance(value, int | float)


class MetricLog:
    """Writes one. Lines are whole: each is one write to a file opened for appending."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self.continued = path.exists() and path.stat().st_size > 0
        # A crash or a full disk in the middle of a line: the next one ends it, so that it is skipped alone.
        self.torn = self.continued and _last_byte(path) != b"\n"
        self.file = path.open("ab", buffering=0)
        self.lock = threading.Lock()  # the run's own thread writes, and that which samples the machine

    def write(self, event: str, **fields: Any) -> None:
        """Write one line. Raises UserError where the disk is full.

        What MLflow shows as text is written without passwords and keys.
        """
        fields = {name: redact_tree(value) if name in SHOWN else value for name, value in fields.items()}
        line = json.dumps({"event": event, "time": round(time.time(), 3), **fields}, default=str)
        with self.lock:
            data = f"{chr(10) if self.torn else ''}{line}\n".encode()
            try:
                self.torn = self.file.write(data) != len(data)
            except OSError as error:
                raise UserError(f"{self.path}: cannot be written: {error.strerror}") from None
            if self.torn:
                raise UserError(f"{self.path}: cannot be written: the disk is full")

    def sync(self) -> None:
        """Force what was written onto the disk. Raises UserError where that fails, or the file was removed."""
        try:
            if not self._is_there():
                raise UserError(f"{self.path}: was removed while the run was at work, and what it logged with it")
            os.fsync(self.file.fileno())
        except OSError as error:
            if error.errno != errno.EINVAL:  # a file system without fsync
                raise UserError(f"{self.path}: cannot be written: {error.strerror}") from None

    def _is_there(self) -> bool:
        """Return whether the file still has its name."""
        try:
            return os.path.samestat(self.path.stat(), os.fstat(self.file.fileno()))
        except FileNotFoundError:
            return False

    def close(self) -> None:
        """Force what was written onto the disk, as `sync` does, and close the file."""
        try:
            self.sync()
        finally:
            self.file.close()


def _last_byte(path: Path) -> bytes:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1)


def read_events(path: Path) -> Iterator[dict[str, Any]]:
    """Yield every whole line, in order. A torn line (crash while writing) is passed over.

    Raises UserError as `read_from`.
    """
    return (event for event, _ in read_from(path, 0))


def read_from(path: Path, offset: int) -> Iterator[tuple[dict[str, Any], int]]:
    """Yield the events that stand after an offset in the file, in bytes, each with the offset after it.

    A line that is still being written waits for the next time; events and keys that are not known are passed over.
    Raises UserError for a line that is an event and has no sense, and for a log of a newer format.
    """
    with path.open("rb") as file:
        file.seek(offset)
        content = io.BytesIO(file.read())  # the file is closed, whatever becomes of this generator
    while (line := content.readline()).endswith(b"\n"):
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict) and "event" in event:
            if problem := event_problem(event):
                raise _refused(path, offset + content.tell() - len(line), problem)
            yield event, offset + content.tell()


def _refused(path: Path, offset: int, problem: str) -> UserError:
    with path.open("rb") as file:
        number = file.read(offset).count(b"\n") + 1
    if problem == NEWER:
        return UserError(f"{path}, line {number}: {problem}; update moco here, then repeat", "E-LOG-NEWER")
    return UserError(
        f"{path}, line {number}: {problem}; correct or remove the line, or move the run's folder away", "E-LOG-LINE"
    )


def identity(path: Path) -> str:
    """Return what tells one run from all others, wherever its log lies.

    It is a digest of the first line, which never changes.
    """
    with path.open("rb") as file:
        return hashlib.sha256(file.readline()).hexdigest()[:32]


def metric_history(path: Path) -> list[dict[str, Any]]:
    """Return the valid metric lines in order of their steps. Void lines (see `resume`) are left out."""
    kept: list[dict[str, Any]] = []
    for event in read_events(path):
        if event["event"] == "metrics":
            kept.append(event)
        elif event["event"] == "resume":
            kept = [line for line in kept if line["step"] <= event["step"]]
    return kept


def last_values(path: Path) -> dict[str, float]:
    """Return the last valid value of every metric."""
    last: dict[str, float] = {}
    for line in metric_history(path):
        last.update(line["metrics"])
    return last


def close_abandoned(path: Path, quiet: float = QUIET) -> None:
    """End the log of a run as KILLED, where its process ended without a word, by SIGKILL or with its machine.

    quiet: seconds since the last line. A lock alone does not tell, where other machines do not see it.
    """
    last = ""
    for event in read_events(path):
        if event["event"] in ("start", "end"):
            last = event["event"]
    if last != "start" or time.time() - path.stat().st_mtime < quiet:
        return
    with contextlib.suppress(Timeout, OSError), FileLock(path.parent / LOCK, timeout=0):
        log = MetricLog(path)
        log.write("end", status="KILLED")
        log.close()


def as_text(value: Any) -> str:
    """Return a parameter's value as MLflow stores it; a tuple as the list that params.yaml has."""
    text = str(value)
    return f"[{text[1:-1].removesuffix(',')}]" if text.startswith("(") and text.endswith(")") else text


def finite(metrics: dict[str, float]) -> dict[str, float]:
    """Return the metrics without NaN and infinity, which JSON does not have."""
    return {name: float(value) for name, value in metrics.items() if math.isfinite(value)}
