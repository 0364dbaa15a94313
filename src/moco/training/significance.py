"""What a difference of two accuracies is worth: intervals, exact tests, and the record of single images they need."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence

import numpy as np

Z95 = 1.959963984540054  # standard normal quantile of a two-sided 95 % interval


def wilson(correct: int, count: int) -> tuple[float, float]:
    """Return the 95 % Wilson score interval of a proportion (Wilson 1927), both ends in [0, 1]; (0, 1) of nothing."""
    if count == 0:
        return 0.0, 1.0
    share, squared = correct / count, Z95**2 / count
    centre = (share + squared / 2) / (1 + squared)
    half = Z95 / (1 + squared) * math.sqrt(share * (1 - share) / count + squared / (4 * count))
    return max(0.0, centre - half), min(1.0, centre + half)


def at_least(successes: int, trials: int) -> float:
    """Return the probability of so many heads or more in `trials` tosses of a fair coin."""
    logs = [
        math.lgamma(trials + 1) - math.lgamma(k + 1) - math.lgamma(trials - k + 1) - trials * math.log(2)
        for k in range(successes, trials + 1)
    ]
    return min(1.0, math.fsum(map(math.exp, logs)))


def mcnemar(only_first: int, only_second: int) -> float:
    """Return the two-sided p-value of the exact McNemar test.

    only_first: images that the first of two classifiers alone has right, of those that both saw; only_second: those
    that the second alone has right.
    """
    return min(1.0, 2 * at_least(max(only_first, only_second), only_first + only_second))


def discordant(first: np.ndarray, second: np.ndarray) -> tuple[int, int]:
    """Return how many images the first alone has right, and the second alone. Both: N booleans, of the same images."""
    return int((first & ~second).sum()), int((second & ~first).sum())


def pack(correct: np.ndarray | Sequence[bool]) -> str:
    """Return N booleans as 'N:base64', a bit for each image: 25,600 of them are 4,274 characters."""
    bits = np.asarray(correct, bool)
    return f"{len(bits)}:{base64.b64encode(np.packbits(bits).tobytes()).decode()}"


def unpack(text: str) -> np.ndarray:
    """Return the N booleans that `pack` was given. Raises ValueError for any other text."""
    count, _, content = text.partition(":")
    found = np.unpackbits(np.frombuffer(base64.b64decode(content, validate=True), np.uint8))
    if not count.isdecimal() or not 0 <= len(found) - int(count) < 8:
        raise ValueError("not a packed row of booleans")
    return found[: int(count)].astype(bool)


def percent(share: float) -> str:
    """Return a fraction as text, '55.4 %'."""
    return f"{100 * share:.1f} %"


def described(correct: np.ndarray) -> str:
    """Return '55.4 % of 8,000 (54.3 to 56.5)' for N booleans: the fraction of right images and its 95 % interval."""
    low, high = wilson(int(correct.sum()), len(correct))
    return f"{percent(correct.mean())} of {len(correct):,} ({100 * low:.1f} to {100 * high:.1f})"
