"""Sweeps: what they come to. One task of a job array for every combination of values, each in a workspace of its own
(`moco.cluster.workspaces` makes them). Stages that no swept value reaches run once, in the project itself.
"""

from __future__ import annotations

import itertools
import os
import re
import time
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

import yaml
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from moco.errors import UserError
from moco.settings.presets import edit
from moco.settings.reading import load, parse
from moco.settings.schema import Config

FOLDER = Path("sweeps")
PARAMS = Path("params.yaml")
_Graph = Mapping[str, tuple[tuple[str, ...], frozenset[str]]]


@dataclass(frozen=True)
class Task:
    """One combination. values: by key; text and config: params.yaml with them."""

    values: Mapping[str, Any]
    text: str
    config: Config

    def __str__(self) -> str:
        return " ".join(f"{key}={value}" for key, value in self.values.items())

    def files(self) -> dict[str, str]:
        """Return, by key, what params.yaml names by a relative path and git may not track."""
        paths = {"data.path": self.config.data.path, "train_extra.labels": self.config.train_extra.labels}
        return {key: path for key, path in paths.items() if path and not Path(path).is_absolute()}


@dataclass(frozen=True)
class Sweep:
    """folder: absolute, with a workspace for each task, numbered from 1; varied: stages that a task does for itself;
    shared: stages whose results it takes from the project; config: the project's own."""

    name: str
    folder: Path
    tasks: Sequence[Task]
    varied: frozenset[str]
    shared: tuple[str, ...]
    config: Config


def plan(job: str, settings: Sequence[str], name: str | None) -> Sweep | None:
    """Return the tasks and stages of a sweep; None where there is no sweep.

    job: a stage, or `pipeline`. settings: KEY=VALUE,VALUE,… each, none for no sweep. name: by default day and time.

    Raises UserError for a key or value that params.yaml does not take, a file that is not there, and a name that an
    experiment cannot have. Raises UserError also for a key that the job does not depend on, or that other stages depend
    on whose results the job needs.
    """
    if not settings:
        if name is not None:
            raise UserError(f"--name {name}: is a sweep's; add --sweep KEY=VALUE,VALUE")
        return None
    name = name or time.strftime("sweep-%m%d-%H%M%S")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
        raise UserError(f"--name {name}: use letters, digits, - and _ only")
    values: dict[str, list[Any]] = {}
    for setting in settings:
        key, found = _values(setting)
        if key in values:
            raise UserError(f"--sweep {setting}: {key} is swept already; give all its values in one --sweep")
        values[key] = found
    config, text = load(PARAMS), PARAMS.read_text(encoding="utf-8")
    tasks = [
        _task(text, dict(zip(values, combination, strict=True))) for combination in itertools.product(*values.values())
    ]
    varied, shared = _stages(job, list(values), [task.config for task in tasks])
    return Sweep(name, (FOLDER / name).absolute(), tasks, varied, shared, config)


def _values(setting: str) -> tuple[str, list[Any]]:
    key, equals, text = setting.partition("=")
    try:
        values = YAML(typ="safe").load(f"[{text}]")  # unlike PyYAML, it knows 1e-4 for a number
    except (YAMLError, ValueError, TypeError):  # not YAML, no such day, a list as a key
        values = []
    # An alias could hold itself; nobody needs one here.
    if not equals or not values or re.search(r"(^|[\s\[,])[&*]\S", text) or not all(map(_plain, values)):
        raise UserError(f"--sweep {setting}: expected KEY=VALUE,VALUE, for example pretrain.temperature=0.1,0.2")
    return key.strip(), values


def _plain(value: Any) -> bool:
    if isinstance(value, list):
        return all(map(_plain, value))
    return value is None or type(value) in (bool, int, float, str)


def _task(text: str, values: Mapping[str, Any]) -> Task:
    """Return the task with these values in params.yaml. Raises UserError where params.yaml does not take them."""
    changed = edit(text, values, "--sweep")
    shown = " ".join(f"{key}={value}" for key, value in values.items())
    try:
        task = Task(values, changed, parse(changed, PARAMS))
    except UserError as error:
        raise UserError(f"--sweep {shown}: {error}") from None
    for key, path in task.files().items():
        if key in values and not Path(path).exists():
            raise UserError(f"--sweep {key}: {path}: not found")
        if os.path.normpath(path).startswith(".."):
            raise UserError(
                f"{key}: {path}: leads out of the project, and elsewhere from a task's folder; make it absolute"
            )
    return task


def _stages(job: str, keys: Sequence[str], configs: Sequence[Config]) -> tuple[frozenset[str], tuple[str, ...]]:
    """Return the stages whose results differ between tasks, and those whose results are the same for all tasks."""
    stages = _graph(Path("dvc.yaml"), configs)
    reached = {
        key: {name for name, (own, _) in stages.items() if any(_meet(key, other) for other in own)} for key in keys
    }
    if job == "pipeline":
        for key, names in reached.items():
            if not names:
                raise UserError(f"--sweep {key}: no stage of dvc.yaml depends on it")
        varied = _downstream(set().union(*reached.values()), stages)
        return frozenset(varied), tuple(name for name in stages if name not in varied)
    stage = job.removesuffix("_continue").removesuffix("_2gpu")
    needed = _upstream(stage, stages)
    for key, names in reached.items():
        if not names & {stage, "data"}:
            raise UserError(f"--sweep {key}: {job} does not depend on it; `pipeline` does all that do")
        # A task prepares its own data; other results it takes from the project, which has them for one value alone.
        if other := (_downstream(names, stages) & needed) - {"data"}:
            first = next(name for name in stages if name in other)
            raise UserError(f"--sweep {key}: {first} depends on it too, which {job} needs; `pipeline` does all that do")
    varied = {stage} | {"data" for names in reached.values() if "data" in names}
    return frozenset(varied), tuple(name for name in stages if name in needed - varied)


def _downstream(names: Set[str], stages: _Graph) -> set[str]:
    """Return these stages, and all that need their results, directly or not."""
    found = set(names)
    while more := {name for name, (_, before) in stages.items() if before & found} - found:
        found |= more
    return found


def _upstream(stage: str, stages: _Graph) -> set[str]:
    """Return all stages whose results a stage needs, directly or not."""
    found: set[str] = set()
    todo = [stage]
    while todo:
        before = stages[todo.pop()][1] - found
        found |= before
        todo += before
    return found


def _meet(one: str, other: str) -> bool:
    """Return whether one of two dotted keys is the other or a part of it."""
    return f"{one}.".startswith(f"{other}.") or f"{other}.".startswith(f"{one}.")


def _graph(path: Path, configs: Sequence[Config]) -> _Graph:
    """Return, by stage in their order, the parameters that it depends on and the stages whose outputs it reads.

    These are the outputs that it reads in any of the tasks: a path may hold settings, `${SECTION.KEY}`.
    """
    if not path.is_file():
        raise UserError(f"{Path.cwd()}: no dvc.yaml here; submit from the project's folder")
    try:
        stages = yaml.safe_load(path.read_text(encoding="utf-8"))["stages"]
        if not all(isinstance(stage, dict) for stage in stages.values()):
            raise TypeError
    except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path}: no stages can be read; `dvc status` says what is wrong with it") from None
    makers = {
        out if isinstance(out, str) else next(iter(out)): name
        for name, stage in stages.items()
        for out in stage.get("outs") or ()
    }
    found = {}
    for name, stage in stages.items():
        read = {_filled_in(dep, config) for dep in stage.get("deps") or () for config in configs}
        found[name] = tuple(stage.get("params") or ()), frozenset(makers[path] for path in read if path in makers)
    return found


def _filled_in(path: str, config: Config) -> str:
    return re.sub(r"\$\{(.+?)\}", lambda key: str(attrgetter(key[1])(config)), path)
