"""Presets: params.yaml as a documented default plus a few named changes."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from moco.errors import UserError
from moco.files import write_text
from moco.params import load, nearest

DEFAULT = "default"


def names(folder: Path) -> list[str]:
    return sorted(path.stem for path in folder.glob("*.yaml"))


def render(folder: Path, name: str) -> str:
    """The text of params.yaml under a preset: default.yaml with the preset's values put in place.

    Comments of the default stay. Raises UserError for an unknown preset or one with an unknown key.
    """
    known = names(folder)
    if name not in known:
        raise UserError(f"no preset '{name}' in {folder}{nearest(name, known)}; known: {', '.join(known)}")
    default = (folder / f"{DEFAULT}.yaml").read_text(encoding="utf-8")
    if name == DEFAULT:
        return default
    path = folder / f"{name}.yaml"
    return _changed(default, _yaml().load(path.read_text(encoding="utf-8")), str(path))


def edit(text: str, values: Mapping[str, Any], who: str) -> str:
    """A parameter file's text with other values, by dotted key; comments stay.

    Raises UserError, which begins with `who`, for a key that is not there.
    """
    changes: dict[str, Any] = {}
    for dotted, value in values.items():
        *sections, key = dotted.split(".")
        place = changes
        for section in sections:
            place = place.setdefault(section, {})
            if not isinstance(place, dict):
                raise UserError(f"{who}: {dotted}: {section} has a value of its own already")
        place[key] = value
    return _changed(text, changes, who)


def _yaml() -> YAML:
    yaml = YAML()
    yaml.preserve_quotes = True
    yaml.width = 4096
    yaml.representer.add_representer(type(None), lambda r, _: r.represent_scalar("tag:yaml.org,2002:null", "null"))
    return yaml


def _changed(text: str, changes: Mapping[str, Any], who: str) -> str:
    yaml = _yaml()
    tree = yaml.load(text)
    _merge(tree, changes, who, "")
    result = io.StringIO()
    yaml.dump(tree, result)
    return result.getvalue()


def _merge(tree: Any, changes: Mapping[str, Any], path: str, prefix: str) -> None:
    known = list(tree) if isinstance(tree, Mapping) else []
    for key, value in changes.items():
        if key not in known:
            raise UserError(f"{path}: {prefix}{key}: unknown key{nearest(str(key), map(str, known))}")
        if isinstance(value, Mapping):
            _merge(tree[key], value, path, f"{prefix}{key}.")
        else:
            tree[key] = value


def switch(folder: Path, name: str, params: Path, force: bool) -> None:
    """Writes params.yaml. Raises UserError where it holds changes that are in no preset, unless `force`."""
    text = render(folder, name)
    if params.exists() and not force:
        current = params.read_text(encoding="utf-8")
        if all(current != render(folder, known) for known in names(folder)):
            raise UserError(
                f"{params}: has changes of your own that switching would lose; commit or copy it, then add --force"
            )
    before = params.read_text(encoding="utf-8") if params.exists() else None
    write_text(params, text)
    try:
        load(params)
    except UserError:
        if before is not None:
            write_text(params, before)
        raise
