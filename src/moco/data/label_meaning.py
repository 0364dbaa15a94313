"""Which class a label means: its name, or its position where no name could be meant by a number.

The rule for positions: they count from 0, in the order of the classes (that of classes.txt, else of the alphabet), and
stand for a class only where no class has a name that looks like a number. Classes called 01 to 10, of which a
spreadsheet made 1 to 10, or 1 to 3 beside labels 0 to 2, would otherwise be off by one without a word.
"""

from __future__ import annotations

import re
import unicodedata

from moco.errors import UserError, quoted
from moco.settings.reading import nearest

SHOWN = 10  # names
# What a program may have made of a name or a name of it: 3, 03, 3.0, 1e3, 1,5, and TRUE, which is 1 elsewhere.
_NUMERIC = re.compile(r"[+-]?\d+([.,]\d*)?(e[+-]?\d+)?|true|false", re.IGNORECASE)
_WHOLE = re.compile(r"(-?[0-9]{1,9})([.,]0*)?")  # pandas writes 3.0 where other rows have no number


class ClassNames:
    """The classes of a dataset, in the order of their labels."""

    def __init__(self, names: list[str]) -> None:
        self.names = names
        self.are_positions = names == [str(number) for number in range(len(names))]
        self.are_numbers = any(_NUMERIC.fullmatch(name.strip()) for name in names)
        self.are_misleading = self.are_numbers and not self.are_positions
        self._by_name = {name: number for number, name in enumerate(names)}
        forms: dict[str, list[int]] = {}
        for number, name in enumerate(names):
            forms.setdefault(_form(name), []).append(number)
        self._by_form = {form: numbers[0] for form, numbers in forms.items() if len(numbers) == 1}

    def find(self, place: str, text: str) -> tuple[int, bool]:
        """Return (label, whether it was given as a position).

        A name counts as it is, else without spaces around it and in any Unicode form, where that is one class alone.
        Raises UserError, which begins with the place, where the text is no class.
        """
        form = _form(text)
        whole = _WHOLE.fullmatch(form)
        for found in (self._by_name.get(text), self._by_form.get(form), self._by_form.get(whole[1]) if whole else None):
            if found is not None:
                return found, False
        if whole and not self.are_misleading:
            return self.position(place, int(whole[1])), True
        if self.are_numbers:
            raise UserError(
                f"{place}: label {quoted(text)} is no class{self._equal(form)}; where names of classes are numbers, a "
                f"label is a name, not a position; {self.table()}",
                "E-LABEL-NUMBERS",
            )
        raise UserError(
            f"{place}: label {quoted(text)} is no class{nearest(form, self.names)}; {self.table()}", "E-LABEL-CLASS"
        )

    def position(self, place: str, number: int) -> int:
        """Return the number. Raises UserError, which begins with the place, where it is out of range."""
        if 0 <= number < len(self.names):
            return number
        raise UserError(
            f"{place}: label {number} is out of range; {len(self.names)} classes: 0 to {len(self.names) - 1}",
            "E-LABEL-RANGE",
        )

    def table(self, shown: int = SHOWN) -> str:
        """Return 'N classes: ...' with the first names."""
        more = ", …" if len(self.names) > shown else ""
        return f"{len(self.names)} classes: {', '.join(map(_short, self.names[:shown]))}{more}"

    def positions(self) -> str:
        """Return '0 is cat, 1 is dog, …': how positions are counted."""
        pairs = [f"{number} is {_short(name)}" for number, name in enumerate(self.names[:3])]
        return ", ".join(pairs) + (", …" if len(self.names) > len(pairs) else "")

    def _equal(self, form: str) -> str:
        """Return a hint with the class name that is the same number, if exactly one is.

        For a text that is no number, the hint is a similar name.
        """
        if not (whole := _WHOLE.fullmatch(form)):
            return nearest(form, self.names)
        same = [name for name in self.names if re.fullmatch(r"0*" + re.escape(str(int(whole[1]))), name.strip())]
        return f" (did you mean '{same[0]}'?)" if len(same) == 1 else ""


def _form(name: str) -> str:
    return unicodedata.normalize("NFC", name.strip())


def _short(name: str) -> str:
    return name if len(name) <= 20 else f"{name[:19]}…"
