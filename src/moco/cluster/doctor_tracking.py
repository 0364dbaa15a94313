"""Checks of what keeps experiments: DVC, git, MLflow. The stages run without any of them."""

from __future__ import annotations

import base64
import importlib
import os
import re
import shlex
import threading
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

from moco.cluster.finding import (
    MOUNTS,
    Finding,
    command,
    fail,
    file_system,
    note,
    ok,
    over_network,
    reason,
    warn,
    writing_problem,
)
from moco.config import TrackingConfig
from moco.tracking.store import available, file_store, sqlite_file, store_uri, stray

SERVER_SECONDS = 3.0
LATER = "runs go on all the same, and `moco sync` brings the rest"


def dvc() -> Finding:
    """Whether `dvc repro` can run in this folder."""
    try:
        version = importlib.import_module("dvc").__version__
    except ModuleNotFoundError as error:
        if error.name != "dvc":
            return warn("dvc", f"cannot be imported: {reason(error)}", "install it anew")
        return note("dvc", "not installed: `moco data`, `moco pretrain`, … run without it, one by one")
    except Exception as error:  # whatever a half-installed package raises
        return warn("dvc", f"cannot be imported: {reason(error)}", "install it anew")
    folder = Path(".dvc")
    if not folder.is_dir():
        return warn("dvc", f"{version}, but there is no .dvc in this folder", "run `dvc init`, or use the checkout")
    inner = folder / "tmp" if (folder / "tmp").is_dir() else folder
    lock = folder / "tmp" / "lock"
    problem = writing_problem(inner)
    if problem is None and lock.exists() and not os.access(lock, os.W_OK):
        problem, inner = "permission denied", lock
    if problem is not None:
        remedy = "make it writable for you: dvc repro locks there"
        return fail("dvc", f"{version}, but {inner} cannot be written: {problem}", remedy)
    return ok("dvc", f"{version}, its lock can be written")


def git() -> Finding:
    """The commit that runs will carry."""
    head = command("git", "rev-parse", "--short", "HEAD")
    if head is None:
        return note("git", "not installed: runs carry no commit")
    if head.returncode != 0:
        return _no_commit(head.stderr)
    status = command("git", "status", "--porcelain", "--untracked-files=no", timeout=60)
    if status is None or status.returncode != 0:
        return note("git", f"commit {head.stdout.strip()}, whether it is changed could not be found out")
    changed = len(status.stdout.splitlines())
    return ok("git", f"commit {head.stdout.strip()}, " + (f"{changed} file(s) changed" if changed else "clean"))


def _no_commit(said: str) -> Finding:
    foreign = re.search(r"(?:dubious ownership in|unsafe) repository[^']*'([^']*)'", said)
    if foreign:  # the folder of another user, as bind mounts into a container often are
        remedy = f"git config --global --add safe.directory {shlex.quote(foreign[1])}"
        return warn("git", "dubious ownership: git does not trust this repository, as another user owns it", remedy)
    if "not a git repository" in said:
        return note("git", "this folder is in no repository: runs carry no commit")
    if "HEAD" in said or "Needed a single revision" in said:
        return note("git", "no commit yet: runs carry none")
    return warn("git", reason(said), "see what `git status` says")


def mlflow(config: TrackingConfig, mounts: Path = MOUNTS) -> Finding:
    """Whether runs reach their MLflow store from here. No run depends on it, so this never fails."""
    if not available():
        return note("mlflow", "not installed: the metric log is enough, `moco sync` brings it to MLflow elsewhere")
    uri = store_uri(config)
    if not uri:
        return note("mlflow", "no store is set (tracking.uri): the metric log is all there is")
    if folder := file_store(uri):
        return warn("mlflow", f"{folder}: MLflow has no stores of files any more", "set tracking.uri to a database")
    if file := sqlite_file(uri):
        return _sqlite(file, mounts)
    if uri.startswith(("http://", "https://")):
        return _server(uri)
    # Never the whole address: it may hold a password.
    return note("mlflow", f"a store of the kind {uri.partition(':')[0]}, not tried")


def old_runs() -> Finding | None:
    """Of an MLflow that wrote files; None where there are none."""
    found, _, remedy = stray().partition("; ")
    return warn("mlruns", found, remedy) if found else None


def _sqlite(file: Path, mounts: Path) -> Finding:
    folder = file.parent
    found = f"SQLite file {file}"
    problem = writing_problem(folder) if folder.is_dir() else f"{folder} is not a folder"
    if problem is None and file.exists() and not os.access(file, os.W_OK):
        problem = "permission denied"
    if problem:
        remedy = f"set tracking.uri to a file that can be, {LATER}"
        return warn("mlflow", f"{found} cannot be written: {problem}", remedy)
    kind = file_system(folder, mounts)
    if over_network(kind):
        remedy = "keep the store on a disk of one machine or on a server: SQLite's locks do not hold over a network"
        return warn("mlflow", f"{found} is on {kind}", remedy)
    return ok("mlflow", f"{found} ({kind})")


def _ask(address: str, headers: dict[str, str]) -> str:
    """'' where the server answers that it is well, else what it answered or why it did not."""
    try:
        with urllib.request.urlopen(urllib.request.Request(address, headers=headers), timeout=SERVER_SECONDS) as reply:
            return "" if reply.status == 200 else f"answers {reply.status}"
    except urllib.error.HTTPError as error:
        error.close()
        return f"answers {error.code} {error.reason} to /health"
    except (OSError, ValueError) as error:  # URLError is an OSError
        return f"cannot be reached: {reason(str(getattr(error, 'reason', error)))}"
    except Exception as error:  # http.client's own, for what is no HTTP at all
        return f"gives no sense: {reason(error)}"


def _server(uri: str) -> Finding:
    parts = urllib.parse.urlsplit(uri)
    place, headers = parts.netloc.rpartition("@")[2], {}
    user = urllib.parse.unquote(parts.username or "") or os.environ.get("MLFLOW_TRACKING_USERNAME")
    if user:
        secret = urllib.parse.unquote(parts.password or "") or os.environ.get("MLFLOW_TRACKING_PASSWORD", "")
        login = f"{user}:{secret}"
        headers["Authorization"] = f"Basic {base64.b64encode(login.encode()).decode()}"
    shown = f"{parts.scheme}://{place}{parts.path}".rstrip("/")  # without the password
    answers: list[str] = []
    # A thread, because the time limit of urllib does not cover the look-up of the name.
    thread = threading.Thread(target=lambda: answers.append(_ask(f"{shown}/health", headers)), daemon=True)
    thread.start()
    thread.join(SERVER_SECONDS)
    answer = answers[0] if answers else f"no answer within {SERVER_SECONDS:g} s"
    if answer:
        return warn("mlflow", f"the server {shown}: {answer}", LATER)
    return ok("mlflow", f"the server {shown} answers")
