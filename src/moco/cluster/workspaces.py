"""The workspaces of a sweep: clones of the project, each with its own params.yaml, and so its own DVC lock.

DVC's cache and the MLflow store are the project's.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import socket
import subprocess
from pathlib import Path

from moco.cluster.sweep import PARAMS, Sweep
from moco.environment import python_module
from moco.errors import Say, UserError
from moco.files import account, write_text

DVC = tuple(python_module("dvc"))  # also where the environment is not activated
# Written last into a sweep's folder: a digest of all that its workspaces were made from.
MADE = "made-from"
SOURCES = ("src", "dvc.yaml")  # what decides, with params.yaml and the labels, what a task comes to
LABELS = "labels"  # where git does not know a file here that params.yaml names, a link leads to it


def make(sweep: Sweep, say: Say) -> bool:
    """Make the workspaces of a sweep and return whether any was made.

    They are the project as it is now, with changes that are not committed. Workspaces of an earlier submission are used
    again where they were made from the same sources and settings.

    Raises UserError where the project is no git repository with a commit or has sources that git does not know, another
    sweep uses the name, or a workspace cannot be made; then nothing is left of them.
    """
    changes, digest = _sources(sweep)
    if _made(sweep, digest):
        say(f"{sweep.folder}: made before from the same sources and settings; its tasks go on there")
        return False
    try:
        sweep.folder.mkdir(parents=True)
        try:
            _make(sweep, changes, say)
            write_text(sweep.folder / MADE, digest)
        except BaseException:
            shutil.rmtree(sweep.folder, ignore_errors=True)
            raise
    except OSError as error:  # also where another submission was faster
        raise UserError(f"{sweep.folder}: cannot be made: {error.strerror or error}") from None
    return True


def _sources(sweep: Sweep) -> tuple[bytes, str]:
    """Return the project's changes since its commit, as a patch, and a digest of what decides the tasks' results."""
    unknown = _git("ls-files", "--others", "--exclude-standard", *SOURCES, "presets").splitlines()
    if unknown:
        raise UserError(f"{unknown[0]}: git does not know it, and the sweep would run without it; `git add` it")
    with contextlib.suppress(UserError):  # it ends with 1 where files differ
        _git("update-index", "-q", "--refresh")
    tree = _run("git", "ls-tree", "-r", "HEAD", "--", *SOURCES, LABELS) + _patch(*SOURCES, LABELS)
    stages = f"{sorted(sweep.varied)} {sweep.shared}"
    parts = [tree, *(text.encode() for text in (stages, *(task.text for task in sweep.tasks)))]
    return _patch(), hashlib.sha256(b"\0".join(parts)).hexdigest()


def _patch(*paths: str) -> bytes:
    """Return the changes since the commit as a patch.

    It uses the plumbing command, since `diff` obeys the user's settings: colours, prefixes, external programs.
    """
    return _run("git", "diff-index", "-p", "--binary", "--no-ext-diff", "--no-textconv", "HEAD", "--", *paths)


def _made(sweep: Sweep, digest: str) -> bool:
    """Return whether the workspaces exist already. Raises UserError where something else has their name."""
    if sweep.folder.exists():
        mark, hint = sweep.folder / MADE, "choose another --name or remove it"
        if not mark.exists():
            raise UserError(f"{sweep.folder}: unfinished; if no other submission is making it just now, {hint}")
        if mark.read_text(encoding="utf-8") == digest:
            return True
        raise UserError(f"{sweep.folder}: exists already, of another job, other sources or settings; {hint}")
    found = _git("for-each-ref", "--format=%(refname:lstrip=4)", f"refs/exps/*/*/{sweep.name}-*").splitlines()
    if taken := [name for name in found if name.removeprefix(f"{sweep.name}-").isdecimal()]:
        raise UserError(f"{taken[0]}: an experiment of this name exists; choose another --name, or `dvc exp remove` it")
    return False


def _make(sweep: Sweep, changes: bytes, say: Say) -> None:
    project = Path.cwd()
    cache = _run(*DVC, "cache", "dir").decode().strip()
    # DVC compares the folder as a whole.
    labels = [path for path in _git("ls-files", "-z", "--others", LABELS).split("\0") if path]
    who = {key: _git("config", "--get", "--default", "", key).strip() for key in ("user.name", "user.email")}
    for number, task in enumerate(sweep.tasks, 1):
        place = sweep.folder / str(number)
        _git("clone", "--quiet", "--origin", "origin", str(project), str(place))
        if changes:
            _run("git", "-C", str(place), "apply", "--whitespace=nowarn", "-", given=changes)
        for key, value in who.items():  # for the commit that holds an experiment
            _git("-C", str(place), "config", key, value or f"{account()}@{socket.gethostname()}")
        write_text(place / PARAMS, task.text)
        shutil.rmtree(place / "reports", ignore_errors=True)  # of other settings, where they are committed
        _configure(place, sweep.folder / "1", cache)
        for path in {*task.files().values(), *labels}:
            _link(path, project, place)
        say(f"{sweep.name}-{number}: {task}")


def _configure(place: Path, first: Path, cache: str) -> None:
    """Let DVC of a workspace use the project's cache, and the project's settings for this machine alone."""
    local = Path(".dvc/config.local")
    if place == first:
        if local.exists():
            shutil.copy(local, place / local)
        _run(*DVC, "--cd", str(place), "cache", "dir", "--local", cache)
    else:
        shutil.copy(first / local, place / local)


def _link(path: str, project: Path, place: Path) -> None:
    """Link in the workspace to what git does not track, and keep it out of the workspace's experiment."""
    if (project / path).exists() and not (place / path).exists():
        (place / path).parent.mkdir(parents=True, exist_ok=True)
        (place / path).symlink_to(project / path)
        with (place / ".git/info/exclude").open("a", encoding="utf-8") as file:
            file.write(f"/{os.path.normpath(path)}\n")


def _git(*words: str) -> str:
    return _run("git", *words).decode(errors="surrogateescape")


def _run(*words: str, given: bytes = b"") -> bytes:
    try:
        done = subprocess.run(words, input=given, capture_output=True, check=False)
    except FileNotFoundError:
        raise UserError(f"{words[0]}: not found; a sweep clones the project's repository with it") from None
    if done.returncode != 0:
        reason = (done.stderr.decode(errors="replace").strip().splitlines() or [f"exit code {done.returncode}"])[0]
        raise UserError(f"a sweep clones the project's repository: `{' '.join(words[:3])}` says: {reason}")
    return done.stdout
