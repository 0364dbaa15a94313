"""What can be known of a store before MLflow is imported: in milliseconds for a file, in seconds for a server."""

from __future__ import annotations

import base64
import json
import os
import threading
import urllib.error
import urllib.parse
import urllib.request

from moco.errors import UserError
from moco.redaction import redact
from moco.settings.tracking import TrackingConfig
from moco.tracking.store import check_address, deleted_experiment, sqlite_file, store_uri
from moco.tracking.store_file import experiment_is_deleted, refuse_other_schema

SERVER_SECONDS = 3.0
BY_NAME = "api/2.0/mlflow/experiments/get-by-name"
REGISTRY = "MLFLOW_REGISTRY_URI"  # of a registry that is not the store's own; MLflow reads it


def trouble(config: TrackingConfig) -> str:
    """Return in one line, with what to do, why runs will not get into their store; '' where nothing is known."""
    uri = store_uri(config)
    try:
        check_address(uri, config.experiment)
        if (file := sqlite_file(uri)) and file.exists():
            refuse_other_schema(file)
            if experiment_is_deleted(file, config.experiment):
                return str(deleted_experiment(config.experiment, uri))
    except UserError as error:
        return str(error)
    if uri.startswith(("http://", "https://")) and (problem := server_problem(uri, config.experiment)):
        return problem
    registry = os.environ.get(REGISTRY, "")
    return registry_problem(registry) if registry and registry != uri else ""


def registry_problem(uri: str) -> str:
    """Return why the registry that the environment names cannot be used, or ''."""
    if file := sqlite_file(uri):
        said = "" if file.exists() else "no such file"
    elif uri.startswith(("http://", "https://")):
        said = answer_of(uri, "health")[1]
    else:
        said = ""
    return f"{REGISTRY} {redact(uri)}: {said}; start it, or unset {REGISTRY}" if said else ""


def server_problem(uri: str, experiment: str) -> str:
    """Return why a server that may be reached does not take runs of this experiment, with what to do, or ''."""
    status, said = answer_of(uri, f"{BY_NAME}?{urllib.parse.urlencode({'experiment_name': experiment})}")
    shown = redact(uri)
    if status == 200:
        try:
            stage = json.loads(said)["experiment"]["lifecycle_stage"]
        except (ValueError, KeyError, TypeError):
            return ""
        return str(deleted_experiment(experiment, uri)) if stage != "active" else ""
    refused = {
        401: f"{shown} refuses the credentials; set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD",
        403: f"{shown} does not permit experiment '{experiment}' to the user; ask whoever runs the server, or set "
        "tracking.experiment",
        0: f"the server {shown}: {said}",
    }
    return refused.get(status, "")


def answer_of(uri: str, path: str) -> tuple[int, str]:
    """Ask a server for a path below its address; return the status with the body of a 200 or '', or what it said.

    The status is 0 where there was no answer. Never raises, and takes SERVER_SECONDS at most.
    """
    parts = urllib.parse.urlsplit(uri)
    address = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}".rstrip("/")  # without the password
    answers: list[tuple[int, str]] = []
    request = urllib.request.Request(f"{address}/{path}", headers=_credentials(parts))
    # A thread, because the time limit of urllib does not cover the look-up of the name.
    thread = threading.Thread(target=lambda: answers.append(_ask(request, path)), daemon=True)
    thread.start()
    thread.join(SERVER_SECONDS)
    return answers[0] if answers else (0, f"no answer within {SERVER_SECONDS:g} s")


def _credentials(parts: urllib.parse.SplitResult) -> dict[str, str]:
    user = urllib.parse.unquote(parts.username or "") or os.environ.get("MLFLOW_TRACKING_USERNAME")
    if user:
        secret = urllib.parse.unquote(parts.password or "") or os.environ.get("MLFLOW_TRACKING_PASSWORD", "")
        return {"Authorization": f"Basic {base64.b64encode(f'{user}:{secret}'.encode()).decode()}"}
    token = os.environ.get("MLFLOW_TRACKING_TOKEN")
    return {"Authorization": f"Bearer {token}"} if token else {}


def _ask(request: urllib.request.Request, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(request, timeout=SERVER_SECONDS) as reply:
            body = reply.read(1 << 20).decode(errors="replace")
            if path == "health":
                body = "" if reply.status == 200 else f"answers {reply.status}"
            return reply.status, body
    except urllib.error.HTTPError as error:
        error.close()
        return error.code, f"answers {error.code} {error.reason} to /{path.partition('?')[0]}"
    except (OSError, ValueError) as error:  # URLError is an OSError
        return 0, f"cannot be reached: {_first_line(getattr(error, 'reason', error))}"
    except Exception as error:  # http.client's own, for what is no HTTP at all
        return 0, f"gives no sense: {_first_line(error)}"


def _first_line(error: object) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return (lines[0].strip() if lines else type(error).__name__)[:200]
