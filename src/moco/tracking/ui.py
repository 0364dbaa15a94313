"""The MLflow UI on localhost."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable

from moco.environment import RUN_MODULE
from moco.errors import Interrupted, UserError
from moco.files import account
from moco.redaction import redact
from moco.settings.tracking import TrackingConfig
from moco.tracking.store import available, check_address, client, explain, sqlite_file, store_uri, stray
from moco.tracking.store_file import refuse_other_schema, relocate

HOST = "127.0.0.1"
# Ends the server and its workers when `moco ui` is gone, by SIGKILL too: its standard input is then at an end.
END_WITH_PARENT = (
    "import os, signal, threading; threading.Thread(daemon=True, "
    "target=lambda: (os.read(0, 1), os.killpg(0, signal.SIGKILL))).start(); "
)


def serve(config: TrackingConfig, port: int, say: Callable[[str], None]) -> int:
    """Run until stopped; return MLflow's exit code. Raise UserError where it cannot start."""
    if not available():
        raise UserError("mlflow is not installed here; run this where it is")
    uri = store_uri(config)
    if not uri:
        raise UserError(
            "tracking.uri is empty: runs write their metric logs alone, and there is no store to show; set it, as to "
            "sqlite:///mlflow.db, and `moco sync` brings the runs there",
            "E-TRACKING-NO-STORE",
        )
    check_address(uri, config.experiment)
    if uri.startswith(("http://", "https://")):
        say(f"tracking.uri is a server: open {redact(uri)}")
        return 0
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            raise UserError(f"port {port} is in use; choose another with --port") from None
    try:  # here, as the server would tell of a bad store by a traceback
        if (file := sqlite_file(uri)) and file.exists():
            refuse_other_schema(file)
            if former := relocate(file):
                say(f"{file} was moved or copied from {former[0].parent}: its artifacts' addresses now lead here")
        client(uri).search_experiments(max_results=1)
    except UserError:
        raise
    except Exception as error:  # MLflow and its layers raise many kinds
        raise UserError(explain(error, uri)) from None
    if found := stray():
        say(f"note: {found}")
    say(f"MLflow UI: http://{HOST}:{port}   (stop with Ctrl-C)")
    say(f"from another machine: ssh -L {port}:{HOST}:{port} {account()}@{socket.gethostname()}")
    # One person looks, often on a login node: neither several workers nor those of MLflow's jobs are of use.
    command = [
        sys.executable, "-c", END_WITH_PARENT + RUN_MODULE, "mlflow", "ui", "--host", HOST, "--port", str(port),
        "--workers", "1",
    ]  # fmt: skip
    environment = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", **os.environ, "MLFLOW_BACKEND_STORE_URI": uri}
    # A session of its own, with the workers that it starts. The pipe is closed by the end of this process.
    server = subprocess.Popen(command, env=environment, start_new_session=True, stdin=subprocess.PIPE)
    try:
        return server.wait()
    except Interrupted:  # the way to end it
        os.killpg(server.pid, signal.SIGTERM)
        server.wait()
        return 0
