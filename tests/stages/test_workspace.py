"""Which folder a run gets."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from moco.errors import UserError
from moco.runs.joins import differences
from moco.runs.run_folder import open_run_folder, run_key


def test_a_second_process_of_a_run_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("moco.runs.heartbeat_lock.LOCK_TIMEOUT_S", 0.0)
    with open_run_folder("pretrain", "key") as folder:
        assert folder.path == Path("runs/pretrain/key")
        with (
            pytest.raises(UserError, match=f"process {os.getpid()} on .+ runs `moco pretrain`"),
            open_run_folder("pretrain", "key"),
        ):
            pass
        folder.finish()
    with open_run_folder("pretrain", "key") as again:
        assert again.path == Path("runs/pretrain/key-2"), "beside the finished one"


def test_experiments_of_a_queue_that_share_a_run_do_not_refuse_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "experiment").mkdir()
    monkeypatch.chdir(tmp_path / "experiment")
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    monkeypatch.setenv("DVC_EXP_NAME", "grid-1")
    with open_run_folder("pretrain", "key") as one, open_run_folder("pretrain", "key") as other:
        assert (one.path, other.path) == (tmp_path / "runs/pretrain/key", tmp_path / "runs/pretrain/key-2")


def test_a_run_that_ends_while_another_process_waits_for_it_is_not_begun_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    holds, got = threading.Event(), []

    def first() -> None:
        with open_run_folder("pretrain", "key") as folder:
            holds.set()
            time.sleep(0.3)
            folder.finish()

    thread = threading.Thread(target=first)
    thread.start()
    holds.wait()
    with open_run_folder("pretrain", "key") as folder:
        got.append(folder.path)
    thread.join()
    assert got == [Path("runs/pretrain/key-2")]


@pytest.mark.parametrize(
    ("key", "same", "other"),
    [("accumulate", 1, 2), ("features", "last", "pyramid"), ("convolutions", 2, 1), ("resolutions", (1.0,), (0.5, 1.0)),
     ("resolution_changes", (), (0.5,))],
)  # fmt: skip
def test_a_setting_that_came_later_changes_no_run_where_it_changes_nothing(key: str, same: Any, other: Any) -> None:
    old, name = {"pretrain.lr": 0.1}, f"pretrain.{key}"
    assert run_key({**old, name: same}, "d") == run_key(old, "d") != run_key({**old, name: other}, "d")
    assert differences(old, {**old, name: same}) == []
    assert len(differences(old, {**old, name: other})) == 1


def test_a_setting_that_was_always_there_names_the_run() -> None:
    assert run_key({"pretrain.minutes": None}, "d") != run_key({}, "d")
