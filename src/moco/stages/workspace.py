"""Where a stage finds and leaves its files, all relative to the project's folder."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import sys
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from moco.config import HOUSEKEEPING, MOVED, Config, flatten
from moco.errors import UserError, one_line
from moco.files import home, scratch_place, write_text
from moco.holder import held

MANIFEST = Path("models/manifest.json")
ENCODER = Path("models/encoder.pth")
CLASSIFIER = Path("models/classifier")
CLASSIFIER_EXTRA = Path("models/classifier_extra")
FINETUNED = Path("models/finetuned")
REQUEST = Path("models/request")
FORM = REQUEST / "request.csv"
LABELS = Path("labels")  # files that people make; DVC looks for changes in it
REPORTS = Path("reports")
RUNS = Path("runs")
LOOKS = 2.0  # seconds for which somebody may hold a run just to see whether its process is alive
CONTENT = "train_extra.content"  # a setting of classifiers with extra labels: which they are
MAKERS = {CLASSIFIER: "train", CLASSIFIER_EXTRA: "train_extra", FINETUNED: "finetune"}  # which stage writes which

# Settings that came later, at the values at which all is as it was without them.
ADDED: dict[str, Any] = {
    "data.exclude_val": True,  # what it took out is in the data's digest
    "pretrain.accumulate": 1, "pretrain.features": "last", "train.features": "last", "pretrain.convolutions": 2,
    "pretrain.resolutions": (1.0,), "pretrain.resolution_changes": (), "finetune.classifier": "classifier",
    "finetune.start": "classifier", "finetune.layer_decay": 1.0, "finetune.label_smoothing": 0.0, "finetune.mixup": 0.0,
    "finetune.batch_norm": "batch", "finetune.pool": 0, "finetune.confidence": 0.8, "train.solver": "sgd",
}  # fmt: skip


def say(message: str) -> None:
    """A line for the user."""
    print(one_line(message), file=sys.stderr, flush=True)


def scratch_folder(setting: str) -> Path:
    """Node-local scratch, made where it is missing. Raises UserError where it cannot be written."""
    path = scratch_place(setting)
    try:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise UserError(f"runtime.scratch: {path} cannot be written: {error.strerror}") from None
    return path


def differences(theirs: dict[str, Any], ours: dict[str, Any], but: Collection[str] = ()) -> list[str]:
    """'pretrain.lr is 0.06 there and 0.1 here' for every setting that differs, compared as text; one that is not there
    differs too."""
    theirs = {**ADDED, **{MOVED.get(name, name): value for name, value in theirs.items()}}
    return [
        f"{name} is {theirs.get(name, 'not set')} there and {value} here"
        for name, value in ours.items()
        if name not in but and (name not in theirs or str(theirs[name]) != str(value))
    ]


def classifier_settings(config: Config, theirs: dict[str, str]) -> dict[str, Any]:
    """The present settings of the stages before a classifier that was made with `theirs`: of `train_extra` too where it
    has extra labels."""
    ours = {**flatten(config.pretrain, "pretrain"), **flatten(config.train, "train")}
    return {**ours, **flatten(config.train_extra, "train_extra")} if CONTENT in theirs else ours


def run_key(settings: dict[str, Any], digest: str) -> str:
    """Name of the run that these settings and this data make."""
    kept = {name: value for name, value in settings.items()
            if name not in HOUSEKEEPING and (name, value) not in ADDED.items()}  # fmt: skip
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
        """The mark names the job of the cluster, which must not do it again when Slurm puts it back."""
        write_text(self.path / "done", os.environ.get("SLURM_JOB_ID", "") + "\n")


@contextmanager
def open_run_folder(stage: str, key: str) -> Iterator[RunFolder]:
    """The folder of this run, for this process alone: an unfinished one is continued, beside a finished one a new
    one is begun. Raises UserError where another process works in it; an experiment of DVC's queue takes the next one,
    as nobody could tell the other to wait."""
    queued = home() != Path()
    for number in itertools.count(1):
        folder = RunFolder(home() / RUNS / stage / (key if number == 1 else f"{key}-{number}"))
        if folder.done:
            continue
        folder.path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder.path / "lock")
        try:
            lock.acquire(timeout=0 if queued else LOOKS)
        except Timeout:
            if queued:
                continue
            raise UserError(
                f"{folder.path}: another process runs `moco {stage}` with these settings and data; wait for it or stop "
                "it"
            ) from None
        if not folder.done:
            break
        lock.release()  # it was finished while this process waited
    try:
        with held(folder.path, f"moco {stage}", say):
            yield folder
    finally:
        lock.release()
