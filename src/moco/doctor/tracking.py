"""Checks of what keeps experiments: DVC, git, MLflow. The stages run without any of them."""

from __future__ import annotations

import importlib
import os
import re
import shlex
from pathlib import Path

from moco.doctor.checks import (
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
from moco.errors import UserError
from moco.redaction import redact
from moco.settings.tracking import TrackingConfig
from moco.tracking.store import (
    available,
    check_address,
    deleted_experiment,
    sqlite_file,
    store_uri,
    stray,
)
from moco.tracking.store_check import REGISTRY, answer_of, registry_problem, server_problem
from moco.tracking.store_file import experiment_is_deleted, moved_from, refuse_other_schema

LATER = "runs go on all the same, and `moco sync` brings the rest"


def dvc() -> Finding:
    """Tell whether `dvc repro` can run in this folder."""
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
    """Tell the commit that runs will record."""
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
    """Tell whether runs reach their MLflow store from here. No run depends on it, so this never fails."""
    if not available():
        return note("mlflow", "not installed: the metric log is enough, `moco sync` brings it to MLflow elsewhere")
    uri = store_uri(config)
    if not uri:
        return note("mlflow", "no store is set (tracking.uri): the metric log is all there is")
    try:
        check_address(uri, config.experiment)
    except UserError as error:
        return _warned(error)
    if problem := _registry(uri):
        return problem
    if file := sqlite_file(uri):
        return _sqlite(file, config, mounts)
    # Never the whole address: it may hold a password.
    found = note("mlflow", f"a store of the kind {uri.partition(':')[0]}, not tried")
    return _server(config, uri) if uri.startswith(("http://", "https://")) else found


def old_runs() -> Finding | None:
    """Tell of the runs of an MLflow that wrote files; None where there are none."""
    found, _, remedy = stray().partition("; ")
    return warn("mlruns", found, remedy) if found else None


def _registry(uri: str) -> Finding | None:
    registry = os.environ.get(REGISTRY, "")
    found, _, remedy = registry_problem(registry).partition("; ") if registry and registry != uri else ("", "", "")
    return warn("mlflow", found, remedy) if found else None


def _warned(error: UserError) -> Finding:
    found, _, remedy = str(error).partition("; ")
    return warn("mlflow", found, remedy or LATER)


def _sqlite(file: Path, config: TrackingConfig, mounts: Path) -> Finding:
    folder = file.parent
    found = f"SQLite file {file}"
    problem = writing_problem(folder) if folder.is_dir() else f"{folder} is not a folder"
    if problem is None and file.exists() and not os.access(file, os.W_OK):
        problem = "permission denied"
    if problem:
        remedy = f"set tracking.uri to a file that can be, {LATER}"
        return warn("mlflow", f"{found} cannot be written: {problem}", remedy)
    try:
        refuse_other_schema(file)
    except UserError as error:
        return _warned(error)
    if experiment_is_deleted(file, config.experiment):
        return _warned(deleted_experiment(config.experiment, f"sqlite:///{file}"))
    if former := moved_from(file):
        return warn(
            "mlflow", f"{found} was moved or copied from {former[0].parent}, where its artifacts' addresses still lead",
            "`moco sync` sets them to this folder",
        )  # fmt: skip
    kind = file_system(folder, mounts)
    if over_network(kind):
        remedy = "keep the store on a disk of one machine or on a server: SQLite's locks do not hold over a network"
        return warn("mlflow", f"{found} is on {kind}", remedy)
    return ok("mlflow", f"{found} ({kind})")


def _server(config: TrackingConfig, uri: str) -> Finding:
    shown = redact(uri).rstrip("/")
    _, said = answer_of(uri, "health")
    if said:
        return warn("mlflow", f"the server {shown}: {said}", LATER)
    if problem := server_problem(uri, config.experiment):
        found, _, remedy = problem.partition("; ")
        return warn("mlflow", found, remedy)
    return ok("mlflow", f"the server {shown} answers")
