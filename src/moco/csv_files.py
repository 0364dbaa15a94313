"""CSV files that people open in a spreadsheet, which takes a cell that begins with =, +, - or @ for a formula.

Names of files and classes may begin so, and may have been chosen by somebody who wants the formula to run. Such a cell
gets an apostrophe in front, which a spreadsheet shows and keeps; readers take it away, so that names stay what they
are. A spreadsheet may also split lines at semicolons or tabs, so a cell can begin after these as well.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

_BEGINS = r"(?<![^;\t\r\n])"  # the text's beginning, or what another reader takes for that of a cell
_DANGER = r"(?=[=+\-@\t\r\uff1d\uff0b\uff0d\uff20])"  # also in full width
_NUMBER = re.compile(r"-?[0-9]+(\.[0-9]+)?(e[+-]?[0-9]+)?", re.IGNORECASE)
_QUOTED = re.compile(r'[,;\t\r\n"]|^\s|\s$')


def guarded(text: str) -> str:
    """Return a cell's text that no spreadsheet takes for a formula. Negative numbers stay as they are."""
    return text if _NUMBER.fullmatch(text) else re.sub(f"{_BEGINS}('*){_DANGER}", r"'\1", text)


def unguarded(text: str) -> str:
    """Return the text that `guarded` was given."""
    return re.sub(f"{_BEGINS}'('*){_DANGER}", r"\1", text)


def csv_text(rows: Iterable[Sequence[object]]) -> str:
    """Return the rows as CSV with commas: safe in a spreadsheet, read back by `unguarded`."""
    return "".join(",".join(map(_cell, row)) + "\n" for row in rows)


def _cell(value: object) -> str:
    text = guarded("" if value is None else str(value))
    return '"' + text.replace('"', '""') + '"' if _QUOTED.search(text) else text
