"""All settings as text: for people, with where each value comes from, and for the record of a run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import yaml

from moco.errors import UserError
from moco.redaction import redact_tree
from moco.settings.kinds import fields_of
from moco.settings.reading import lines_of, nearest
from moco.settings.schema import Config

WIDTH = 28  # of key and value, in characters


def params_text(config: Config) -> str:
    """Return params.yaml of these settings, all of them, without passwords and keys."""
    return yaml.safe_dump(redact_tree(json.loads(json.dumps(asdict(config)))), sort_keys=False)


def listed(config: Config, text: str, path: Path, chosen: str = "") -> Iterator[str]:
    """Yield the lines of a YAML file that has every setting, with where its value comes from and what it is.

    text: of the parameter file `path`. chosen: a section or a key, by its dotted name; '': all.
    Raises UserError where no setting has the name.
    """
    given = lines_of(text, path)
    every = list(fields_of(config, ""))
    shown = [each for each in every if f"{each[0]}.".startswith(f"{chosen}." if chosen else "")]
    if not shown:
        known = {".".join(name.split(".")[:depth]) for name, *_ in every for depth in (1, 2, 3)}
        raise UserError(f"{chosen}: no setting has this name{nearest(chosen, sorted(known))}", "E-PARAMS-KEY")
    open_sections: set[str] = set()
    for name, field, value in shown:
        yield from _headings(name, open_sections)
        where = f"{path.name}:{given[name]}" if name in given else "default"
        shown_value = json.dumps(redact_tree({field.name: value})[field.name], ensure_ascii=False)
        line = f"{'  ' * name.count('.')}{field.name}: {shown_value}"
        yield f"{line.ljust(WIDTH)}  # ({where}) {field.metadata['doc']}"


def _headings(name: str, seen: set[str]) -> Iterator[str]:
    *sections, _ = name.split(".")
    for depth, section in enumerate(sections):
        dotted = ".".join(sections[: depth + 1])
        if dotted not in seen:
            seen.add(dotted)
            yield f"{'  ' * depth}{section}:"
