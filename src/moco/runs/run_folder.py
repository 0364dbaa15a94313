"""The folder of a run: taken by one process, continued, adopted where it is complete, and published at its end."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from moco.errors import UserError, say
from moco.files import home, write_text
from moco.layout import RUNS
from moco.runs import outputs
from moco.runs.heartbeat_lock import exclusive
from moco.runs.identity import Identity, Making
from moco.settings.listing import params_text
from moco.settings.schema import without_setting

LOG, DONE, IDENTITY, PARAMS = "metrics.jsonl", "done", "identity.json", "params.yaml"  # in a run's folder
STATES = "checkpoint_*.pth"  # in a run's folder: what it can be continued from


def run_key(settings: dict[str, Any], digest: str) -> str:
    """Return the name of the run that these settings and this data make."""
    later = {name: str(value) for name, value in without_setting().items()}
    kept = {name: value for name, value in settings.items() if later.get(name) != str(value)}
    text = json.dumps({"settings": kept, "data": digest}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


@dataclass(frozen=True)
class RunFolder:
    """The folder runs/STAGE/KEY: metric log, checkpoints, what the run made, and a mark once that is complete.

    restored: the run was complete already, and is put back into its place.
    """

    path: Path
    restored: bool = False

    @property
    def done(self) -> bool:
        """Return whether the run is marked as complete."""
        return (self.path / DONE).exists()

    def own(self, output: Path) -> Path:
        """Return where the run keeps an output of the stage, given by its place in the project."""
        return self.path / outputs.OUTPUTS / output

    def finish(self, making: Making | None = None) -> None:
        """Mark the run as complete.

        The mark names the job of the cluster, which must not do the run again when Slurm puts it back.
        """
        if making is not None:
            outputs.keep_record(self.path, making.identity)
        write_text(self.path / DONE, os.environ.get("SLURM_JOB_ID", "") + "\n")


@contextmanager
def open_run_folder(
    stage: str, key: str, making: Making | None = None, fits: Callable[[Path], bool] = lambda _: True,
    before: Callable[[], object] = lambda: None,
) -> Iterator[RunFolder]:  # fmt: skip
    """Yield the folder of this run, for this process alone.

    An unfinished folder is continued. A complete one of the same identity (`making`) is `restored`. Beside any other a
    new one is begun. At the end `before` is called and what the run has made is put into its place.

    fits: whether a complete run may be taken. Raises UserError where another process works in the folder (an experiment
    of DVC's queue takes the next one, as nobody could tell the other to wait), and at the end where settings, inputs or
    code have changed since: what was made is then complete, but not put into its place.
    """
    with ExitStack() as stack:
        folder = _complete(stage, key, making, fits) or _free(stage, key, making, fits, stack)
        if folder.restored:
            say(f"{stage}: made already, from the same settings, inputs and code: taken from {folder.path} (remove "
                "that folder to make it anew)")  # fmt: skip
        yield folder
        before()
        if making is not None:
            again = "measures it again" if stage == "eval" else "takes it without training"
            making.refuse_changes(f"the result is kept in {folder.path}: with all as it was, the same command {again}")
            outputs.publish(folder.path)


def _folders(stage: str, key: str) -> Iterator[RunFolder]:
    for number in itertools.count(1):
        yield RunFolder(home() / RUNS / stage / (key if number == 1 else f"{key}-{number}"))


def _complete(stage: str, key: str, making: Making | None, fits: Callable[[Path], bool]) -> RunFolder | None:
    """Return the complete run of this identity, where there is one."""
    for folder in itertools.takewhile(lambda each: each.path.exists(), _folders(stage, key)):
        if making is None or not folder.done or not fits(folder.path):
            continue
        if outputs.is_result_of(folder.path, making.identity, say):
            return replace(folder, restored=True)
    return None


def _free(
    stage: str, key: str, making: Making | None, fits: Callable[[Path], bool], stack: ExitStack
) -> RunFolder:  # fmt: skip
    """Return an unfinished folder that may be continued, else a new one; held until the stack is closed."""
    queued = home() != Path()
    for folder in _folders(stage, key):
        if folder.done or not (_may_go_on(folder.path, making) or (not queued and any(folder.path.glob(STATES)))):
            continue
        try:
            stack.enter_context(exclusive(folder.path, f"moco {stage}", say, 0 if queued else None))
        except UserError as error:
            if queued and error.code == "E-RUN-BUSY":
                continue
            raise
        if folder.done:  # it was finished while this process waited
            stack.close()
            return _complete(stage, key, making, fits) or _free(stage, key, making, fits, stack)
        shutil.rmtree(folder.own(Path()), ignore_errors=True)  # of a process that was stopped while it wrote them
        if making is not None:
            write_text(folder.path / PARAMS, params_text(making.config))
            if not any(folder.path.glob(STATES)):
                write_text(folder.path / IDENTITY, json.dumps(asdict(making.identity), indent=1))
        return folder
    raise RuntimeError("there is always a new folder")


def _may_go_on(folder: Path, making: Making | None) -> bool:
    """Return whether what an unfinished folder holds is of the same identity: else its record would be wrong.

    Where there is a state to continue from, that state knows its code itself.
    """
    if making is None or not (folder / LOG).exists():
        return True
    with suppress(OSError, ValueError):
        return Identity.from_dict(json.loads((folder / IDENTITY).read_text(encoding="utf-8"))) == making.identity
    return False
