"""Types of settings, with the values that they allow."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import MISSING, dataclass
from typing import Annotated, Any, Literal


@dataclass(frozen=True)
class Range:
    """Allowed values of a number: low <= value <= high, or low < value where `open_low` is set."""

    low: float
    high: float = float("inf")
    open_low: bool = False

    def problem(self, value: float) -> str | None:
        """Return what is wrong with a value; None where it is allowed."""
        too_low = value <= self.low if self.open_low else value < self.low
        if not too_low and value <= self.high:
            return None
        bound = f"above {self.low:g}" if self.open_low else f"at least {self.low:g}"
        return f"must be {bound}" + ("" if self.high == float("inf") else f" and at most {self.high:g}")


@dataclass(frozen=True)
class Without:
    """Allowed texts: not empty, and without any of these characters."""

    characters: str

    def problem(self, value: str) -> str | None:
        """Return what is wrong with a value; None where it is allowed."""
        if value.strip() and not set(value) & set(self.characters):
            return None
        return f"must be a name without {' '.join(self.characters)}"


Count = Annotated[int, Range(1)]
CountOrZero = Annotated[int, Range(0)]
Fraction = Annotated[float, Range(0, 1)]
PositiveFraction = Annotated[float, Range(0, 1, open_low=True)]
Seed = Annotated[int, Range(0, 1 << 20)]
Positive = Annotated[float, Range(0, open_low=True)]
NotNegative = Annotated[float, Range(0)]
ModelName = Annotated[str, Without("/:.%\"'")]  # as MLflow has it for logged models
Schedule = Literal["cosine", "step", "constant"]


def setting(default: Any, doc: str, before: Any = MISSING) -> Any:
    """Return the field of a setting.

    doc: what it is, in one line: unit, choices and source. before: for a setting that came later, the value at which
    all is as it was without; files and runs of earlier versions are compared by it.
    """
    known = {} if before is MISSING else {"before": before}
    return dataclasses.field(default=default, metadata={"doc": doc, **known})


def fields_of(section: Any, prefix: str) -> Iterator[tuple[str, dataclasses.Field[Any], Any]]:
    """Yield dotted name, field and value of every setting of a section, nested ones included."""
    for field in dataclasses.fields(section):
        name = f"{prefix}.{field.name}" if prefix else field.name
        value = getattr(section, field.name)
        if dataclasses.is_dataclass(value):
            yield from fields_of(value, name)
        else:
            yield name, field, value


def flatten(section: Any, prefix: str) -> dict[str, Any]:
    """Return {'pretrain.lr': 0.06, ...} of a section or of several nested ones."""
    return {name: value for name, _, value in fields_of(section, prefix)}
