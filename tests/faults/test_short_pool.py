"""A preset on a small copy of its data asks for more images than there are."""

from __future__ import annotations

import csv
import json
import shutil
import typing
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conftest import Moco, write_params
from moco.settings.request import RequestConfig

STRATEGIES = typing.get_args(typing.get_type_hints(RequestConfig)["strategy"])


@pytest.mark.fault("short-pool", len(STRATEGIES))
def test_a_budget_above_the_pool_asks_for_all_there_is(moco: Moco, project: Path) -> None:
    """40 images, of which one is labelled, two are in train or val, one is there twice and one nearly so."""
    dataset = project / "dataset"
    shutil.copy(dataset / "train/6.png", dataset / "unlabeled/8.png")
    shutil.copy(dataset / "val/4.png", dataset / "unlabeled/9.png")
    shutil.copy(dataset / "unlabeled/1.png", dataset / "unlabeled/2.png")
    with Image.open(dataset / "unlabeled/1.png") as picture:
        pixels = np.asarray(picture).astype(int) + np.eye(32, dtype=int)[..., None]
    Image.fromarray(pixels.astype(np.uint8)).save(dataset / "unlabeled/3.png")
    (project / "labels.csv").write_text("image,label\n17,2\n")
    write_params(project, pretrain__epochs=1, request__budget=12_800, train_extra__labels="labels.csv")
    for stage in ("data", "pretrain", "train"):
        assert moco(stage).returncode == 0
    for strategy in STRATEGIES:
        done = moco("request", "--strategy", strategy)
        assert done.returncode == 0, done.stderr
        (told,) = [line for line in done.stderr.splitlines() if "request.budget" in line]
        assert "12800 images wanted, 35 asked for" in told and "(1 are)" in told, strategy
        with (project / "models/request/request.csv").open() as file:
            asked = [row["image"] for row in csv.DictReader(file)]
        assert len(asked) == len(set(asked)) == 35 and not {*asked} & {"8.png", "9.png", "17.png", "2.png"}
        assert json.loads((project / "reports/request/metrics.json").read_text())["images"] == 35
