"""Intervals and tests of accuracies against SciPy's and published values."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binomtest

from moco.training.significance import at_least, described, discordant, mcnemar, wilson


@pytest.mark.parametrize(
    ("correct", "count"), [(0, 10), (1, 10), (4, 12), (81, 263), (54, 100), (10, 10), (7692, 9999)]
)
def test_wilson_is_scipys(correct: int, count: int) -> None:
    expected = binomtest(correct, count).proportion_ci(0.95, method="wilson")
    assert wilson(correct, count) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_wilson_has_the_published_values() -> None:
    """Newcombe 1998, Statistics in Medicine 17, table I, method 3: 81 of 263, 15 of 148, 0 of 20, 1 of 29."""
    for correct, count, low, high in (
        (81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718),
    ):  # fmt: skip
        assert wilson(correct, count) == pytest.approx((low, high), abs=5e-5)
    assert wilson(0, 0) == (0, 1)


@pytest.mark.parametrize(("first", "second"), [(0, 0), (0, 5), (10, 1), (30, 23), (7, 7), (400, 300), (5000, 5200)])
def test_mcnemar_is_the_exact_binomial_test(first: int, second: int) -> None:
    both = first + second
    assert mcnemar(first, second) == pytest.approx(binomtest(first, both).pvalue if both else 1, abs=1e-9)
    expected = binomtest(first, both, alternative="greater").pvalue if both else 1
    assert at_least(first, both) == pytest.approx(expected, abs=1e-9)


def test_discordant_images_are_counted_and_accuracies_described() -> None:
    first, second = np.array([1, 1, 0, 0, 1], bool), np.array([1, 0, 1, 0, 0], bool)
    assert discordant(first, second) == (2, 1)
    assert described(np.arange(263) < 81) == "30.8 % of 263 (25.5 to 36.6)"
