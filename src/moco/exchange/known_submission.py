"""Whether a submission.py is one that this project writes: scoring runs it, so a stranger's is asked about first."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from moco.data.manifest import Manifest, load_manifest
from moco.encoders.architecture import Architecture
from moco.errors import UserError
from moco.exchange.submission import render
from moco.files import home, sha256
from moco.layout import MANIFEST, RUNS
from moco.settings.eval import EvalConfig

NAMES = ("team_id", "team_name", "email_address", "architecture", "class_names")
RESIZED = re.compile(r"^        transforms\.Resize\((\d+)\),$", re.MULTILINE)
SCALED = re.compile(r"^        transforms\.Normalize\((.+)\),$", re.MULTILINE)


def ask_before_running(folder: Path, yes: bool, ask: Callable[[str], bool] | None) -> None:
    """Raise UserError unless submission.py of a classifier's folder may run.

    It may run where its text is one that this project writes, in whatever folder, where `yes` is set, or where a person
    agrees. ask: None where nobody can be asked. A file that is missing is left to the stage.
    """
    path = folder / "submission.py"
    if yes or not path.is_file():
        return
    if is_known(path) or (ask is not None and ask(f"{path} is a program that this project did not write. Run it?")):
        return
    raise UserError(
        f"{path}: scoring runs this program, which this project did not write; read it, then add --yes",
        "E-EVAL-UNKNOWN-CODE",
    )


def is_known(path: Path) -> bool:
    """Return whether the file is what `render` gives for some network, classes and team, or one that a run has kept."""
    try:
        digest, text = sha256(path), path.read_text(encoding="utf-8")
        if digest in {sha256(kept) for kept in (home() / RUNS).glob("*/*/classifier/submission.py")}:
            return True
        return render(*_values(text, load_manifest(MANIFEST))) == text
    except (OSError, UserError, ValueError, TypeError, AttributeError, SyntaxError, RecursionError, MemoryError):
        return False  # not a text of ours


def _values(text: str, manifest: Manifest) -> tuple[Architecture, Manifest, EvalConfig]:
    """Return the values in a text of `render`. Raises ValueError where one is missing.

    Only plain values are taken, so a text that `render` makes from them again is harmless.
    """
    named: dict[str, Any] = {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id in NAMES:
            named[node.targets[0].id] = ast.literal_eval(node.value)
    scaled, resized = SCALED.search(text), RESIZED.search(text)
    if named.keys() != set(NAMES) or type(named["team_id"]) is not int or scaled is None:
        raise ValueError("not a text of this project")
    mean, std = ast.literal_eval(f"({scaled[1]})")
    given = replace(
        manifest, classes=named["class_names"], resize=int(resized[1]) if resized else None, mean=mean, std=std
    )
    config = EvalConfig(**{name: named[name] for name in ("team_id", "team_name", "email_address")})
    return Architecture(**named["architecture"]), given, config
