"""`moco ui` starts MLflow's own server and ends with it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from conftest import Moco, assert_one_line_error, write_params
from moco.files import account
from server_helpers import free_port


@pytest.mark.slow
def test_the_address_that_is_printed_answers_and_ctrl_c_ends_it(project: Path) -> None:
    write_params(project, tracking__uri="sqlite:///mlflow.db")
    (project / "mlruns/0").mkdir(parents=True)
    (project / "mlruns/0/meta.yaml").touch()
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "moco.cli", "ui", "--port", str(port)], cwd=project, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline().startswith("note: mlruns has runs of an older MLflow"), "which no page shows"
    assert f"http://127.0.0.1:{port}" in process.stdout.readline()
    deadline = time.monotonic() + 120
    while True:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5) as page:
                assert "mlflow" in page.read().decode().lower()
                break
        except (urllib.error.URLError, ConnectionError):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=120)
    assert process.returncode == 0
    time.sleep(0.5)
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0, "nothing is left running"


@pytest.mark.slow
def test_the_server_ends_when_moco_ui_is_killed(project: Path) -> None:
    write_params(project, tracking__uri="sqlite:///mlflow.db")
    port = free_port()
    process = subprocess.Popen([sys.executable, "-m", "moco.cli", "ui", "--port", str(port)], cwd=project,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip

    def answers() -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    deadline = time.monotonic() + 240
    while not answers():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.2)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 20
    while answers():
        assert time.monotonic() < deadline, "a server is left that nobody will stop"
        time.sleep(0.2)


def test_a_port_in_use_is_one_line(moco: Moco, project: Path) -> None:
    write_params(project, tracking__uri="sqlite:///mlflow.db")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert_one_line_error(moco("ui", "--port", str(taken.getsockname()[1])), "in use", "--port")


def test_a_server_needs_no_ui_of_its_own(moco: Moco, project: Path) -> None:
    write_params(project, tracking__uri="https://mlflow.example.org")
    done = moco("ui")
    assert done.returncode == 0 and "https://mlflow.example.org" in done.stdout


@pytest.mark.parametrize(
    ("uri", "code"),
    [
        ("", "E-TRACKING-NO-STORE"),
        ("  ", "E-TRACKING-NO-STORE"),
        ("mlruns", "E-STORE-FILES"),
        ("ftp://x", "E-STORE-ADDRESS"),
        ("sqlite://", "E-STORE-ADDRESS"),
        ("sqlite:///", "E-STORE-ADDRESS"),
    ],
)
def test_without_a_store_there_is_one_line(moco: Moco, project: Path, uri: str, code: str) -> None:
    write_params(project, tracking__uri=uri)
    assert_one_line_error(moco("ui", "--port", str(free_port())), "tracking.uri", code)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # MLflow and SQLAlchemy deprecate things among themselves
def test_a_store_that_cannot_be_made_is_one_line(moco: Moco, project: Path) -> None:
    (project / "file").touch()
    write_params(project, tracking__uri=f"sqlite:///{project}/file/mlflow.db")
    assert_one_line_error(moco("ui", "--port", str(free_port())), "file/mlflow.db", "cannot be written")


def test_a_user_without_a_name_is_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of `docker run --user 12345`."""

    def unknown(number: int) -> None:
        raise KeyError(number)

    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", unknown)
    assert account() == str(os.getuid())
