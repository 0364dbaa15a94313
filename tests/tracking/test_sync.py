"""`moco sync` says what it could not read, send or find, and leaves alone what somebody deleted."""

# ruff: noqa: F811 - fixtures of the helpers
from __future__ import annotations

import json
import os
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sink_helpers import CONFIG, begin, connect, empty_store, history, no_server_from_outside, only_run, store  # noqa: F401

from conftest import Moco, assert_one_line_error, write_params
from moco.errors import UserError
from moco.tracking.compare import collect
from moco.tracking.metric_log import MetricLog, read_events
from moco.tracking.mlflow_sink import MlflowSink
from moco.tracking.sync import logs_of, sync_all
from process_helpers import forget_failed_imports

pytestmark = pytest.mark.filterwarnings("default")  # MLflow and SQLAlchemy deprecate things among themselves
START = '{"event": "start", "time": 1.0, "stage": "train", "name": "n", "params": {}, "tags": {}}'
ODD = [
    '{"event": "metrics", "step": 1, "metrics": {"loss": 1}}', '{"event": "metrics", "time": 1.0, "metrics": {}}',
    '{"event": "metrics", "time": 1.0, "step": "x", "metrics": {}}', '{"event": "metrics", "time": "now", "step": 1}',
    '{"event": "metrics", "time": 1.0, "step": 1, "metrics": {"loss": "low"}}', '{"event": "end", "time": 2.0}',
    '{"event": "metrics", "time": 1.0, "step": 1, "metrics": [1]}', '{"event": "artifact", "time": 1.0, "path": 7}',
    '{"event": "end", "time": 1.0, "status": "FINE"}', '{"event": "model", "time": 1.0, "files": ["a", 3]}',
    '{"event": "start", "time": 1.0, "stage": "train", "name": "n", "params": [], "tags": {}}',
    '{"event": "start", "time": 1.0, "stage": "t", "name": "n", "params": {}, "tags": {}, "dataset": {"name": "d"}}',
    '{"event": "start", "time": 1.0, "stage": "t", "name": "n", "params": {}, "tags": {}, "pipeline": "p"}',
]  # fmt: skip


def write_log(folder: Path, *lines: str) -> Path:
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))
    return folder / "metrics.jsonl"


@pytest.mark.fault("odd-log", len(ODD))
@pytest.mark.parametrize("line", ODD)
def test_a_line_without_sense_is_named_with_its_number(tmp_path: Path, line: str) -> None:
    path = write_log(tmp_path / "runs/train/KEY", START, "torn {", line)
    with pytest.raises(UserError) as caught:
        list(read_events(path))
    assert caught.value.code == "E-LOG-LINE" and f"{path}, line 3" in str(caught.value)
    assert len(logs_of(tmp_path).logs) == 1, "it hides no other"
    problems: list[str] = []
    collect(tmp_path, problems)
    assert len(problems) == 1 and "line 3" in problems[0]


@pytest.mark.fault("odd-log")
def test_a_log_of_a_newer_format_wants_a_newer_moco(tmp_path: Path) -> None:
    path = write_log(tmp_path / "run", START.replace('"event"', '"format": 3, "event"'))
    with pytest.raises(UserError) as caught:
        list(read_events(path))
    assert caught.value.code == "E-LOG-NEWER" and "update moco" in str(caught.value)


def test_what_is_not_known_yet_is_passed_over(tmp_path: Path) -> None:
    path = write_log(tmp_path / "run", START, '{"event": "weather"}', '{"event": ["x"]}', '{"event": null}')
    assert len(list(read_events(path))) == 4


@pytest.mark.slow
@pytest.mark.fault("odd-log", 2)
def test_a_bad_log_costs_one_line_and_the_others_are_synced(moco: Moco, project: Path, store: Path) -> None:
    write_params(project, tracking__uri="sqlite:///mlflow.db")
    write_log(project / "runs/train/BAD", START, ODD[0])
    write_log(project / "runs/train/NEWER", START.replace('"event"', '"format": 3, "event"'))
    write_log(project / "runs/train/FIRST", '{"event": "x"}', START)
    write_log(project / "runs/train/GOOD", START, '{"event": "end", "time": 2.0, "status": "FINISHED"}')
    done = moco("sync")
    assert "2 of 4 runs" in done.stdout
    assert_one_line_error(done, "E-SYNC-FAILED", "2 problem(s)", "runs/train/")
    done = moco("compare")
    assert_one_line_error(done, "E-COMPARE")


@pytest.fixture
def as_nobody() -> Iterator[Any]:
    """Call to go on as a user without rights."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to become another user")
    yield lambda: os.seteuid(65534)
    os.seteuid(0)
    forget_failed_imports()


@pytest.mark.fault("unreadable-runs")
def test_what_another_user_does_not_let_me_read_is_counted_and_named(tmp_path: Path, as_nobody: Any) -> None:
    for parent in (tmp_path, *tmp_path.parents):
        if parent != Path("/tmp") and parent.is_relative_to("/tmp"):
            parent.chmod(0o755)
    mine = write_log(tmp_path / "runs/train/MINE", START)
    for name in ("runs/train/THEIRS", "runs/eval/KEY", "sweeps/lr/1/runs/train/KEY"):
        write_log(tmp_path / name, START)
    (tmp_path / "runs/train/THEIRS").chmod(0o700)  # as umask 077 has it
    (tmp_path / "runs/eval").chmod(0o700)
    (tmp_path / "sweeps").chmod(0o700)
    write_log(tmp_path / "runs/train/LOG", START).chmod(0o600)
    (tmp_path / "runs/train/LINK").symlink_to(tmp_path / "nowhere")
    as_nobody()
    found = logs_of(tmp_path)
    names = {str(path.relative_to(tmp_path)) for path in found.unreadable}
    assert found.logs == [mine]
    assert names == {"runs/train/THEIRS", "runs/eval", "sweeps", "runs/train/LOG", "runs/train/LINK"}
    problems: list[str] = []
    collect(tmp_path, problems)
    assert len(problems) == 1 and "5 run folder(s)" in problems[0] and "runs/train/THEIRS" in problems[0]


@pytest.mark.slow
@pytest.mark.fault("unreadable-runs")
def test_sync_does_not_say_that_all_is_well_where_it_could_not_look(
    moco: Moco,
    project: Path,
    store: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_params(project, tracking__uri="sqlite:///mlflow.db")
    write_log(project / "runs/train/GOOD", START)
    (project / "runs/train/LINK").symlink_to(project / "nowhere")
    done = moco("sync")
    assert "1 of 1 runs" in done.stdout
    assert_one_line_error(done, "E-SYNC-FAILED", "1 run folder(s) cannot be read", "runs/train/LINK")


@pytest.mark.slow
@pytest.mark.fault("escape", 6)
def test_only_what_lies_in_the_runs_own_folder_is_sent(
    tmp_path: Path,
    store: Path,
) -> None:
    folder = tmp_path / "runs/train/KEY"
    secret = tmp_path / "id_rsa"
    secret.write_text("secret")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/note.txt").write_text("secret")
    log = begin(folder)
    (folder / "link.txt").symlink_to(secret)
    (folder / "linked").symlink_to(tmp_path / "other")
    (folder / "deep").mkdir()
    (folder / "deep/link").symlink_to(secret)
    (folder / "mine.txt").write_text("mine")
    (folder / "near.txt").symlink_to("mine.txt")
    outside = [str(secret), "../../../id_rsa", "link.txt", "linked/note.txt", "deep", "."]
    for name in (*outside, "mine.txt", "near.txt", "gone.txt"):
        log.write("artifact", path=name)
    log.write("model", files=["../../../id_rsa", "mine.txt"], tags={}, needs={}, image=[4, 4])
    log.write("end", status="FINISHED")
    log.close()
    for _ in range(9):  # one is tried again each time
        with pytest.raises(UserError) as caught:
            sync_all(tmp_path, CONFIG, lambda _: None)
        assert caught.value.code == "E-SYNC-FAILED" and "is not sent" in str(caught.value)
    sent = [path for path in (tmp_path / "mlartifacts").rglob("*") if path.is_file()]
    assert [path.name for path in sent] == ["mine.txt"] and sent[0].read_text() == "mine"
    connected = connect()
    (run,) = connected.search_runs([connected.get_experiment_by_name("experiment").experiment_id])
    assert run.info.status == "FINISHED"


def remaining() -> list[Any]:
    client = connect()
    return list(client.search_runs([client.get_experiment_by_name("experiment").experiment_id]))


@pytest.mark.slow
@pytest.mark.fault("deleted-runs", 3)
@pytest.mark.parametrize("way", ["deleted", "deleted, state lost", "for good"])
def test_a_deleted_run_stays_deleted_until_it_is_asked_for(tmp_path: Path, store: Path, way: str) -> None:
    folders = [tmp_path / f"runs/train/{name}" for name in ("KEEP", "DROP")]
    for folder in folders:
        log = begin(folder)
        log.write("metrics", step=1, metrics={"loss": 0.5})
        log.write("end", status="FINISHED")
        log.close()
        MlflowSink(folder, CONFIG).replay()
    run_id = json.loads((folders[1] / "mlflow.json").read_text())["run_id"]
    connect().delete_run(run_id)
    if way == "for good":  # what `mlflow gc` does
        with sqlite3.connect(store) as connection:
            for table in ("metrics", "latest_metrics", "params", "tags", "runs"):
                connection.execute(f"DELETE FROM {table} WHERE run_uuid = ?", (run_id,))
        connection.close()
    elif "lost" in way:
        (folders[1] / "mlflow.json").unlink()
    said: list[str] = []
    for _ in range(2):
        sync_all(tmp_path, CONFIG, said.append)
    assert len(remaining()) == 1
    assert "1 of 2 runs" in said[0] and "1 were deleted there" in said[1] and str(folders[1]) in said[1]
    sync_all(tmp_path, CONFIG, said.append, [folders[1]], again=True)
    assert {run.data.metrics["loss"] for run in remaining()} == {0.5} and len(remaining()) == 2
    sync_all(tmp_path, CONFIG, said.append)
    assert "2 of 2 runs" in said[-1] and len(remaining()) == 2


@pytest.mark.slow
@pytest.mark.fault("deleted-runs")
def test_a_version_that_somebody_removed_stays_away(moco: Moco, project: Path, store: Path) -> None:
    write_params(project, tracking__uri="sqlite:///mlflow.db", tracking__offline=True)
    for stage in ("data", "pretrain", "train"):
        assert moco(stage).returncode == 0
    assert moco("sync").returncode == 0
    connected = connect()
    assert len(connected.search_model_versions("name = 'moco-classifier'")) == 1
    connected.delete_registered_model("moco-classifier")
    (state,) = (project / "runs/train").glob("*/mlflow.json")
    state.unlink()
    assert moco("sync").returncode == 0
    assert connected.search_registered_models() == []
    assert_one_line_error(moco("origin"), "E-ORIGIN-NO-VERSION")
    assert moco("sync", "--again", str(state.parent)).returncode == 0
    state.unlink()
    assert moco("sync", "--again", str(state.parent)).returncode == 0
    assert len(connected.search_model_versions("name = 'moco-classifier'")) == 1


@pytest.mark.slow
def test_values_are_sent_in_full_requests(tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each request costs a store four transactions, and a server a round trip."""
    from mlflow import MlflowClient

    log = MetricLog(tmp_path / "runs/pretrain/KEY/metrics.jsonl")
    log.write("start", stage="pretrain", name="n", params={}, tags={})
    names = [f"value_{number}" for number in range(6)]
    for step in range(1, 501):
        log.write("metrics", step=step, metrics=dict.fromkeys(names, 1 / step))
    log.close()
    sizes: list[int] = []
    send = MlflowClient.log_batch

    def counted(client: Any, run_id: str, metrics: Any = (), **others: Any) -> Any:
        sizes.append(len(metrics))
        return send(client, run_id, metrics=metrics, **others)

    monkeypatch.setattr(MlflowClient, "log_batch", counted)
    sync_all(tmp_path, CONFIG, lambda _: None)
    assert [size for size in sizes if size] == [996, 996, 996, 12]
    assert history(connect(), only_run().info.run_id, "value_5") == [(step, 1 / step) for step in range(1, 501)]


@pytest.mark.long
def test_twenty_thousand_lines_are_brought_there_in_seconds(tmp_path: Path, store: Path) -> None:
    log = MetricLog(tmp_path / "runs/pretrain/KEY/metrics.jsonl")
    log.write("start", stage="pretrain", name="n", params={}, tags={})
    for step in range(1, 20_001):
        log.write("metrics", step=step, metrics={"loss": 1 / step, "lr": 0.1, "images_per_second": 100.0 + step})
    log.write("end", status="FINISHED")
    log.close()
    took = []
    for _ in range(2):
        began = time.process_time()
        sync_all(tmp_path, CONFIG, lambda _: None)
        took.append(time.process_time() - began)
    (log.path.parent / "mlflow.json").unlink()
    began = time.process_time()
    sync_all(tmp_path, CONFIG, lambda _: None)
    assert took[1] < 2 and time.process_time() - began < 4, "that nothing is new is soon known"
