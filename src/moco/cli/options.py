"""What all commands share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from moco.settings.schema import Config

Params = Annotated[Path, typer.Option("--params", help="The parameter file.")]
PARAMS = Path("params.yaml")


def load(path: Path, changes: dict[str, Any] | None = None) -> Config:
    """Load the settings of a parameter file, with changes. Raises UserError for anything that is wrong.

    changes: by dotted key; None changes nothing.
    """
    from moco.settings.reading import load as read
    from moco.settings.reading import parse

    config = _at_home(read(path))
    given = {key: value for key, value in (changes or {}).items() if value is not None}
    if not given:
        return config
    from moco.settings.presets import edit

    return _at_home(parse(edit(path.read_text(encoding="utf-8"), given, str(path)), path))


def _at_home(config: Config) -> Config:
    """Return the settings with `data.path` where the images are: in a queued experiment's own folder they are not."""
    from dataclasses import replace

    from moco.files import home

    if config.data.path and not Path(config.data.path).exists() and home() != Path():  # an absolute path stays
        return replace(config, data=replace(config.data, path=str(home() / config.data.path)))
    return config
