"""What all commands share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from moco.config import Config

Params = Annotated[Path, typer.Option("--params", help="The parameter file.")]
PARAMS = Path("params.yaml")


def load(path: Path, changes: dict[str, Any] | None = None) -> Config:
    """changes: by dotted key; None changes nothing. Raises UserError for anything that is wrong."""
    from moco.params import load as read
    from moco.params import parse

    config = read(path)
    given = {key: value for key, value in (changes or {}).items() if value is not None}
    if not given:
        return config
    from moco.presets import edit

    return parse(edit(path.read_text(encoding="utf-8"), given, str(path)), path)
