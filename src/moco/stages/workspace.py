"""Where a stage finds and leaves its files, all relative to the project's folder."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moco.errors import UserError

MANIFEST = Path("models/manifest.json")
ENCODER = Path("models/encoder.pth")
CLASSIFIER = Path("models/classifier")
REPORTS = Path("reports")
RUNS = Path("runs")

# Settings that change what is looked at or kept, not what is learned: they do not make another run of it.
HOUSEKEEPING = {
    "pretrain.monitor_every", "pretrain.knn_neighbours", "pretrain.checkpoint_every",
    "pretrain.keep_checkpoints", "pretrain.log_every", "pretrain.holdout",
}  # fmt: skip


def say(message: str) -> None:
    """A line for the user."""
    print(message, file=sys.stderr, flush=True)


def scratch_folder(setting: str) -> Path:
    """Node-local scratch: the setting, or for `auto` the first of SLURM_TMPDIR, TMPDIR and /tmp.

    Raises UserError where it cannot be written.
    """
    place = setting
    if setting == "auto":
        place = os.environ.get("SLURM_TMPDIR") or tempfile.gettempdir()
    path = Path(place).expanduser()
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise UserError(f"runtime.scratch: {path} cannot be written: {error.strerror}") from None
    return path.absolute()


def run_key(settings: dict[str, Any], digest: str) -> str:
    """Name of the run that these settings and this data make."""
    kept = {name: value for name, value in settings.items() if name not in HOUSEKEEPING}
    text = json.dumps({"settings": kept, "data": digest}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


@dataclass(frozen=True)
class RunFolder:
    """runs/STAGE/KEY: metric log, checkpoints, and a mark once the run is complete."""

    path: Path

    @property
    def done(self) -> bool:
        return (self.path / "done").exists()

    def finish(self) -> None:
        (self.path / "done").touch()


def open_run_folder(stage: str, key: str) -> RunFolder:
    """The folder of this run: an unfinished one is continued, beside a finished one a new one is begun."""
    number = 1
    while True:
        folder = RunFolder(RUNS / stage / (key if number == 1 else f"{key}-{number}"))
        if not folder.done:
            folder.path.mkdir(parents=True, exist_ok=True)
            return folder
        number += 1
