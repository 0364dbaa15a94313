"""Where memory is full: one line that says what to lower, and the checkpoints of before stay."""

from __future__ import annotations

import gc
import re
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

from conftest import Moco, assert_one_line_error, tiny_params, write_dataset, write_params
from moco.cli import SMALLER
from moco.errors import full_memory
from moco.stages.contrast import ContrastStep

GPU = (
    "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.11 GiB of which 1.2 GiB is free."
)


@contextmanager
def room_for(size: int) -> Iterator[None]:
    """This process gets so many bytes more, by a limit as `ulimit -v` sets it."""
    gc.collect()
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.fault("full-memory")
@pytest.mark.parametrize(
    ("before", "stage", "words"),
    [
        (("data", "pretrain"), "pretrain", "lower pretrain.batch_size or raise pretrain.accumulate"),
        (("data",), "baseline", "lower baseline.batch_size"),
    ],
)
def test_a_batch_that_memory_does_not_hold_is_one_line(
    moco: Moco, project: Path, before: tuple[str, ...], stage: str, words: str
) -> None:
    shutil.rmtree(project / "dataset")
    write_dataset(project / "dataset", unlabeled=160, train=160, size=96)
    sizes = {"pretrain__width": 16, "pretrain__epochs": 1}
    write_params(project, **sizes)
    for made in before:
        assert moco(made).returncode == 0
    checkpoints = {path: path.read_bytes() for path in (project / "runs").rglob("checkpoint_*.pth")}
    write_params(project, **sizes, **{f"{stage}__batch_size": 160})
    with room_for(32 << 20):  # an activation of the first layer takes 94 MB
        done = moco(stage)
    assert_one_line_error(done, "the memory is full", "asked for", "MiB more", words)
    assert {path: path.read_bytes() for path in checkpoints} == checkpoints


@pytest.mark.fault("full-memory")
@pytest.mark.parametrize(
    ("error", "words"),
    [
        (torch.cuda.OutOfMemoryError(GPU), "the GPU's memory is full (asked for 2.50 GiB more): lower"),
        (
            RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
            "the GPU's memory",
        ),
        (RuntimeError("MPS backend out of memory (MPS allocated: 9.00 GB)"), "the GPU's memory is full: lower"),
    ],
)
def test_a_gpu_that_is_full_is_one_line(
    moco: Moco, project: Path, monkeypatch: pytest.MonkeyPatch, error: RuntimeError, words: str
) -> None:
    """What its libraries raise; test_gpu fills a real one."""

    def full(self: ContrastStep, *arguments: Any) -> NoReturn:
        raise error

    monkeypatch.setattr(ContrastStep, "__call__", full)
    assert moco("data").returncode == 0
    assert_one_line_error(moco("pretrain"), words, "pretrain.accumulate")


def test_what_is_to_be_lowered_are_settings() -> None:
    known = tiny_params()
    for advice in SMALLER.values():
        found = re.findall(r"(\w+)\.(\w+)", advice)
        assert found and all(key in known[section] for section, key in found)


def test_other_errors_are_not_taken_for_it() -> None:
    assert full_memory(RuntimeError("shapes do not fit")) is None
    assert full_memory(ValueError("out of memory")) is None
    assert full_memory(OSError(28, "No space left on device")) is None
    assert full_memory(OSError(12, "Cannot allocate memory")) is not None
    assert full_memory(MemoryError("Unable to allocate 1.50 GiB for an array with shape (9,)")) == (
        "the memory is full, or what this process may take of it (asked for 1.50 GiB more)"
    )
