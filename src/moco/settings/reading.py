"""Reads params.yaml into `Config`; every mistake is one line with its place. Keys that are not there have defaults."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import types
import typing
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml

from moco.errors import UserError, first_of
from moco.settings.schema import MOVED, Config

LONGEST_WORD = 100  # characters


def nearest(word: str, known: typing.Iterable[str]) -> str:
    """Return ' (did you mean X?)' where a known word is close, else ''.

    Long texts are near to nothing: comparing takes time that grows with the product of the lengths.
    """
    if len(word) > LONGEST_WORD:
        return ""
    close = difflib.get_close_matches(word, [name for name in known if len(name) <= LONGEST_WORD], n=1, cutoff=0.65)
    return f" (did you mean '{close[0]}'?)" if close else ""


class _Reader:
    """Turns a parsed YAML tree into dataclasses; errors name file, line and key."""

    def __init__(self, path: Path, lines: dict[str, int]) -> None:
        self.path, self.lines = path, lines

    def place(self, key: str) -> str:
        """Return FILE:LINE of a key, or of the section that it is missing in."""
        parent = key
        while parent and parent not in self.lines:
            parent = parent.rpartition(".")[0]
        return f"{self.path}:{self.lines[parent]}" if parent else str(self.path)

    def fail(self, key: str, problem: str) -> typing.NoReturn:
        raise UserError(f"{self.place(key)}: {key}: {problem}")

    def section(self, kind: type[Any], value: Any, key: str) -> Any:
        if value is None and key:  # a section whose keys are all left out
            value = {}
        if not isinstance(value, dict):
            self.fail(key or "(top)", "expected a section of keys")
        hints = typing.get_type_hints(kind, include_extras=True)
        prefix = f"{key}." if key else ""
        for name in value:
            if name not in hints:
                self.fail(f"{prefix}{name}", f"unknown key{nearest(str(name), hints)}")
        return kind(**{name: self.value(hints[name], each, prefix + name) for name, each in value.items()})

    def value(self, hint: Any, value: Any, key: str) -> Any:
        origin, arguments = typing.get_origin(hint), typing.get_args(hint)
        if dataclasses.is_dataclass(hint):
            return self.section(typing.cast(type[Any], hint), value, key)
        if origin is Annotated:
            result = self.value(arguments[0], value, key)
            problem = arguments[1].problem(result)
            return self.fail(key, f"{value if value != '' else repr(value)} {problem}") if problem else result
        if origin in (types.UnionType, typing.Union):
            return None if value is None else self.value(arguments[0], value, key)
        if origin is Literal:
            if value not in arguments:
                choices = ", ".join(map(str, arguments))
                self.fail(key, f"'{value}' is not one of {choices}{nearest(str(value), arguments)}")
            return value
        if origin is tuple:
            return self.tuple(arguments, value, key)
        return self.plain(hint, value, key)

    def tuple(self, arguments: tuple[Any, ...], value: Any, key: str) -> Any:
        if not isinstance(value, list):
            self.fail(key, f"expected a list, found {value!r}")
        pair = len(arguments) == 2 and arguments[1] is not Ellipsis
        if len(arguments) == 2 and not pair:
            arguments = (arguments[0],) * len(value)
        if len(value) != len(arguments):
            self.fail(key, f"expected a list of {len(arguments)} numbers, found {len(value)}")
        result = tuple(self.value(hint, item, key) for hint, item in zip(arguments, value, strict=True))
        if pair and result[0] > result[1]:
            self.fail(key, f"{value}: the smaller number comes first")
        return result

    def plain(self, hint: type[Any], value: Any, key: str) -> Any:
        if hint is float and isinstance(value, str):
            with contextlib.suppress(ValueError):  # PyYAML reads 1e-4 (no dot) as text
                value = float(value)
        if hint is float and type(value) is int:
            value = float(value)
        if type(value) is not hint or (hint is float and not abs(value) < float("inf")):
            names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
            self.fail(key, f"expected {names[hint]}, found {value!r}")
        return value


def _lines(node: yaml.Node, path: Path, key: str = "") -> dict[str, int]:
    """Return the line of every key of the tree, by its dotted name.

    Raises UserError for a key that stands there twice.
    """
    lines: dict[str, int] = {}
    if isinstance(node, yaml.MappingNode):
        for name, child in node.value:
            dotted = f"{key}.{name.value}" if key else str(name.value)
            line = name.start_mark.line + 1
            if dotted in lines:
                raise UserError(f"{path}:{line}: {dotted}: stands here a second time, first in line {lines[dotted]}")
            lines[dotted] = line
            lines.update(_lines(child, path, dotted))
    return lines


def lines_of(text: str, path: Path) -> dict[str, int]:
    """Return the line of every key that a file's text has, by dotted name. The text must be readable YAML."""
    node = yaml.SafeLoader(text).get_single_node()
    return _lines(node, path) if node else {}


def load(path: Path) -> Config:
    """Read and check a parameter file. Raises UserError, one line, for anything that is wrong with it."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: not found; run this in the project's folder or pass --params") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not readable as YAML: {error}") from None
    return parse(text, path)


def parse(text: str, path: Path) -> Config:
    """Read and check a parameter file's text, as `load` does a file. path: for messages."""
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        lines = _lines(node, path) if node else {}  # before merged keys (`<<`) are put in
        tree = loader.construct_document(node) if node else None
    except yaml.YAMLError as error:
        line = getattr(getattr(error, "problem_mark", None), "line", None)
        where = f"{path}:{line + 1}" if line is not None else str(path)
        raise UserError(
            f"{where}: not readable as YAML: {getattr(error, 'problem', str(error).splitlines()[0])}"
        ) from None
    except (ValueError, RecursionError) as error:  # a date that is none, brackets without end
        raise UserError(f"{path}: not readable as YAML: {error}") from None
    _refuse_moved(lines, path)
    config: Config = _Reader(path, lines).section(Config, tree, "")
    return config


def _refuse_moved(lines: dict[str, int], path: Path) -> None:
    moved = [f"{old} is now {new} (line {lines[old]})" for old, new in MOVED.items() if old in lines]
    if moved:
        raise UserError(f"{path}: {len(moved)} key(s) have moved, move the values: {first_of(moved)}", "E-PARAMS-MOVED")
