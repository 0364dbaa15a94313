"""Real servers for tests: PostgreSQL and MLflow, and one between that answers wrongly or late."""

from __future__ import annotations

import contextlib
import http.server
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

EXPERIMENT = "moco-pipeline"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def postgres() -> Iterator[str]:
    """A PostgreSQL of its own, as another user where this one is root, which it refuses; yields its address. Its folder
    is not one of pytest's: another pytest that begins closes these to other users."""
    if shutil.which("initdb") is None:
        if os.environ.get("MOCO_NO_SKIP"):
            pytest.fail("needs PostgreSQL: initdb, pg_ctl")
        pytest.skip("needs PostgreSQL: initdb, pg_ctl")
    folder = Path(tempfile.mkdtemp(prefix="moco-postgres-"))
    who: list[str] = []
    if os.geteuid() == 0:
        shutil.chown(folder, "nobody")
        who = ["setpriv", "--reuid=nobody", "--clear-groups"]
    data, port = folder / "data", free_port()
    run = [*who, "env", f"HOME={folder}"]
    subprocess.run([*run, "initdb", "-D", data, "-U", "mlflow", "-A", "trust"], check=True, capture_output=True)
    options = f"-p {port} -k {folder} -c listen_addresses=127.0.0.1 -c fsync=off"
    start = [*run, "pg_ctl", "-D", data, "-o", options, "-l", folder / "log", "-w", "start"]
    subprocess.run(start, check=True, stdout=subprocess.DEVNULL)
    try:
        yield f"postgresql+psycopg://mlflow@127.0.0.1:{port}/postgres"
    finally:
        stop = [*run, "pg_ctl", "-D", data, "-m", "immediate", "-t", "120", "stop"]  # a busy machine takes its time
        done = subprocess.run(stop, capture_output=True, text=True, check=False)
        shutil.rmtree(folder)
        assert done.returncode == 0, done.stderr


class MlflowServer:
    """`mlflow server`, started, killed and started again at one address."""

    def __init__(self, store: str, artifacts: Path) -> None:
        self.store, self.artifacts, self.port = store, artifacts, free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        words = ["--backend-store-uri", self.store, "--artifacts-destination", str(self.artifacts), "--workers", "1"]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "mlflow", "server", *words, "--host", "127.0.0.1", "--port", str(self.port)],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        deadline = time.monotonic() + 120
        while True:
            with contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError):
                urllib.request.urlopen(f"{self.uri}/health", timeout=5).close()
                return
            assert self.process.poll() is None and time.monotonic() < deadline
            time.sleep(0.3)

    def kill(self) -> None:
        """With SIGKILL, workers included."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None

    def client(self) -> Any:
        from mlflow import MlflowClient

        return MlflowClient(tracking_uri=self.uri)


@contextlib.contextmanager
def answering(status: int, delay: float = 0.0) -> Iterator[str]:
    """A server that answers everything so; yields its address."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def answer(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))  # else its sender is cut off at the close
            time.sleep(delay)
            with contextlib.suppress(ConnectionError):
                self.send_response(status)
                self.send_header("Content-Length", "0")
                self.end_headers()

        do_GET = do_POST = do_PATCH = answer  # noqa: N815

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def runs(client: Any, stage: str) -> list[Any]:
    experiment = client.get_experiment_by_name(EXPERIMENT)
    return [] if experiment is None else list(client.search_runs([experiment.experiment_id], f"tags.stage = '{stage}'"))


def history(client: Any, run: Any, metric: str) -> list[tuple[int, float]]:
    return [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, metric)]
