"""What all commands share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from moco.config import Config

Params = Annotated[Path, typer.Option("--params", help="The parameter file.")]
PARAMS = Path("params.yaml")


def load(path: Path) -> Config:
    """Raises UserError for anything that is wrong with the file."""
    from moco.params import load as read

    return read(path)
