"""Write what each stage depends on into dvc.yaml: `make dvc`. With --check, exit with 1 where that would change it.

The code comes from the stages' imports (moco.runs.identity), the settings and inputs from the tables there. Files of
settings are listed for their defaults: after a change the stage is asked again, and takes its earlier result where
its own settings are what they were.
"""

from __future__ import annotations

import re
import sys
import textwrap
from pathlib import Path

from moco.runs import identity

FILE = Path(__file__).parents[1] / "dvc.yaml"
PLAIN = {"moco", "moco.settings", "moco.settings.kinds"}  # they have no defaults
SCORED = {"eval": "models/classifier", "eval_extra": "models/classifier_extra"}


def dependencies(stage: str) -> list[str]:
    """Return the inputs of a stage of dvc.yaml, then the files of code, in order."""
    name = _code_name(stage)
    known = identity.modules()
    sections = {each.partition(".")[0] for each in identity.SETTINGS[name]}
    code = identity.code_modules(name, known)
    code |= {each for section in sections for each in identity.closure(f"moco.settings.{section}", known)} - PLAIN
    inputs = [*identity.INPUTS[name], *([SCORED[stage]] if stage in SCORED else [])]
    return inputs + sorted(f"src/{known[each].relative_to(identity.PACKAGE.parent).as_posix()}" for each in code)


def _code_name(stage: str) -> str:
    return "eval" if stage in SCORED else stage


def written(text: str) -> str:
    """Return dvc.yaml with the lists of all stages anew."""
    parts = re.split(r"^(?=  \w+:$)", text, flags=re.MULTILINE)
    return parts[0] + "".join(_stage(part) for part in parts[1:])


def _stage(text: str) -> str:
    stage = text.strip().partition(":")[0]
    listed = "".join(f"      - {path}\n" for path in dependencies(stage))
    listed_settings = ", ".join(identity.SETTINGS[_code_name(stage)])
    text = re.sub(r"    deps:\n(?:      - .*\n)+", f"    deps:\n{listed}", text)
    return re.sub(r"    params: \[[^\]]*\]\n", _wrapped(f"params: [{listed_settings}]\n"), text)


def _wrapped(line: str) -> str:
    return "\n".join(textwrap.wrap(line, 100, initial_indent="    ", subsequent_indent=" " * 13)) + "\n"


if __name__ == "__main__":
    before = FILE.read_text(encoding="utf-8")
    after = written(before)
    if "--check" in sys.argv:
        sys.exit(0 if before == after else f"{FILE.name} is not what the imports say; run `make dvc`")
    FILE.write_text(after, encoding="utf-8")
