"""Sweeps: one task of a job array for every combination of values, each in a workspace of its own.

A workspace is a clone of the project with its own params.yaml, and so its own DVC lock. DVC's cache and the MLflow
store are the project's. Stages that no swept value reaches run once, in the project itself.
"""

from __future__ import annotations

import getpass
import itertools
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from moco.config import Config
from moco.errors import Say, UserError
from moco.files import write_text
from moco.params import load, parse
from moco.presets import edit

FOLDER = Path("sweeps")
PARAMS = Path("params.yaml")
DVC = (sys.executable, "-m", "dvc")  # also where the environment is not activated
# No stage of dvc.yaml, since it needs the user's file; a job all the same.
EXTRA = {"train_extra": (("train_extra", "train"), frozenset({"data", "pretrain"}))}


@dataclass(frozen=True)
class Sweep:
    """folder: absolute, with a workspace for each task, numbered from 1; tasks: params.yaml's changes in each;
    varied: stages that a task does for itself; shared: stages whose results it takes from the project; config: the
    project's own."""

    name: str
    folder: Path
    tasks: Sequence[Mapping[str, Any]]
    varied: frozenset[str]
    shared: tuple[str, ...]
    config: Config


def plan(job: str, settings: Sequence[str], name: str | None) -> Sweep:
    """What a sweep comes to. job: a stage, or `pipeline`; settings: KEY=VALUE,VALUE,… each; name: by default day and
    time.

    Raises UserError, before anything is made, for a key or value that params.yaml does not take, one that the job does
    not depend on, and a name that is in use or cannot be an experiment's.
    """
    name = name or time.strftime("sweep-%m%d-%H%M%S")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
        raise UserError(f"--name {name}: use letters, digits, - and _ only")
    folder = (FOLDER / name).absolute()
    if folder.exists():
        raise UserError(f"{folder}: exists already; choose another --name, or remove it")
    values = dict(map(_values, settings))
    tasks = [dict(zip(values, combination, strict=True)) for combination in itertools.product(*values.values())]
    config, text = load(PARAMS), PARAMS.read_text(encoding="utf-8")
    for task in tasks:
        _checked(text, task)
    varied, shared = _stages(job, list(values))
    return Sweep(name, folder, tasks, varied, shared, config)


def _values(setting: str) -> tuple[str, list[Any]]:
    key, equals, text = setting.partition("=")
    try:
        values = YAML(typ="safe").load(f"[{text}]")  # unlike PyYAML, it knows 1e-4 for a number
    except YAMLError:
        values = []
    if not equals or not values:
        raise UserError(f"--sweep {setting}: expected KEY=VALUE,VALUE, for example pretrain.temperature=0.1,0.2")
    return key.strip(), values


def _checked(text: str, task: Mapping[str, Any]) -> str:
    """params.yaml with a task's values. Raises UserError where it does not take them."""
    changed = edit(text, task, "--sweep")
    shown = " ".join(f"{key}={value}" for key, value in task.items())
    try:
        parse(changed, PARAMS)
    except UserError as error:
        raise UserError(f"--sweep {shown}: {error}") from None
    return changed


def _stages(job: str, keys: Sequence[str]) -> tuple[frozenset[str], tuple[str, ...]]:
    """The stages that do not come out the same for every task, and those that do."""
    stages = _graph(Path("dvc.yaml"))
    reached = {
        key: {name for name, (own, _) in stages.items() if any(_meet(key, other) for other in own)} for key in keys
    }
    if job == "pipeline":
        for key, names in reached.items():
            if not names - EXTRA.keys():
                raise UserError(f"--sweep {key}: no stage of dvc.yaml depends on it")
        varied = set().union(*reached.values())
        while more := {name for name, (_, before) in stages.items() if before & varied} - varied:
            varied |= more
        return frozenset(varied), tuple(name for name in stages if name not in varied and name not in EXTRA)
    stage = job.removesuffix("_continue").removesuffix("_2gpu")
    for key, names in reached.items():
        if not names & {stage, "data"}:
            raise UserError(f"--sweep {key}: {job} does not depend on it; `pipeline` does all that do")
    needed: set[str] = set()
    todo = [stage]
    while todo:
        before = stages[todo.pop()][1] - needed
        needed |= before
        todo += before
    return frozenset({stage}), tuple(name for name in stages if name in needed)


def _meet(one: str, other: str) -> bool:
    """Whether of two dotted keys one is the other or a part of it."""
    return f"{one}.".startswith(f"{other}.") or f"{other}.".startswith(f"{one}.")


def _graph(path: Path) -> dict[str, tuple[tuple[str, ...], frozenset[str]]]:
    """By stage, in their order: the parameters that it depends on, and the stages whose outputs it reads."""
    stages = yaml.safe_load(path.read_text(encoding="utf-8"))["stages"]
    makers = {out: name for name, stage in stages.items() for out in stage.get("outs", []) if isinstance(out, str)}
    graph = {
        name: (tuple(stage.get("params", [])), frozenset(makers[dep] for dep in stage["deps"] if dep in makers))
        for name, stage in stages.items()
    }
    return {**graph, **EXTRA}


def make(sweep: Sweep, say: Say) -> None:
    """The workspaces: the project as it is now, changes that are not committed included.

    Raises UserError where the project is no git repository with a commit, has sources that git does not know, or a
    workspace cannot be made; then nothing is left of them.
    """
    project = Path.cwd()
    unknown = _git("ls-files", "--others", "--exclude-standard", "src", "dvc.yaml", "presets").splitlines()
    if unknown:
        raise UserError(f"{unknown[0]}: git does not know it, and the sweep would run without it; `git add` it")
    changes = _git("diff", "--binary", "HEAD")
    text = PARAMS.read_text(encoding="utf-8")
    cache = _run(*DVC, "cache", "dir").strip()
    who = {"user.name": getpass.getuser(), "user.email": f"{getpass.getuser()}@{socket.gethostname()}"}
    who |= {key: found for key in who if (found := _git("config", "--get", "--default", "", key).strip())}
    try:
        for number, task in enumerate(sweep.tasks, 1):
            place = sweep.folder / str(number)
            _git("clone", "--quiet", str(project), str(place))
            if changes:
                _git("-C", str(place), "apply", "--whitespace=nowarn", "-", text=changes)
            for key, value in who.items():  # for the commit that holds an experiment
                _git("-C", str(place), "config", key, value)
            write_text(place / PARAMS, _checked(text, task))
            _configure(place, sweep.folder / "1", cache)
            for path in (sweep.config.data.path, sweep.config.train_extra.labels):
                _link(path, project, place)
            say(f"{sweep.name}-{number}: {' '.join(f'{key}={value}' for key, value in task.items())}")
    except BaseException:
        shutil.rmtree(sweep.folder, ignore_errors=True)
        raise


def _configure(place: Path, first: Path, cache: str) -> None:
    """DVC of a workspace uses the project's cache, and whatever the project has set for this machine alone."""
    local = Path(".dvc/config.local")
    if place == first:
        if local.exists():
            shutil.copy(local, place / local)
        _run(*DVC, "--cd", str(place), "cache", "dir", "--local", cache)
    else:
        shutil.copy(first / local, place / local)


def _link(path: str | None, project: Path, place: Path) -> None:
    """What params.yaml names by a relative path, and git does not carry, is found in the workspace too."""
    if path and not Path(path).is_absolute() and (project / path).exists() and not (place / path).exists():
        (place / path).parent.mkdir(parents=True, exist_ok=True)
        (place / path).symlink_to(project / path)


def _git(*words: str, text: str | None = None) -> str:
    return _run("git", *words, text=text)


def _run(*words: str, text: str | None = None) -> str:
    try:
        done = subprocess.run(words, input=text, capture_output=True, text=True, check=False, errors="surrogateescape")
    except FileNotFoundError:
        raise UserError(f"{words[0]}: not found; a sweep clones the project's repository with it") from None
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[0]
        raise UserError(f"a sweep clones the project's repository: `{' '.join(words[:3])}` says: {reason}")
    return done.stdout
