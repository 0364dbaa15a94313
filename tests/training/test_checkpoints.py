"""Files of weights: whole or not at all, never code, damaged ones passed over."""

from __future__ import annotations

import hashlib
import os
import pickle
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import Payload
from moco.errors import UserError
from moco.runs.checkpoints import CheckpointFolder
from moco.weights import load_weights, save_weights


def content(epoch: int, size: int = 100) -> dict[str, Any]:
    return {"loop": {"epoch": epoch, "seconds": 1.5}, "model": {"w": torch.full((size,), float(epoch))}}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def filled(folder: Path, epochs: list[int], keep: int = 10) -> CheckpointFolder:
    checkpoints = CheckpointFolder(folder, keep)
    for epoch in epochs:
        checkpoints.save(epoch, content(epoch))
    return checkpoints


def newest(checkpoints: CheckpointFolder) -> tuple[int | None, list[str]]:
    """(epoch of what is loaded, messages)."""
    said: list[str] = []
    found = checkpoints.newest(said.append)
    if found is not None:
        found = found[1]
        assert torch.equal(found["model"]["w"], torch.full((100,), float(found["loop"]["epoch"])))
    return (None if found is None else found["loop"]["epoch"]), said


def test_weights_come_back_bit_for_bit_with_their_layout(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "w.pth"
    image = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    saved = {"a": image, "b": {"n": 3, "t": torch.tensor([float("nan"), 1e-40])}, "c": [None, "x", 0.5]}
    save_weights(path, saved)
    loaded = load_weights(path, "hint")
    assert torch.equal(loaded["a"], image)
    assert loaded["a"].is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(loaded["b"]["t"].view(torch.int32), saved["b"]["t"].view(torch.int32))  # type: ignore[index]
    assert loaded["b"]["n"] == 3 and loaded["c"] == [None, "x", 0.5]
    assert names(path.parent) == ["w.pth"]


@pytest.mark.fault("code-in-weights")
@pytest.mark.parametrize("kind", ["torch", "pickle"])
def test_code_in_a_file_of_weights_is_refused_and_does_not_run(kind: str, tmp_path: Path) -> None:
    path, mark = tmp_path / "evil.pth", tmp_path / "ran"
    if kind == "torch":
        torch.save({"model": Payload(mark)}, path)
    else:
        path.write_bytes(pickle.dumps({"model": Payload(mark)}, protocol=2))
    with pytest.raises(UserError, match=r"evil\.pth: damaged or not a file of weights .*get it elsewhere") as caught:
        load_weights(path, "get it elsewhere")
    assert "\n" not in str(caught.value)
    assert not mark.exists()
    if kind == "torch":  # the payload is a real one
        torch.load(path, weights_only=False)
        assert mark.exists()


@pytest.mark.parametrize("length", [0, 1, 100, 700, -1])
def test_a_truncated_file_is_a_user_error_with_the_hint(length: int, tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    save_weights(path, content(1))
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(UserError, match=r"w\.pth: .*; do this") as caught:
        load_weights(path, "do this")
    assert "\n" not in str(caught.value)


def test_a_missing_file_and_a_folder_are_user_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not found; run that first"):
        load_weights(tmp_path / "none.pth", "run that first")
    with pytest.raises(UserError, match="run that first"):
        load_weights(tmp_path, "run that first")


def test_the_newest_is_found_by_number_not_by_name_or_time(tmp_path: Path) -> None:
    checkpoints = filled(tmp_path, [9, 82, 1000])
    for age, path in enumerate(checkpoints.paths()):
        os.utime(path, (1e9 - age, 1e9 - age))
    assert [path.name for path in checkpoints.paths()] == [
        "checkpoint_009.pth", "checkpoint_082.pth", "checkpoint_1000.pth",
    ]  # fmt: skip
    found = checkpoints.newest(pytest.fail)
    assert found is not None and found[0].name == "checkpoint_1000.pth" and found[1]["loop"]["epoch"] == 1000


def test_an_empty_or_absent_folder_has_no_newest(tmp_path: Path) -> None:
    assert newest(CheckpointFolder(tmp_path / "absent", 2)) == (None, [])


@pytest.mark.fault("damaged-checkpoint")
@pytest.mark.parametrize("damage", ["truncate", "flip", "no digest", "empty digest", "other digest"])
def test_a_damaged_newest_is_named_and_the_one_before_is_used(damage: str, tmp_path: Path) -> None:
    checkpoints = filled(tmp_path, [1, 2, 3])
    path, record = tmp_path / "checkpoint_003.pth", tmp_path / "checkpoint_003.pth.sha256"
    data = bytearray(path.read_bytes())
    if damage == "truncate":
        path.write_bytes(data[: len(data) // 2])
    elif damage == "flip":
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    elif damage == "no digest":
        record.unlink()
    else:
        record.write_text("" if damage == "empty digest" else (tmp_path / "checkpoint_002.pth.sha256").read_text())
    epoch, said = newest(checkpoints)
    assert epoch == 2
    assert len(said) == 1 and "checkpoint_003.pth is damaged" in said[0]


@pytest.mark.fault("damaged-checkpoint")
def test_when_all_are_damaged_nothing_is_loaded_and_all_are_named(tmp_path: Path) -> None:
    checkpoints = filled(tmp_path, [1, 2])
    for path in checkpoints.paths():
        path.write_bytes(b"")
    epoch, said = newest(checkpoints)
    assert epoch is None
    assert "checkpoint_002.pth" in said[0] and "checkpoint_001.pth" in said[1] and len(said) == 2


def test_the_digest_is_what_sha256sum_checks(tmp_path: Path) -> None:
    filled(tmp_path, [5])
    line = (tmp_path / "checkpoint_005.pth.sha256").read_text()
    digest = hashlib.sha256((tmp_path / "checkpoint_005.pth").read_bytes()).hexdigest()
    assert line == f"{digest}  checkpoint_005.pth\n"


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_only_the_newest_stay(keep: int, tmp_path: Path) -> None:
    filled(tmp_path, [1, 2, 3, 10], keep)
    kept = [f"checkpoint_{epoch:03d}.pth" for epoch in [1, 2, 3, 10][-keep:]]
    assert names(tmp_path) == sorted(kept + [f"{name}.sha256" for name in kept])


def test_saving_an_epoch_again_replaces_it(tmp_path: Path) -> None:
    checkpoints = filled(tmp_path, [1, 2])
    checkpoints.save(2, {**content(2), "second": True})
    found = checkpoints.newest(lambda _: None)
    assert found is not None and found[1]["second"] is True
    assert len(checkpoints.paths()) == 2


def test_later_checkpoints_go_with_their_digests_and_nothing_else_does(tmp_path: Path) -> None:
    checkpoints = filled(tmp_path, [1, 2, 3])
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    (tmp_path / "encoder.pth").write_bytes(b"x")
    checkpoints.drop_after(1)
    assert names(tmp_path) == ["checkpoint_001.pth", "checkpoint_001.pth.sha256", "encoder.pth", "metrics.jsonl"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() != 0:
        pytest.skip("mounting a small disk needs root")
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "none", str(folder)], check=False)
    if done.returncode != 0:
        pytest.skip("mounting is not allowed here")
    yield folder
    # Lazily: torch's writer keeps a file that it failed to write open as long as the error is held somewhere.
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.fault("full-disk")
@pytest.mark.parametrize("size", [80_000, 1_000_000])
@pytest.mark.parametrize("epoch", [1, 2], ids=["same-name", "next-name"])
def test_a_full_disk_leaves_what_was_there(epoch: int, size: int, small_disk: Path) -> None:
    checkpoints = filled(small_disk, [1], keep=1)
    before = {name: (small_disk / name).read_bytes() for name in names(small_disk)}
    with pytest.raises(UserError, match=rf"checkpoint_00{epoch}\.pth: cannot be written: ") as caught:
        checkpoints.save(epoch, content(epoch, size))
    assert "\n" not in str(caught.value)
    assert {name: (small_disk / name).read_bytes() for name in names(small_disk)} == before
    assert newest(checkpoints)[0] == 1


@pytest.mark.fault("read-only")
def test_a_folder_that_cannot_be_written_is_a_user_error(small_disk: Path) -> None:
    checkpoints = filled(small_disk, [1])
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(UserError, match=r"checkpoint_002\.pth: cannot be written: Read-only file system"):
        checkpoints.save(2, content(2))
    assert newest(checkpoints)[0] == 1


def test_a_file_where_the_folder_should_be_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        save_weights(tmp_path / "runs" / "w.pth", content(1))


@pytest.mark.fault("damaged-checkpoint")
@pytest.mark.parametrize("keep", [1, 2])
def test_a_run_that_starts_again_as_all_was_damaged_keeps_what_it_saves(keep: int, tmp_path: Path) -> None:
    checkpoints = filled(tmp_path, [20, 25], keep)
    for path in checkpoints.paths():
        path.write_bytes(b"damaged")
    assert newest(checkpoints)[0] is None
    for epoch in (5, 10, 15):
        assert checkpoints.save(epoch, content(epoch)).exists()
        assert newest(checkpoints)[0] == epoch
    assert [path.name for path in checkpoints.paths()] == ["checkpoint_010.pth", "checkpoint_015.pth"][-keep:]


def test_a_digest_that_is_no_text_is_passed_over(tmp_path: Path) -> None:
    checkpoints = filled(tmp_path, [1, 2])
    (tmp_path / "checkpoint_002.pth.sha256").write_bytes(b"\xff\xfe\x00damaged")
    epoch, said = newest(checkpoints)
    assert epoch == 1 and "checkpoint_002.pth is damaged" in said[0]
    checkpoints.save(2, content(2))
    assert newest(checkpoints)[0] == 2
