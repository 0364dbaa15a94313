"""Names of classes: which are refused, because nobody could tell two of them apart or type them."""

from __future__ import annotations

import unicodedata
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moco.errors import Say, UserError, first_of


def class_name(text: str) -> str:
    """Return the one form of a name that may be written in several (Unicode's NFC)."""
    return unicodedata.normalize("NFC", text)


def check_names(names: Sequence[str], place: Any, say: Say) -> None:
    """Check the names of classes as they stand in `place`, a folder or file; tell of some that differ in case alone.

    Raises UserError where two are forms of one name, or where one has spaces at its ends or characters that cannot be
    seen: labels that people write would not match it.
    """
    if bad := [name for name in names if name != name.strip() or not name.isprintable()]:
        raise UserError(
            f"{place}: {len(bad)} class name(s) with spaces at their ends or invisible characters: "
            f"{first_of([ascii(name) for name in bad])}; rename them",
            "E-DATA-CLASS-NAME",
        )
    forms = _alike(names, class_name)
    if forms:
        raise UserError(
            f"{place}: {len(forms)} class name(s) stand there in two Unicode forms, which look the same, first "
            f"{forms[0][0]!a} and {forms[0][1]!a}; merge their images into one folder",
            "E-DATA-CLASS-FORMS",
        )
    if pairs := _alike(names, lambda name: unicodedata.normalize("NFKC", name).casefold()):
        told = first_of([f"{a!a} and {b!a}" for a, b, *_ in pairs])
        say(f"warning: {len(pairs)} class name(s) differ from another in case or in the form of letters alone: {told}")
    if mixed := [name for name in names if len(_scripts(name)) > 1]:
        told = first_of([ascii(name) for name in mixed])
        say(f"warning: {len(mixed)} class name(s) mix letters of several alphabets, some of which look alike: {told}")


def refuse_one_class(place: Path | str, names: Sequence[str]) -> None:
    """Raise UserError for a dataset of a single class: there is nothing to tell apart, and every score is 100 %."""
    if len(names) < 2:
        raise UserError(
            f"{place}: one class only{f' ({names[0]})' if names else ''}; a classifier needs two at least",
            "E-DATA-ONE-CLASS",
        )


LOOK_ALIKE = ("LATIN", "CYRILLIC", "ARMENIAN")  # not Greek: its letters stand in names as symbols (β-cell)


def _scripts(name: str) -> set[str]:
    """Return which of the alphabets whose letters look like each other's stand in a name."""
    return {script for letter in name if (script := unicodedata.name(letter, "").partition(" ")[0]) in LOOK_ALIKE}


def _alike(names: Sequence[str], key: Any) -> list[list[str]]:
    groups: dict[str, list[str]] = defaultdict(list)
    for name in names:
        groups[key(name)].append(name)
    return [group for group in groups.values() if len(group) > 1]
