"""A store is never migrated by being opened, and a copy of it never writes into the original."""

# ruff: noqa: F811 - fixtures of the helpers
from __future__ import annotations

import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from sink_helpers import (  # noqa: F401
    CONFIG,
    begin,
    connect,
    empty_store,
    no_server_from_outside,
    only_run,
    store,
)

from conftest import Moco, assert_one_line_error, write_params
from moco.doctor import tracking
from moco.errors import UserError
from moco.tracking.mlflow_sink import MlflowSink
from moco.tracking.store import check_address, client
from moco.tracking.store_check import trouble
from moco.tracking.store_file import moved_from, refuse_other_schema, relocate
from server_helpers import free_port

pytestmark = [
    pytest.mark.slow,  # making an MLflow database takes seconds
    pytest.mark.filterwarnings("default"),  # MLflow and SQLAlchemy deprecate things among themselves
]


def older_store(path: Path) -> str:
    """Make a store as an older MLflow did, by its own migrations up to one of 2025; returns that version."""
    import sqlalchemy
    from alembic.command import upgrade
    from alembic.script import ScriptDirectory
    from mlflow.store.db.utils import InitialBase, _get_alembic_config

    engine = sqlalchemy.create_engine(f"sqlite:///{path}")
    InitialBase.metadata.create_all(engine)
    config = _get_alembic_config(f"sqlite:///{path}")
    versions = [script.revision for script in ScriptDirectory.from_config(config).walk_revisions()]
    before = versions[len(versions) // 3]
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        upgrade(config, before)
    engine.dispose()
    return before


@pytest.mark.fault("store-schema", 4)
def test_no_command_migrates_an_older_store(moco: Moco, project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = project / "mlflow.db"
    version = older_store(path)
    write_params(project, tracking__uri="sqlite:///mlflow.db")
    before = path.read_bytes()
    begin(project / "runs/pretrain/KEY").close()
    for command in (["origin"], ["sync"], ["ui", "--port", str(free_port())]):
        done = moco(*command)
        assert_one_line_error(done, "E-STORE-OLDER", "mlflow db upgrade", "copy the file")
        assert path.read_bytes() == before, command
    found = tracking.mlflow(CONFIG)
    assert found.status == "warn" and "older MLflow" in found.found
    assert "older MLflow" in trouble(CONFIG), "the first line of a run"
    assert path.read_bytes() == before
    with sqlite3.connect(path) as connection:
        assert connection.execute("SELECT version_num FROM alembic_version").fetchone() == (version,)
    connection.close()


def test_a_database_of_another_program_is_left_alone(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "mlflow.db") as connection:
        connection.execute("CREATE TABLE photographs (name TEXT)")
    connection.close()
    before = (tmp_path / "mlflow.db").read_bytes()
    with pytest.raises(UserError) as caught:
        client(f"sqlite:///{tmp_path}/mlflow.db")
    assert caught.value.code == "E-STORE-FOREIGN" and (tmp_path / "mlflow.db").read_bytes() == before


def finished_run(folder: Path) -> None:
    log = begin(folder)
    (folder / "note.txt").write_text("a result")
    log.write("artifact", path="note.txt")
    log.write("end", status="FINISHED")
    log.close()


def addresses(path: Path) -> set[str]:
    """All texts of the store that name a folder."""
    found = set()
    with sqlite3.connect(path) as connection:
        for (table,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall():
            for row in connection.execute(f"SELECT * FROM {table}"):
                found |= {str(cell) for cell in row if str(cell).startswith(("/", "file:"))}
    connection.close()
    return found


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.fault("moved-store", 2)
@pytest.mark.parametrize("way", ["moved", "copied"])
def test_a_project_that_was_moved_or_copied_keeps_its_artifacts_and_leaves_the_original_alone(
    moco: Moco,
    project: Path,
    monkeypatch: pytest.MonkeyPatch,
    way: str,
    empty_store: Path,
) -> None:
    first, second = project / "a project", project / "another"
    first.mkdir()
    shutil.copy(empty_store, first / "mlflow.db")
    monkeypatch.chdir(first)
    write_params(first, tracking__uri="sqlite:///mlflow.db")
    finished_run(first / "runs/pretrain/KEY")
    assert moco("sync").returncode == 0
    if way == "moved":
        first.rename(second)
    else:
        shutil.copytree(first, second)
    before = names(first) if first.exists() else []
    monkeypatch.chdir(second)
    found = tracking.mlflow(CONFIG)
    assert found.status == "warn" and str(first) in found.found and "moco sync" in found.remedy
    assert_one_line_error(moco("origin"), "E-STORE-MOVED", str(first))
    finished_run(second / "runs/train/KEY")
    words = [sys.executable, "-m", "moco.cli", "sync"]  # of its own: MLflow remembers artifacts' addresses in a process
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and str(first) in done.stdout, done.stderr
    assert not [text for text in addresses(second / "mlflow.db") if f"{first.name.replace(' ', '%20')}/" in text]
    connected = client(f"sqlite:///{second}/mlflow.db")
    runs = connected.search_runs([connected.get_experiment_by_name("moco-pipeline").experiment_id])
    assert len(runs) == 2
    for run in runs:
        path = connected.download_artifacts(run.info.run_id, "note.txt")
        assert Path(path).read_text() == "a result" and run.info.artifact_uri.startswith(
            f"file://{second}/mlartifacts/"
        )
    assert (names(first) if first.exists() else []) == before, "nothing is written into the original"
    assert tracking.mlflow(CONFIG).status == "ok"


def test_a_copy_without_its_artifacts_gets_them_from_the_logs(tmp_path: Path, store: Path) -> None:
    finished_run(tmp_path / "run")
    MlflowSink(tmp_path / "run", CONFIG).replay()
    with sqlite3.connect(store) as connection:  # as it would stand in a copy
        for table, column in (("experiments", "artifact_location"), ("runs", "artifact_uri")):
            connection.execute(f"UPDATE {table} SET {column} = replace({column}, ?, '/gone')", (str(tmp_path),))
    connection.close()
    shutil.rmtree(tmp_path / "mlartifacts")
    (tmp_path / "run/mlflow.json").unlink()
    MlflowSink(tmp_path / "run", CONFIG).replay()
    (file,) = (tmp_path / "mlartifacts").rglob("note.txt")
    assert file.read_text() == "a result" and not Path("/gone").exists()


def test_artifacts_that_somebody_keeps_elsewhere_stay_there(tmp_path: Path, store: Path) -> None:
    disk = tmp_path / "big disk/mlartifacts"
    disk.mkdir(parents=True)
    connect().create_experiment("experiment", artifact_location=disk.as_uri())
    (tmp_path / "link").symlink_to(tmp_path)
    assert moved_from(store) == relocate(store) == moved_from(tmp_path / "link/mlflow.db") == []
    finished_run(tmp_path / "run")
    MlflowSink(tmp_path / "run", CONFIG).replay()
    assert [path.name for path in disk.rglob("*.txt")] == ["note.txt"]


@pytest.mark.fault("store-state", 3)
def test_a_deleted_experiment_is_one_line_with_what_to_do(
    moco: Moco,
    project: Path,
    monkeypatch: pytest.MonkeyPatch,
    store: Path,
) -> None:
    connected = connect()
    connected.delete_experiment(connected.create_experiment("moco-pipeline"))
    write_params(project, tracking__uri="sqlite:///mlflow.db")
    begin(project / "runs/pretrain/KEY").close()
    assert_one_line_error(moco("sync"), "E-STORE-EXPERIMENT", "mlflow experiments restore")
    done = moco("doctor")
    assert "experiment 'moco-pipeline' is deleted" in done.stdout
    assert moco("data").returncode == 0
    done = moco("pretrain")
    assert done.returncode == 0 and "warning: MLflow: experiment 'moco-pipeline' is deleted" in done.stderr


@pytest.mark.fault("store-state", 2)
def test_a_registry_that_is_dead_is_told_at_the_start(monkeypatch: pytest.MonkeyPatch, store: Path) -> None:
    for address in (f"http://127.0.0.1:{free_port()}", "sqlite:////none/registry.db"):
        monkeypatch.setenv("MLFLOW_REGISTRY_URI", address)
        assert address in trouble(CONFIG) and "unset MLFLOW_REGISTRY_URI" in trouble(CONFIG)
        assert tracking.mlflow(CONFIG).status == "warn"
    monkeypatch.setenv("MLFLOW_REGISTRY_URI", f"sqlite:///{store}")
    assert trouble(CONFIG) == ""


@pytest.mark.parametrize("uri", ["databricks", "databricks://profile", "databricks-uc"])
def test_databricks_wants_an_absolute_name(uri: str) -> None:
    with pytest.raises(UserError) as caught:
        check_address(uri, "moco-pipeline")
    assert caught.value.code == "E-STORE-DATABRICKS"
    check_address(uri, "/Users/me/moco-pipeline")


@pytest.mark.parametrize("name", ["it's", "a/b", 'a"b', "a:b", "a.b", "a%b", " "])
def test_a_name_that_the_registry_refuses_is_refused_before_anything_runs(moco: Moco, project: Path, name: str) -> None:
    write_params(project, tracking__registered_model=name)
    assert_one_line_error(moco("data"), "tracking.registered_model")
    assert not (project / "models").exists()


def test_quotes_in_an_experiments_name_are_only_a_name(tmp_path: Path, store: Path) -> None:
    from dataclasses import replace

    config = replace(CONFIG, experiment='it\'s "mine"/100%')
    finished_run(tmp_path / "run")
    for _ in range(2):
        MlflowSink(tmp_path / "run", config).replay()
        (tmp_path / "run/mlflow.json").unlink()
    connected: Any = connect()
    assert len(connected.search_runs([connected.get_experiment_by_name(config.experiment).experiment_id])) == 1


def test_the_schema_of_this_mlflow_is_known_to_be_its_own(store: Path) -> None:
    refuse_other_schema(store)
