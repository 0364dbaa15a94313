"""Where memory is full: one line that says what to do, and the same run goes on where there is more."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

from conftest import Moco, assert_one_line, assert_one_line_error, write_dataset, write_params
from moco.cli.main import SMALLER, app
from moco.data import decode
from moco.errors import UserError
from moco.methods.step import ContrastStep
from moco.out_of_memory import GPU, MACHINE, full_memory
from moco.settings.schema import docs
from moco.tracking.metric_log import metric_history
from moco.training.distributed import DistributedContext
from moco.training.numerics import choose_device
from moco.weights import load_weights
from process_helpers import Started, finish, start_two, wait_for_steps

LARGE = {"pretrain__width": 8, "pretrain__batch_size": 128, "pretrain__epochs": 2}
ROOM = 256 << 20  # threads reserve some of it; a batch takes more than twice as much


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project whose batches are large, before its pretraining."""
    project = tmp_path_factory.mktemp("large")
    write_dataset(project / "dataset", unlabeled=256, size=96)
    write_params(project, **LARGE)
    assert Started(project, "data").finish()[0] == 0
    return project


def copied(large: Path, project: Path) -> Path:
    shutil.copytree(large, project, dirs_exist_ok=True)
    return project


@pytest.mark.fault("full-memory")
def test_a_run_that_memory_does_not_hold_says_so_and_goes_on_where_there_is_more(large: Path, tmp_path: Path) -> None:
    whole, project = copied(large, tmp_path / "whole"), copied(large, tmp_path / "project")
    assert Started(whole, "pretrain").finish()[0] == 0
    begun = Started(project, "pretrain")
    wait_for_steps(begun, project, 1)
    begun.send_signal(15)
    begun.finish()
    before = {path: path.read_bytes() for path in project.glob("runs/pretrain/*/checkpoint_*")}
    code, said = Started(project, "pretrain", room=ROOM).finish()
    assert code == 1 and "continuing from" in said, said
    # Which library is refused first is chance.
    assert_one_line(said, "memory", "lower pretrain.batch_size or pretrain.queue, or raise pretrain.accumulate")
    assert before and {path: path.read_bytes() for path in before} == before
    code, said = Started(project, "pretrain").finish()
    assert code == 0 and "continuing from" in said, said
    assert (project / "models/encoder.pth").read_bytes() == (whole / "models/encoder.pth").read_bytes()
    logs = [next(folder.glob("runs/pretrain/*/metrics.jsonl")) for folder in (project, whole)]
    ours, theirs = ([line["step"] for line in metric_history(log) if "loss" in line["metrics"]] for log in logs)
    assert ours == theirs == [1, 2, 3, 4]


@pytest.mark.fault("full-memory")
def test_of_two_processes_the_one_whose_memory_is_full_says_so(large: Path, tmp_path: Path) -> None:
    project = copied(large, tmp_path / "project")
    write_params(project, **{**LARGE, "pretrain__batch_size": 256})
    codes, said = finish(start_two(project, rooms=(None, ROOM)))
    assert codes == [1, 1], said
    assert_one_line(said[1], "memory", "lower pretrain.batch_size")
    assert_one_line(said[0], "process 0 of 2 lost the others")


@pytest.mark.fault("full-memory")
@pytest.mark.parametrize(
    ("error", "words"),
    [
        (torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of"),
         f"{GPU} (asked for 2.50 GiB more): lower pretrain.batch_size or pretrain.queue, or raise "
         "pretrain.accumulate, or set "
         "runtime.cuda_graphs: false, or run where there is more"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), f"{GPU}: lower"),
        (RuntimeError("CUDA error: out of memory"), f"{GPU}, or the machine's that is kept in place for it: lower"),
        (RuntimeError("MPS backend out of memory (MPS allocated: 9.00 GB)"), f"{GPU}: lower"),
        (MemoryError("Unable to allocate 100. MiB for an array"), f"{MACHINE} (asked for 100 MiB more): lower"),
        (RuntimeError("could not create a primitive"), "mostly as the memory is full: lower"),
        (RuntimeError("std::bad_alloc"), f"{MACHINE}: lower"),
        (RuntimeError("can't start new thread"), "at its limit: lower"),
    ],
)  # fmt: skip
def test_what_libraries_raise_is_one_line(
    moco: Moco, project: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, words: str
) -> None:
    """test_gpu fills a real GPU."""

    def full(self: ContrastStep, *arguments: Any) -> NoReturn:
        raise error

    monkeypatch.setattr(ContrastStep, "__call__", full)
    assert moco("data").returncode == 0
    done = moco("pretrain")
    assert_one_line_error(done, words)
    assert ("cuda_graphs" in done.stderr) == ("GPU" in words)


def test_what_is_to_be_lowered_are_settings_of_commands() -> None:
    commands = {info.name or (info.callback.__name__ if info.callback else "") for info in app.registered_commands}
    for command, advice in SMALLER.items():
        found = re.findall(r"(\w+)\.(\w+)", advice)
        assert command in commands and found and all(f"{section}.{key}" in docs() for section, key in found)


def test_other_errors_are_not_taken_for_it() -> None:
    unsupported = RuntimeError("could not create a primitive descriptor for a convolution")
    for other in (
        unsupported,
        RuntimeError("shapes do not fit"),
        ValueError("out of memory"),
        OSError(28, "No space left"),
    ):
        assert full_memory(other) is None
    assert full_memory(OSError(12, "Cannot allocate memory")) == (MACHINE, False)
    assert full_memory(ImportError("libx.so: failed to map segment from shared object")) == (MACHINE, False)
    assert full_memory(RuntimeError("can't allocate memory: you tried to allocate 1000 bytes")) == (MACHINE, False)


class Full:
    """Stands where something is read or made, and has no room for it."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __call__(self, *arguments: Any, **options: Any) -> NoReturn:
        raise self.error


def test_no_sound_file_is_called_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever followed the advice, or had data.unreadable, would lose it."""
    full = RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
    monkeypatch.setattr(torch, "load", Full(full))
    with pytest.raises(UserError, match=f"a.pth: cannot be loaded: {MACHINE}; where there is enough") as refusal:
        load_weights(tmp_path / "a.pth", "delete it to start again")
    assert "delete" not in str(refusal.value)


@pytest.mark.parametrize("error", [MemoryError(), OSError(12, "Cannot allocate memory")])
def test_no_image_is_left_out_for_want_of_memory(
    moco: Moco, project: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    write_params(project, data__unreadable=40, data__resize=16)
    monkeypatch.setattr(decode, "resize_and_crop", Full(error))
    assert_one_line_error(moco("data"), "image 0 of unlabeled: cannot be decoded", MACHINE)
    assert not (project / "models/manifest.json").exists()


def test_neither_the_device_nor_the_others_are_blamed(monkeypatch: pytest.MonkeyPatch) -> None:
    full = torch.cuda.OutOfMemoryError("CUDA out of memory")
    monkeypatch.setattr(torch, "zeros", Full(full))
    with pytest.raises(torch.cuda.OutOfMemoryError):
        choose_device("cuda:0")
    monkeypatch.setattr(torch.distributed, "broadcast_object_list", Full(full))
    with pytest.raises(torch.cuda.OutOfMemoryError):
        DistributedContext(0, 2).broadcast("words")
    with pytest.raises(UserError, match="lost the others"):
        monkeypatch.setattr(torch.distributed, "broadcast_object_list", Full(RuntimeError("connection reset")))
        DistributedContext(0, 2).broadcast("words")
