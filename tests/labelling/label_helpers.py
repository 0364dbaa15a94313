"""A request's form, and the page that answers it."""

from __future__ import annotations

import contextlib
import csv
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Thread

import numpy as np

from moco.data.manifest import load_manifest
from moco.data.prepare import open_decoded
from moco.labels.reply import Reply
from moco.labels.server import Server, make_server
from moco.layout import FORM, MANIFEST
from moco.settings import reading as params

CLASSES = ["cat", "dog", "owl"]
HEADER = "image,label,rank,score,cluster,content"


def write_form(tmp_path: Path) -> Path:
    """Six images in two clusters, which take turns."""
    path = tmp_path / "request/request.csv"
    path.parent.mkdir()
    rows = [f"{i}.png,,{i + 1},0.5,{i % 2},{i:032x}" for i in range(6)]
    path.write_text("\n".join([HEADER, *rows]) + "\n")
    return path


def write_own_form(count: int) -> None:
    """A form of the first images of the pool that `moco data` left in the current folder."""
    config = params.load(Path("params.yaml"))
    pool = open_decoded(config.data, load_manifest(MANIFEST), Path(config.runtime.scratch), lambda _: None)["unlabeled"]
    rows = [f"{i}.png,,{i + 1},0.5,0,{bytes(pool.digests[i]).hex()}" for i in range(count)]
    FORM.parent.mkdir(parents=True)
    FORM.write_text("\n".join([HEADER, *rows]) + "\n")


@contextlib.contextmanager
def command(project: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """(`moco label`, the address that it prints), which is killed at the end if it still lives."""
    line = [sys.executable, "-m", "moco.cli", "label"]
    with subprocess.Popen(line, cwd=project, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as running:
        assert running.stdout is not None
        said = ""
        while not (found := re.search(r"http://127.0.0.1:\d+/\?token=\S+", said)):
            new = running.stdout.readline()
            assert new, said
            said += new
        try:
            yield running, found[0]
        finally:
            running.kill()


@contextlib.contextmanager
def served(reply: Reply, picture: Callable[[int], np.ndarray] | None = None) -> Iterator[Server]:
    server = make_server(reply, picture or (lambda place: np.full((32, 32, 3), 40 * place, np.uint8)), 0)
    thread = Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def labels(path: Path) -> dict[str, str]:
    with path.open() as file:
        return {row["image"]: row["label"] for row in csv.DictReader(file)}
