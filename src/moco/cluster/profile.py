"""Site profiles: where a cluster keeps things and what jobs ask for. slurm/launch reads the same files in bash."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from moco.errors import UserError
from moco.settings.reading import nearest


@dataclass(frozen=True)
class Profile:
    """Values as they stand in the file; what each means is written in slurm/profiles/generic.conf."""

    image: str = ""
    dataset: str = ""
    dataset_mount: str = "bind"
    dataset_copy: str = "no"
    local_tmp: str = ""
    binds: str = ""
    container: str = "apptainer"
    container_options: str = ""
    modules: str = ""
    partition: str = ""
    account: str = ""
    gres: str = ""
    cpus: str = ""
    memory: str = ""
    time: str = ""


KEYS = [field.name.upper() for field in dataclasses.fields(Profile)]
CHOICES = {"DATASET_MOUNT": ("bind", "overlay"), "DATASET_COPY": ("yes", "no")}


def read_profile(path: Path) -> Profile:
    """Return the profile in a file.

    Raises UserError, with file and line, for a file that is missing, an unknown key or a wrong value.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise UserError(f"{path}: profile cannot be read: {reason}; copy slurm/profiles/generic.conf") from None
    values: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        key, equals, value = line.partition("=")
        if not equals:
            raise UserError(f"{path}:{number}: expected KEY=value, found {line!r}")
        if key not in KEYS:
            raise UserError(f"{path}:{number}: unknown key '{key}'{nearest(key, KEYS)}")
        if value.startswith(("'", '"')):
            raise UserError(f"{path}:{number}: {key}: values are taken as they stand; remove the quotation marks")
        if key in CHOICES and value not in CHOICES[key]:
            raise UserError(f"{path}:{number}: {key}: '{value}' is not one of {', '.join(CHOICES[key])}")
        values[key.lower()] = value
    return Profile(**values)
