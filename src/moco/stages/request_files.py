"""The files of a request: the form that comes back as a reply, pictures for whoever fills it in, a summary."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moco.csv_files import csv_text
from moco.errors import UserError, say
from moco.files import write_atomically, write_text
from moco.labels.label_files import read_table
from moco.layout import FORM, LABELS, REPORTS, REQUEST
from moco.runs.run_folder import RunFolder
from moco.settings.schema import Config
from moco.tracking import pictures
from moco.tracking.run import Run

COLUMNS = ("image", "label", "rank", "score", "cluster", "content")
PAGE, ROW = 50, 10  # images of a page of the gallery, and of a row


@dataclass(frozen=True)
class Asked:
    """images: B x H x W x 3 uint8; digests: B x 16 uint8; labels: where they are known already, else None."""

    images: np.ndarray
    digests: np.ndarray
    names: list[str]
    scores: list[float]
    clusters: list[int]
    labels: list[str] | None


def write_request(asked: Asked, summary: dict[str, Any], record: Run, folder: RunFolder) -> None:
    """Write models/request/ and reports/request/ into the run's folder, and log what MLflow gets."""
    table: list[Sequence[object]] = [COLUMNS]
    for rank, name in enumerate(asked.names):
        label = asked.labels[rank] if asked.labels else ""
        content = bytes(asked.digests[rank]).hex()
        table.append([name, label, rank + 1, f"{asked.scores[rank]:.6g}", asked.clusters[rank], content])
    new, report = folder.own(REQUEST), folder.own(REPORTS / "request" / "metrics.json")
    write_text(new / FORM.name, csv_text(table))
    (new / "gallery").mkdir(exist_ok=True)
    for number, first in enumerate(range(0, len(asked.names), PAGE), 1):
        sheet = _page(asked, range(first, min(first + PAGE, len(asked.names))))
        sheet.save(new / "gallery" / f"page-{number:03}.png")
    write_text(report, json.dumps(summary, indent=2) + "\n")
    record.log({name: float(value) for name, value in summary.items() if not isinstance(value, dict)}, 0)
    record.artifact(new / FORM.name)
    record.artifact(report)
    if asked.names:
        page = new / "gallery" / "page-001.png"
        record.picture("gallery", lambda path: shutil.copyfile(page, path))


def keep_answers(config: Config) -> None:
    """Copy a form that somebody has filled in where it lies, before a new form replaces it."""
    if not FORM.is_file() or config.request.answers == "generator":  # which can give them again
        return
    content = FORM.read_bytes()
    with contextlib.suppress(UserError):  # no form of ours: whatever it is, it is kept
        if not any(line.label for line in read_table(FORM, say).lines()):
            return
    copy = LABELS / f"reply-{hashlib.sha256(content).hexdigest()[:8]}.csv"
    if not copy.exists():
        write_atomically(copy, lambda temporary: temporary.write_bytes(content))
        say(f"request: {FORM} has answers in it; they are kept in {copy}")


def _page(asked: Asked, ranks: range) -> Any:
    """Draw a page on which similar images stand together; captions are ranks and names."""
    order = sorted(ranks, key=lambda rank: (asked.clusters[rank], rank))
    tiles = [pictures.Tile(asked.images[rank], f"{rank + 1}\n{Path(asked.names[rank]).name}") for rank in order]
    return pictures.grid([tiles[first : first + ROW] for first in range(0, len(tiles), ROW)])
