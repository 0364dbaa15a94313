"""Tiny real datasets and a way to run the command line as a user does."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

# Hooks and a fixture of the table of faults, which pytest finds here.
from fault_table import (
    pytest_addoption,
    pytest_collection_modifyitems,
    pytest_configure,
    pytest_deselected,
    pytest_runtest_makereport,
    pytest_terminal_summary,
    tries,
)
from moco.accel.openmp import SPINS
from process_helpers import running

__all__ = [
    "pytest_addoption",
    "pytest_collection_modifyitems",
    "pytest_configure",
    "pytest_deselected",
    "pytest_runtest_makereport",
    "pytest_terminal_summary",
    "tries",
]
ROOT = Path(__file__).resolve().parent.parent

os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
os.environ["DO_NOT_TRACK"] = "true"
os.environ.setdefault("GOMP_SPINCOUNT", SPINS)  # of pytest's workers and of what tests start: they share the cores
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # kernels for GPUs, before triton is imported


@pytest.fixture(autouse=True)
def few_threads() -> None:
    """The suite runs beside other things; tiny tensors gain nothing from more threads."""
    torch.set_num_threads(2)


@pytest.fixture(autouse=True)
def no_process_stays() -> Iterator[None]:
    """Whatever a failed test has left: at its end Python would wait for them."""
    yield
    for started in list(running):
        started.forget()


def write_dataset(
    root: Path, *, unlabeled: int = 40, train: int = 20, val: int = 10, size: int = 32, classes: int = 5, seed: int = 0
) -> Path:
    """The contract's layout with images of noise, a little brighter by class. Returns the folder."""
    rng = np.random.default_rng(seed)
    for split, count in (("unlabeled", unlabeled), ("train", train), ("val", val)):
        (root / split).mkdir(parents=True)
        labels = torch.arange(count) % classes
        for i in range(count):
            image = rng.integers(0, 160, (size, size, 3)) + int(labels[i]) * 15
            Image.fromarray(image.astype(np.uint8)).save(root / split / f"{i}.png")
        if split != "unlabeled":
            torch.save(labels, root / f"{split}_label_tensor.pt")
    return root


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    return write_dataset(tmp_path / "dataset")


def tiny_params(**changes: object) -> dict[str, dict[str, object]]:
    """The default preset, shrunk to run in seconds on `dataset`; changes are given as section__key=value."""
    params = yaml.safe_load((ROOT / "presets" / "default.yaml").read_text())
    params["data"].update(source="folder", path="dataset", mounted="", classes=5)
    params["pretrain"].update(
        width=4, stages=3, dim=16, queue=24, epochs=2, batch_size=8, precision="fp32", warmup=0.0
    )  # fmt: skip
    params["monitor"].update(every=1, holdout=0.4, neighbours=3, log_every=1)
    params["checkpoint"].update(every=1)
    params["train"].update(solver="sgd", features="pyramid", epochs=3, batch_size=8, views=1, holdout=0.4)
    params["eval"].update(batch_size=4)
    params["baseline"].update(epochs=2, minutes=None, batch_size=4)
    params["finetune"].update(epochs=3, batch_size=4, lr=0.01, weight_decay=0.0001, pool=0, holdout=0.4, warmup=0.0)
    params["request"].update(budget=5, answers="people")
    params["train_extra"].update(labels=None)
    params["runtime"].update(device="cpu", threads=1, scratch="scratch")
    params["tracking"].update(uri="", pictures=False)  # to draw them takes as long as all else in a small stage
    for name, value in changes.items():
        section, _, key = name.partition("__")
        params[section][key] = value
    return params


@pytest.fixture
def project(tmp_path: Path, dataset: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a tiny dataset and parameters, made the current one."""
    monkeypatch.chdir(tmp_path)
    write_params(tmp_path)
    return tmp_path


def write_params(project: Path, **changes: object) -> None:
    (project / "params.yaml").write_text(yaml.safe_dump(tiny_params(**changes), sort_keys=False))


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    """An empty file system that even root cannot write."""
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    folder = tmp_path / "read-only"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting is not permitted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


Moco = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def moco(project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Moco:
    """Runs `moco ARGS` in `project`, through the entry point of the command but in this process: importing
    torch takes longer than a tiny stage."""
    from moco.cli.main import main

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        monkeypatch.setattr(sys, "argv", ["moco", *arguments])
        capsys.readouterr()
        try:
            main()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        output, errors = capsys.readouterr()
        return subprocess.CompletedProcess(["moco", *arguments], code, output, errors)

    return run


def assert_one_line_error(done: subprocess.CompletedProcess[str], *words: str) -> None:
    """Exit code 1, no traceback, and the last line is one error that contains all the words."""
    assert done.returncode == 1, done.stderr
    assert_one_line(done.stderr, *words)


def assert_one_line(said: str, *words: str) -> None:
    """One error, of one line, with these words; no traceback."""
    assert "Traceback" not in said, said
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, said
    for word in words:
        assert word in lines[0], lines[0]


class Payload:
    """Runs a command when it is unpickled the unrestricted way."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch '{self.mark}'",)
