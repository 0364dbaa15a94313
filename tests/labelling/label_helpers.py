"""A request's form, and the page that answers it."""

from __future__ import annotations

import contextlib
import csv
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Thread

import numpy as np

from moco.labelling.reply import Reply
from moco.labelling.server import Server, make_server

CLASSES = ["cat", "dog", "owl"]
HEADER = "image,label,rank,score,cluster,content"


def write_form(tmp_path: Path) -> Path:
    """Six images in two clusters, which take turns."""
    path = tmp_path / "request/request.csv"
    path.parent.mkdir()
    rows = [f"{i}.png,,{i + 1},0.5,{i % 2},{i:032x}" for i in range(6)]
    path.write_text("\n".join([HEADER, *rows]) + "\n")
    return path


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
