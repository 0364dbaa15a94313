"""Presets: named changes of params.yaml, which holds the keys that most users change."""

from __future__ import annotations

import io
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap

from moco.errors import UserError
from moco.files import write_text
from moco.settings.reading import load, nearest
from moco.settings.schema import docs

DEFAULT = "default"


def names(folder: Path) -> list[str]:
    """Return the names of the presets in a folder, sorted."""
    return sorted(path.stem for path in folder.glob("*.yaml"))


def render(folder: Path, name: str) -> str:
    """Return the text of params.yaml under a preset: default.yaml with the preset's values put in place.

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
    """Return a parameter file's text with other values, by dotted key; comments stay.

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
    """Put values into a tree of YAML; keys that are not there come in with what they are, in the schema's order."""
    known = _keys(prefix)
    for key, value in changes.items():
        name = f"{prefix}{key}"
        if key not in known or not isinstance(tree, MutableMapping):
            raise UserError(f"{path}: {name}: unknown key{nearest(str(key), known)}")
        if isinstance(value, Mapping):
            if tree.get(key) is None:
                _insert(tree, key, CommentedMap(), known, None)
            _merge(tree[key], value, path, f"{name}.")
        elif key in tree:
            tree[key] = value
        else:
            _insert(tree, key, value, known, docs().get(name))


def _keys(prefix: str) -> list[str]:
    """Return the keys of a section, or the sections, in the schema's order."""
    names = [name.removeprefix(prefix) for name in docs() if name.startswith(prefix)]
    return list(dict.fromkeys(name.partition(".")[0] for name in names))


def _insert(tree: Any, key: str, value: Any, known: list[str], doc: str | None) -> None:
    """Put a key in front of the first that follows it in the schema.

    It is never put last, since blank lines belong to the last key.
    """
    later = [place for place, name in enumerate(tree) if name in known and known.index(name) > known.index(key)]
    tree.pop(key, None)
    tree.insert(min(later, default=max(len(tree) - 1, 0)), key, value, comment=doc)


def switch(folder: Path, name: str, params: Path, force: bool) -> None:
    """Write params.yaml. Raises UserError where it holds changes that are in no preset, unless `force`."""
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
