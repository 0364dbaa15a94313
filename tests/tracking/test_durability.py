"""Processes that are killed, disks that are full, many at once: the log stays whole and MLflow shows what it says."""

from __future__ import annotations

import contextlib
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from conftest import Moco, assert_one_line_error, write_params
from moco.tracking.metric_log import MetricLog, close_abandoned, metric_history, read_events
from server_helpers import free_port, history, runs

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("default"),  # MLflow and its libraries deprecate things among themselves
]
STORE = "sqlite:///mlflow.db"


def client(project: Path) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=f"sqlite:///{project}/mlflow.db")


# Imports once, then is forked for each life of the run: a process that is killed all the same.
LIVES = """
import glob, os, random, signal, sys, time
sys.argv = ["moco", "pretrain"]
from moco.cli.main import main
import moco.stages.pretrain
kills, draw = int(os.environ["KILLS"]), random.Random(5)
while True:
    child = os.fork()
    if child == 0:
        os.setpgrp()
        main.main()
        os._exit(0)
    if kills:
        written = lambda: sum(map(os.path.getsize, glob.glob("runs/pretrain/*/metrics.jsonl")))
        wanted = written() + draw.randrange(1, 20000)  # at any point, its very start included
        while written() < wanted:
            time.sleep(0.01)
            ended, _ = os.waitpid(child, os.WNOHANG)
            if ended: sys.exit("the run ended before it was killed")
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        kills -= 1
    else:
        sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.fault("kill-log", 20)
@pytest.mark.long
@pytest.mark.parametrize("offline", [True, False])
def test_a_run_that_is_killed_twenty_times_has_every_step_once(
    moco: Moco, project: Path, monkeypatch: pytest.MonkeyPatch, offline: bool
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    write_params(project, tracking__uri=STORE, tracking__offline=offline, pretrain__epochs=800,
                 monitor__every=50, monitor__log_every=4)  # fmt: skip
    assert moco("data").returncode == 0
    done = subprocess.run(
        [sys.executable, "-c", LIVES], env={**os.environ, "KILLS": "20"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (log,) = (project / "runs/pretrain").glob("*/metrics.jsonl")
    assert sum(event["event"] == "start" for event in read_events(log)) == 21
    ours = [(line["step"], line["metrics"]["loss"]) for line in metric_history(log) if "loss" in line["metrics"]]
    assert [step for step, _ in ours] == list(range(4, 4001, 4))
    for _ in range(2):
        assert moco("sync").returncode == 0
    (run,) = runs(client(project), "pretrain")
    assert run.info.status == "FINISHED"
    found = history(client(project), run, "loss")
    if (
        not offline
    ):  # of steps that were made again MLflow keeps what it was sent first: a mean over other steps, perhaps
        found, ours = [(step, 0.0) for step, _ in found], [(step, 0.0) for step, _ in ours]
    assert found == ours


def test_a_killed_run_is_shown_as_killed(moco: Moco, project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process beside it notices, and tells MLflow."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    write_params(project, tracking__uri=STORE, pretrain__epochs=4000, monitor__every=1000)
    assert moco("data").returncode == 0
    training = subprocess.Popen([sys.executable, "-m", "moco.cli", "pretrain"], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    logs = project / "runs/pretrain"
    while not any('"checkpoint"' in log.read_text() for log in logs.glob("*/metrics.jsonl")):
        assert time.monotonic() < deadline and training.poll() is None
        time.sleep(0.2)
    training.send_signal(signal.SIGKILL)
    training.wait()
    (log,) = logs.glob("*/metrics.jsonl")
    while [event["event"] for event in read_events(log)][-1] != "end":
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert moco("sync").returncode == 0  # which waits for the process beside the run, if it is still at it
    (run,) = runs(client(project), "pretrain")
    assert run.info.status == "KILLED"
    (parent,) = runs(client(project), "pipeline")
    assert parent.info.status == "KILLED"
    assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id


def test_a_run_without_a_word_is_ended_only_when_nobody_holds_it(tmp_path: Path) -> None:
    from filelock import FileLock

    path = tmp_path / "metrics.jsonl"
    log = MetricLog(path)
    log.write("start", stage="train", name="a", params={}, tags={})
    log.close()
    with FileLock(tmp_path / "lock"):
        close_abandoned(path, quiet=0)
    close_abandoned(path)  # quiet for a moment only
    assert [event["event"] for event in read_events(path)] == ["start"]
    for _ in range(2):
        close_abandoned(path, quiet=0)
    assert [event.get("status") for event in read_events(path)] == [None, "KILLED"]


TEN = """
import os, sys
from pathlib import Path
from moco.settings.tracking import TrackingConfig
from moco.tracking import run
from moco.tracking.origin import Origin
run.PATIENCE = 120
here = Path(sys.argv[1])
children = []
for number in range(10):
    child = os.fork()
    if child == 0:
        config = TrackingConfig(uri=f"sqlite:///{here}/mlflow.db", experiment="moco-pipeline", registered_model="m")
        pipeline = {"key": "one", "name": "p", "params": {"pretrain.lr": 1}, "tags": {"data_digest": "d"}}
        with run.Run(here / f"runs/train/{number}", "train", config, print) as record:
            record.start({"pretrain.seed": number}, Origin({"data_digest": "d"}, {}, pipeline, {}))
            for step in range(1, 51): record.log({"loss": number + 1 / step}, step)
        os._exit(0)
    children.append(child)
sys.exit(any(os.waitpid(child, 0)[1] for child in children))
"""


@pytest.mark.long
def test_ten_runs_that_begin_at_once_share_a_new_store(
    moco: Moco, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    write_params(project, tracking__uri=STORE)
    done = subprocess.run([sys.executable, "-c", TEN, str(project)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert moco("sync").returncode == 0  # whatever a busy file refused
    found = {int(run.data.params["pretrain.seed"]): run for run in runs(client(project), "train")}
    assert set(found) == set(range(10))
    for number, run in found.items():
        assert history(client(project), run, "loss") == [(step, number + 1 / step) for step in range(1, 51)]
        assert run.info.status == "FINISHED"
    assert len(runs(client(project), "pipeline")) == 1


@pytest.mark.fault("full-disk")
def test_a_full_disk_under_the_log_is_one_line_and_the_run_goes_on_afterwards(
    moco: Moco, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    write_params(project, tracking__uri=STORE, tracking__offline=True, pretrain__epochs=100, monitor__every=50,
                 checkpoint__every=20)  # fmt: skip
    assert moco("data").returncode == 0
    (project / "runs").mkdir(exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(project / "runs")]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting is not permitted here")
    write = MetricLog.write

    def fill(log: MetricLog, event: str, **fields: Any) -> None:
        """Takes the rest of the disk once a checkpoint is there, as somebody else's files would."""
        write(log, event, **fields)
        if event == "checkpoint":
            with contextlib.suppress(OSError), (project / "runs/others").open("ab", buffering=0) as file:
                while file.write(b"x" * 4096):
                    pass

    try:
        with monkeypatch.context() as patched:
            patched.setattr(MetricLog, "write", fill)
            assert_one_line_error(moco("pretrain"), "metrics.jsonl: cannot be written")
        (project / "runs/others").unlink()
        subprocess.run(["mount", "-o", "remount,size=64m", str(project / "runs")], check=True)
        assert moco("pretrain").returncode == 0
        for _ in range(2):
            assert moco("sync").returncode == 0
        (run,) = runs(client(project), "pretrain")
        assert [step for step, _ in history(client(project), run, "loss")] == list(range(1, 501))
        assert run.info.status == "FINISHED"
    finally:
        subprocess.run(["umount", str(project / "runs")], check=True)


@pytest.mark.fault("store")
@pytest.mark.parametrize(
    ("version", "words"), [("451aebb31d03", "mlflow db upgrade"), ("ffffffffffff", "install --upgrade mlflow")]
)
def test_a_store_of_another_version_is_one_line(
    moco: Moco, project: Path, monkeypatch: pytest.MonkeyPatch, version: str, words: str
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    write_params(project, tracking__uri=STORE, tracking__offline=True)
    for stage in ("data", "pretrain"):
        assert moco(stage).returncode == 0
    from moco.tracking.store import create

    create(f"sqlite:///{project}/mlflow.db")
    with sqlite3.connect(project / "mlflow.db") as store:
        store.execute("UPDATE alembic_version SET version_num = ?", (version,))
    store.close()
    assert_one_line_error(moco("sync"), "mlflow.db", words)
    assert_one_line_error(moco("origin"), words)
    assert_one_line_error(moco("ui", "--port", str(free_port())), "mlflow.db", words)
