"""A SQLite store of MLflow's is there whole or not at all."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moco.errors import UserError
from moco.redaction import redact
from moco.tracking import store


def test_only_paths_of_sqlite_are_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert store.absolute("sqlite:///a b.db?timeout=9") == f"sqlite:///{tmp_path}/a b.db?timeout=9"
    assert store.absolute(f"sqlite:///{tmp_path}/x.db") == f"sqlite:///{tmp_path}/x.db"
    assert store.absolute("http://host:5000/x") == "http://host:5000/x"
    assert store.artifact_location(f"sqlite:///{tmp_path}/x.db?y") == f"file://{tmp_path}/mlartifacts"
    assert store.artifact_location("http://host:5000") is None


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # MLflow and SQLAlchemy deprecate things among themselves
def test_a_process_killed_while_it_makes_the_store_leaves_none(tmp_path: Path) -> None:
    scratch, path = tmp_path / "scratch", tmp_path / "mlflow.db"
    scratch.mkdir()
    uri = f"sqlite:///{path}"
    script = f"from moco.tracking import store; store.create({uri!r})"
    process = subprocess.Popen([sys.executable, "-c", script], env={**os.environ, "TMPDIR": str(scratch)})
    while not list(scratch.glob("moco-store-*/mlflow.db")):  # MLflow begins with its tables
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not path.exists()

    assert [experiment.name for experiment in store.client(uri).search_experiments()] == ["Default"]
    assert [file.name for file in tmp_path.iterdir() if "mlflow" in file.name] == ["mlflow.db"]


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_a_store_that_another_process_made_meanwhile_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "mlflow.db"
    link = os.link

    def slower(source: Path, target: Path) -> None:
        target.write_text("of another")
        link(source, target)

    monkeypatch.setattr(os, "link", slower)
    store.create(f"sqlite:///{path}")
    assert path.read_text() == "of another"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("mlruns", "no stores of files"),
        ("file:///tmp/mlruns", "no stores of files"),
        ("myhost:5000", "'myhost:5000' is no address"),
        ("htp://u:secret@myhost:5000", "'htp://myhost:5000' is no address"),
    ],
)
def test_what_is_no_address_is_one_line(uri: str, words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        store.check_address(uri)
    assert "secret" not in str(caught.value)
    for fine in ("http://h:5000", "https://h/x", "sqlite:///a.db", "postgresql+psycopg://h/d", "databricks://p"):
        store.check_address(fine)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://host:5000", "http://host:5000"),
        ("http://user:secret@host:5000 says no", "http://host:5000 says no"),
        ("http://u:secret/w@host", "http://host"),
        ("http://u:secret@w@host", "http://host"),
        ("postgresql://h/db?password=secret&x=1", "postgresql://h/db?password=...&x=1"),
    ],
)
def test_no_message_has_a_password(text: str, shown: str) -> None:
    assert redact(text) == shown
    assert "secret" not in store.explain(RuntimeError(f"cannot read {text}"), text)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # MLflow and SQLAlchemy deprecate things among themselves
def test_a_store_without_a_registry_is_one_line() -> None:
    from mlflow.tracking._model_registry.utils import _get_store_registry

    with pytest.raises(Exception, match="registry") as caught:
        _get_store_registry().get_store("azure://u:secret@place")
    assert store.explain(caught.value, "azure://u:secret@place") == (
        "azure://place has no model registry; use a database or a server"
    )
