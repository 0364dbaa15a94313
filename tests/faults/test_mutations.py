"""The list of safety lines and the README's table are up to date; `make mutations` and `make faults` work on them."""

from __future__ import annotations

import re

import pytest
from mutations import MUTATIONS, ROOT, Mutation

from fault_table import ROWS, rows_of


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_the_line_stands_once_and_its_tests_exist(mutation: Mutation) -> None:
    assert (ROOT / "src/moco" / mutation.file).read_text().count(mutation.old) == 1
    file, *options = mutation.tests.split()
    text = (ROOT / file).read_text()
    if options:
        assert re.search(rf"def test_\w*{options[1]}|\"{options[1]}\"", text), options[1]


def test_the_table_has_every_fault_and_what_came_of_it() -> None:
    found = rows_of((ROOT / "README.md").read_text())
    assert [(row.fault, row.promise) for row in found] == list(ROWS.values())
    assert {row.result for row in found} == {"as promised"} and min(row.tried for row in found) > 0
