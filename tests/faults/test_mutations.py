"""The list of safety lines is up to date; `make mutations` takes them out."""

from __future__ import annotations

import re

import pytest
from mutations import MUTATIONS, ROOT, Mutation


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_the_line_stands_once_and_its_tests_exist(mutation: Mutation) -> None:
    assert (ROOT / "src/moco" / mutation.file).read_text().count(mutation.old) == 1
    file, *options = mutation.tests.split()
    text = (ROOT / file).read_text()
    if options:
        assert re.search(rf"def test_\w*{options[1]}|\"{options[1]}\"", text), options[1]
