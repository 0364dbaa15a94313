"""A stage's run: writes the metric log, and starts the process that carries it to MLflow."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

from moco.environment import python_module
from moco.errors import Interrupted, Say, UserError, present
from moco.files import write_atomically
from moco.redaction import redact
from moco.settings.tracking import TrackingConfig
from moco.tracking.metric_log import FORMAT, NAME, MetricLog, finite
from moco.tracking.origin import UNKNOWN, Origin
from moco.tracking.sinks import active
from moco.tracking.store import store_uri
from moco.tracking.store_check import trouble
from moco.tracking.system import SystemSampler

PATIENCE = 20.0  # seconds that the end of a run waits for MLflow to have everything
HASTE = 4.0  # the same where the run was told to stop: Slurm gives it some seconds, and somebody waits for the node
NEEDS = ("torch", "torchvision", "numpy", "pillow")  # of a classifier that is loaded elsewhere


def _write(content: bytes, path: Path) -> None:
    path.write_bytes(content)


left_alone: list[subprocess.Popen[str]] = []  # still at work when their runs had ended


class Run:
    """Context manager around a stage. MLflow never raises into it: a failure is one warning.

    folder: the run's own; continuing in the same folder continues the same MLflow run.
    """

    def __init__(self, folder: Path, stage: str, config: TrackingConfig, say: Say) -> None:
        self.folder, self.stage, self.config, self.say = folder, stage, config, say
        self.path = folder / NAME
        self.metric_log = MetricLog(self.path)
        self.last: dict[str, float] = {}
        self.started = False
        self.origin = UNKNOWN
        self.process: subprocess.Popen[str] | None = None
        self.sampler = SystemSampler(lambda metrics: self.metric_log.write("system", metrics=metrics))

    def start(self, params: dict[str, Any], origin: Origin, step: int = -1) -> None:
        """Begin the log, or continue it, and start the delivery.

        step: that of the state from which the run goes on, where it does. Metrics of later steps, written by a process
        that was stopped, are void: they are about to be made again.
        """
        again, self.origin, self.started = self.metric_log.continued, origin, True
        self.metric_log.write(
            "start", format=FORMAT, stage=self.stage, name=f"{self.stage}-{self.folder.name}", params=params,
            tags=origin.tags, dataset=origin.dataset, pipeline=origin.pipeline,
        )  # fmt: skip
        if again:
            code = {name: origin.tags[name] for name in ("git_commit", "git_dirty") if name in origin.tags}
            self.metric_log.write("resume", step=step, **code)
        known = again and (self.folder / "origin").is_dir()  # of where it began, as are the tags
        for name, content in ({} if known else origin.files).items():
            write_atomically(self.folder / "origin" / name, partial(_write, content))
            self.metric_log.write("artifact", path=f"origin/{name}")
        self.metric_log.sync()  # the first line is the run's identity
        self._begin_delivery()
        self.sampler.start()
        if origin.warning:
            self.say(origin.warning)

    def _begin_delivery(self) -> None:
        names = active(self.config)
        if not names:
            return
        if "mlflow" in names and (problem := trouble(self.config)):
            self.say(f"warning: MLflow: {problem}; the run goes on, and `moco sync` brings it there afterwards")
        try:
            self.process = subprocess.Popen(
                python_module("moco.tracking.delivery", str(self.folder)), stdin=subprocess.PIPE,
                stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
                start_new_session=True,  # Ctrl-C is for the run alone
            )  # fmt: skip
            pipe = present(self.process.stdin, "a pipe to the process")
            pipe.write(json.dumps(asdict(self.config)) + "\n")
            pipe.flush()
        except OSError as error:  # a limit on processes, say
            self.say(
                f"warning: nothing goes to MLflow during this run ({error}); `moco sync` brings it there afterwards"
            )
            self.process = None

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Log metrics of a step. Numbers that are not finite are left out."""
        known = finite(metrics)
        self.last.update(known)
        self.metric_log.write("metrics", step=step, metrics=known)

    def sync(self) -> None:
        """Force what was logged onto the disk. Raises UserError where that fails."""
        self.metric_log.sync()

    def checkpoint(self, path: Path, step: int) -> None:
        """Log that a state was saved. What was measured up to it is on the disk as well."""
        self.metric_log.write("checkpoint", step=step, path=str(path), metrics=self.last)
        self.metric_log.sync()

    def artifact(self, path: Path) -> None:
        """Log a file that is worth keeping with the run."""
        self.metric_log.write("artifact", path=self._keep(path, "artifacts"))

    def picture(self, name: str, write: Callable[[Path], object]) -> None:
        """Draw a PNG for people, unless tracking.pictures is false. name: without its ending.

        An error in it is only a warning: nothing depends on the picture.
        """
        if not self.config.pictures:
            return
        path = self.folder / "artifacts" / f"{name}.png"
        try:
            write_atomically(path, write)
        except Exception as error:
            self.say(f"warning: {path.name} could not be drawn: {error}")
        else:
            self.metric_log.write("artifact", path=f"artifacts/{path.name}")

    def model(
        self, files: list[Path], tags: dict[str, str], image: tuple[int, int], held_out: dict[str, str] | None = None
    ) -> None:
        """Log a trained classifier, to be registered.

        image: height and width of its input. held_out: what it is judged by (`held_out_record` in
        moco.tracking.digests).
        """
        needs = {}
        for name in NEEDS:
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                needs[name] = importlib.metadata.version(name).partition("+")[0]
        self.metric_log.write(
            "model", files=[self._keep(path, "classifier") for path in files], tags=tags, needs=needs, image=image,
            data_digest=self.origin.tags.get("data_digest", ""), held_out=held_out or {},
        )  # fmt: skip

    def _keep(self, path: Path, folder: str) -> str:
        """Keep a file beside the log, under a name that MLflow shows: the run's own as a second name, any other as a
        copy. Return its path relative to the run's folder."""

        def keep(temporary: Path) -> None:
            if path.resolve().is_relative_to(self.folder.resolve()):
                temporary.unlink()
                with contextlib.suppress(OSError):  # a file system without links
                    os.link(path, temporary)
                    return
            shutil.copyfile(path, temporary)

        write_atomically(self.folder / folder / path.name, keep)
        return f"{folder}/{path.name}"

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        killed = isinstance(error, (Interrupted, KeyboardInterrupt))
        status = "FINISHED" if error is None else "KILLED" if killed else "FAILED"
        self.sampler.stop()
        try:
            try:
                if self.started:
                    self.metric_log.write("end", status=status)
            finally:
                self.metric_log.close()
        except UserError as problem:
            if error is None:
                raise
            self.say(f"warning: {problem}")  # what went wrong before is what the user must see
        finally:
            problem_there = self._end_delivery(HASTE if killed else PATIENCE)
        if problem_there:
            place = (
                f"MLflow at {redact(store_uri(self.config))}" if "mlflow" in active(self.config) else "the run's table"
            )
            self.say(
                f"warning: {place} does not have everything yet ({problem_there}); "
                f"nothing is lost: it is in {self.path}, and `moco sync` brings it there"
            )

    def _end_delivery(self, patience: float) -> str:
        """Tell the process that the run has ended, and wait a while; it goes on alone where a server is slow."""
        if self.process is None:
            return ""
        try:
            output, _ = self.process.communicate(timeout=patience)
        except subprocess.TimeoutExpired:
            present(self.process.stdout, "a pipe from the process").close()
            left_alone.append(self.process)
            return f"it takes longer than {patience:.0f} s"
        except (Interrupted, KeyboardInterrupt):  # the stage is over; only the waiting is given up
            left_alone.append(self.process)
            return "the waiting was interrupted"
        code = self.process.returncode
        return output.strip() or (f"the process that brings it there ended with {code}" if code else "")
