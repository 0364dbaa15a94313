"""Which state a pretraining goes on from, when the user names a checkpoint and the same command is given again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from moco.errors import UserError
from moco.runs.checkpoints import CheckpointFolder
from moco.runs.identity import Identity
from moco.runs.resuming import saved_state
from moco.runs.rollback import NAME, taken
from moco.weights import save_weights

CODE = {"moco/some.py": "digest"}


def content(epoch: int, way: str) -> dict[str, Any]:
    return {"params": {}, "data": "digest", "loop": {"epoch": epoch}, "model": {}, "way": way, "code": CODE}


@pytest.fixture
def folder(tmp_path: Path) -> CheckpointFolder:
    (tmp_path / "run").mkdir()
    return CheckpointFolder(tmp_path / "run", keep=2)


def resumed(folder: CheckpointFolder, named: Path | None) -> tuple[int, str]:
    saved = saved_state(folder, named, {}, "digest", 1, Identity("pretrain", {}, {}, CODE))
    assert saved is not None
    return saved["loop"]["epoch"], saved["way"]


def elsewhere(folder: CheckpointFolder, epoch: int, way: str) -> Path:
    path = folder.folder.parent / f"{way}.pth"
    save_weights(path, content(epoch, way))
    return path


def test_a_branch_never_goes_on_from_a_state_of_another(folder: CheckpointFolder) -> None:
    """As when the second is killed, or diverges, before it has a checkpoint of its own."""
    first, second = elsewhere(folder, 20, "first"), elsewhere(folder, 40, "second")
    assert resumed(folder, first) == (20, "first")
    folder.save(25, content(25, "first"))
    folder.save(30, content(30, "first"))
    assert resumed(folder, first) == (30, "first")
    for _ in range(2):
        assert resumed(folder, second) == (40, "second")
    folder.save(45, content(45, "second"))
    assert resumed(folder, second) == (45, "second")
    assert resumed(folder, None) == (45, "second")


def test_the_same_command_goes_on_when_the_named_checkpoint_has_made_room(folder: CheckpointFolder) -> None:
    for epoch in (25, 30, 35):
        folder.save(epoch, content(epoch, "one"))
    named = folder.folder / "checkpoint_030.pth"
    assert resumed(folder, named) == (30, "one")
    for epoch in (35, 40):
        folder.save(epoch, content(epoch, "branch"))
    assert not named.exists()
    assert resumed(folder, named) == (40, "branch")
    with pytest.raises(UserError, match=r"checkpoint_031\.pth: not found"):
        resumed(folder, folder.folder / "checkpoint_031.pth")


def test_a_named_checkpoint_stands_in_where_all_of_its_branch_are_damaged(folder: CheckpointFolder) -> None:
    named = elsewhere(folder, 20, "first")
    assert resumed(folder, named) == (20, "first")
    folder.save(25, content(25, "first")).write_bytes(b"damaged")
    assert resumed(folder, named) == (20, "first")


def test_a_branch_begins_at_the_full_rate_and_remembers_its_own_steps_back(folder: CheckpointFolder) -> None:
    folder.save(5, content(5, "given up"))
    (folder.folder / NAME).write_text("2")
    named = elsewhere(folder, 20, "first")
    assert resumed(folder, named) == (20, "first") and taken(folder.folder) == 0
    (folder.folder / NAME).write_text("1")  # it diverged before its first checkpoint
    assert resumed(folder, named) == (20, "first") and taken(folder.folder) == 1


def test_a_damaged_number_of_steps_back_is_one_line(tmp_path: Path) -> None:
    (tmp_path / NAME).write_bytes(b"\xff")
    with pytest.raises(UserError, match=f"{NAME}: damaged, no number"):
        taken(tmp_path)


def test_a_named_checkpoint_that_was_changed_is_refused(folder: CheckpointFolder) -> None:
    named = folder.save(20, content(20, "first"))
    data = bytearray(named.read_bytes())
    data[-40] ^= 1
    named.write_bytes(data)
    with pytest.raises(UserError, match=r"checkpoint_020\.pth: damaged: its digest"):
        resumed(folder, named)
