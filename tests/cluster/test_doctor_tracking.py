"""Checks of DVC, git and MLflow: real repositories, real servers on this machine, a closed port."""

from __future__ import annotations

import base64
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import yaml

from conftest import Moco, assert_one_line_error, write_params
from moco.doctor import tracking
from moco.doctor.checks import Finding, attempt
from moco.settings.tracking import TrackingConfig
from moco.tracking import store_check


def test_dvc(project: Path, read_only: Path) -> None:
    pytest.importorskip("dvc")
    assert attempt("dvc", tracking.dvc).status == "warn"
    (project / ".dvc").mkdir()
    found = attempt("dvc", tracking.dvc)
    assert found.status == "ok" and re.match(r"\d+\.\d+", found.found)
    assert list((project / ".dvc").iterdir()) == []
    (project / ".dvc" / "tmp").symlink_to(read_only)
    found = attempt("dvc", tracking.dvc)
    assert found.status == "FAIL" and ".dvc/tmp cannot be written: Read-only file system" in found.found


def test_a_broken_dvc_is_told_from_a_missing_one(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "dvc"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(project))
    (project / "dvc.py").write_text("import absent_helper")
    found = tracking.dvc()
    assert found.status == "warn" and "absent_helper" in found.found
    (project / "dvc.py").write_text("1 / 0")
    assert tracking.dvc().status == "warn"
    monkeypatch.setitem(sys.modules, "dvc", None)
    assert tracking.dvc().status == "note"


def git(*arguments: str) -> None:
    author = ("-c", "user.name=a", "-c", "user.email=a@example.org")
    subprocess.run(["git", *author, *arguments], check=True, capture_output=True)


def test_git(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(project / "gitconfig"))
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(project.parent))
    assert tracking.git().found == "this folder is in no repository: runs carry no commit"
    git("init")
    assert tracking.git().found == "no commit yet: runs carry none"
    git("add", "params.yaml")
    git("commit", "-m", "x")
    found = tracking.git()
    assert found.status == "ok" and re.fullmatch("commit [0-9a-f]{7,}, clean", found.found)
    write_params(project, pretrain__epochs=3)
    assert tracking.git().found.endswith(", 1 file(s) changed")
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")  # git's own way to try this
    found = tracking.git()
    assert found.status == "warn" and "dubious ownership" in found.found
    assert found.remedy == f"git config --global --add safe.directory {project}"
    subprocess.run(found.remedy.split(), check=True)
    assert tracking.git().status == "ok"
    monkeypatch.setenv("PATH", str(project))
    assert tracking.git() == Finding("note", "git", "not installed: runs carry no commit")


@pytest.fixture(autouse=True)
def straight(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the suite's surroundings: no store of theirs, no proxy before this machine's own ports."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def look_at_store(uri: str, mounts: Path = tracking.MOUNTS) -> Finding:
    return tracking.mlflow(TrackingConfig(uri=uri, experiment="experiment", registered_model="model"), mounts)


class Server(BaseHTTPRequestHandler):
    """Well on /health, for the user a with the password p:w or for anybody; slow and of no sense on /slow/health."""

    seen: list[tuple[str, str | None]] = []  # noqa: RUF012 - emptied by the fixture

    def do_GET(self) -> None:
        self.seen.append((self.path, self.headers.get("Authorization")))
        if self.path == "/slow/health":
            for _ in range(100):  # never silent for long, and never done
                self.wfile.write(b"H")
                time.sleep(0.1)
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    Server.seen.clear()
    httpd = HTTPServer(("127.0.0.1", 0), Server)
    thread = threading.Thread(target=httpd.serve_forever, args=(0.01,))
    thread.start()
    yield f"127.0.0.1:{httpd.server_port}"
    httpd.shutdown()
    thread.join()
    httpd.server_close()


def test_mlflow_server(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert look_at_store(f"http://{server}/") == Finding("ok", "mlflow", f"the server http://{server} answers")
    found = look_at_store(f"http://{server}/prefix")
    assert found.status == "warn" and "answers 404" in found.found and "moco sync" in found.remedy
    found = look_at_store(f"http://a:p%3Aw@{server}")
    assert found.status == "ok" and "p%3Aw" not in found.line()
    basic = "Basic " + base64.b64encode(b"a:p:w").decode()
    asked = [(path, who) for path, who in Server.seen if path.endswith("/health")]
    assert asked == [("/health", None), ("/prefix/health", None), ("/health", basic)]
    assert all(who == basic for path, who in Server.seen[3:] if path != "/health")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://{server}")
    assert look_at_store("").status == "ok"
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    monkeypatch.setattr(store_check, "SERVER_SECONDS", 0.2)
    start = time.perf_counter()
    assert look_at_store(f"http://{server}/slow").status == "warn"
    assert time.perf_counter() - start < 5


def test_mlflow_server_that_is_away() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # bound, but not listening
        found = look_at_store(f"http://127.0.0.1:{closed.getsockname()[1]}")
    assert found.status == "warn" and "Connection refused" in found.found
    assert found.remedy == "runs go on all the same, and `moco sync` brings the rest"


def test_mlflow_server_that_speaks_something_else() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:

        def answer() -> None:
            connection, _ = other.accept()
            with connection:
                connection.sendall(b"SSH-2.0-x\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        found = look_at_store(f"http://127.0.0.1:{other.getsockname()[1]}")
        thread.join()
    assert found.status == "warn", found.line()


def test_mlflow_file(project: Path, read_only: Path) -> None:
    found = look_at_store("sqlite:///mlflow.db")
    assert found.status == "ok" and found.found.startswith(f"SQLite file {project}/mlflow.db (")
    assert not (project / "mlflow.db").exists()
    found = look_at_store(f"sqlite:///{read_only}/mlflow.db")
    assert found.status == "warn" and found.found.endswith("cannot be written: Read-only file system")
    assert look_at_store("sqlite:///none/mlflow.db").status == "warn"
    (project / "mounts").write_text("server:/home / nfs4 rw 0 0\n")
    found = look_at_store("sqlite:///mlflow.db", project / "mounts")
    assert found.status == "warn" and found.found.endswith("is on nfs4")


def write_old_runs(folder: Path) -> None:
    """As MLflow 2 did: a folder of an experiment with one run."""
    experiment = folder / "mlruns/0"
    (experiment / "1234abcd/metrics").mkdir(parents=True)
    shared = {"lifecycle_stage": "active", "experiment_id": "0"}
    location = {"artifact_location": experiment.as_uri(), "name": "Default", **shared}
    run = {
        "artifact_uri": f"{experiment.as_uri()}/1234abcd/artifacts", "run_id": "1234abcd", "run_uuid": "1234abcd",
        "run_name": "old", "start_time": 1600000000000, "end_time": 1600000001000, "status": 3, "user_id": "me",
        "source_name": "", "source_type": 4, "source_version": "", "entry_point_name": "", "tags": [], **shared,
    }  # fmt: skip
    (experiment / "meta.yaml").write_text(yaml.safe_dump(location))
    (experiment / "1234abcd/meta.yaml").write_text(yaml.safe_dump(run))
    (experiment / "1234abcd/metrics/loss").write_text("1600000000500 0.5 1\n")


def test_old_runs_are_found(project: Path) -> None:
    assert tracking.old_runs() is None
    (project / "mlruns/7/8/artifacts").mkdir(parents=True)  # a server's artifacts are no store
    assert tracking.old_runs() is None
    write_old_runs(project)
    found = tracking.old_runs()
    assert found is not None and found.status == "warn" and "mlruns has runs of an older MLflow" in found.found
    assert look_at_store("mlruns").status == look_at_store(f"file://{project}/mlruns").status == "warn"


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # MLflow and SQLAlchemy deprecate things among themselves
def test_the_command_that_is_named_brings_old_runs_into_a_store(moco: Moco, project: Path) -> None:
    write_params(project, tracking__uri="mlruns")
    write_old_runs(project)
    failed = moco("ui")
    assert_one_line_error(failed, "no stores of files", "sqlite:///mlflow.db")
    (named, *_) = re.findall(r"`(mlflow [^`]+)`", failed.stderr)
    subprocess.run(named.split(), cwd=project, check=True, capture_output=True)
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{project}/mlruns.db")
    assert [(run.info.run_name, run.data.metrics) for run in client.search_runs(["0"])] == [("old", {"loss": 0.5})]


def test_mlflow_elsewhere_or_not_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    assert look_at_store("").status == "note"
    found = look_at_store("postgresql://a:secret@host/db")
    assert found.status == "note" and "postgresql" in found.found and "secret" not in found.line()
    monkeypatch.setitem(sys.modules, "mlflow", None)
    found = look_at_store("http://127.0.0.1:9")
    assert found.status == "note" and "metric log is enough" in found.found and "moco sync" in found.found
