"""Whether new labels are likely to belong to their images, from the images' neighbours among those known before.

The labels of an image's nearest neighbours in the features predict its own. How often, the known labels tell about each
other; how often it happens by chance, the frequencies of predictions and labels tell. Labels that belong to other
images (a file whose rows have slipped by one) agree as often as chance has it. A run of lines that agrees less than a
third of the way from chance to the known labels' agreement is suspicious. A third, not a half: images that were chosen
because they are hard agree less with their neighbours, and are still far from chance.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

NEIGHBOURS = 10
SHARE = 1 / 3  # of the way from chance to the known labels' agreement
SURE = 3.0  # standard deviations that lie between the threshold and either end; decides how many lines are looked at
RUNS = 8  # of consecutive lines, at most
BLOCK = 1024  # rows of the similarity matrix that are held at a time


@dataclass(frozen=True)
class Run:
    """Consecutive new labels, first to last (counted from 0). agreement, chance, threshold: shares of them."""

    first: int
    last: int
    agreement: float
    chance: float
    threshold: float

    @property
    def suspicious(self) -> bool:
        return self.agreement < self.threshold


@dataclass(frozen=True)
class Check:
    """known: share of the known images whose neighbours agree with them. runs: empty where no run of labels would be
    long enough to tell chance from truth; needed: how long it would have to be, None where no length would do."""

    known: float
    runs: list[Run]
    needed: int | None


def check_labels(known: Tensor, known_labels: Tensor, new: Tensor, labels: Tensor, classes: int) -> Check:
    """known: N x D features with labels N; new: M x D, labels M, in the order in which they were given."""
    known, new = F.normalize(known, dim=1), F.normalize(new, dim=1)
    among_known = _vote(known, known_labels, known, classes, skip_self=True)
    expected = float((among_known == known_labels).float().mean())
    predicted = _vote(known, known_labels, new, classes, skip_self=False)
    chance = _chance(predicted, labels, classes)
    needed = _needed(expected, chance)
    if needed is None or len(labels) < needed:
        return Check(expected, [], needed)
    count = max(1, min(RUNS, len(labels) // needed))
    bounds = [round(i * len(labels) / count) for i in range(count + 1)]
    runs = []
    for first, end in itertools.pairwise(bounds):
        part, given = predicted[first:end], labels[first:end]
        chance = _chance(part, given, classes)  # a run may be of one class alone
        agreement = float((part == given).float().mean())
        runs.append(Run(first, end - 1, agreement, chance, chance + SHARE * max(0.0, expected - chance)))
    return Check(expected, runs, needed)


def _needed(expected: float, chance: float) -> int | None:
    """Labels by which the threshold lies SURE standard deviations from the agreement of wrong and of right ones."""
    gap = expected - chance
    if gap <= 0.02:
        return None
    low = chance * (1 - chance) / (SHARE * gap) ** 2
    high = expected * (1 - expected) / ((1 - SHARE) * gap) ** 2
    return max(10, int(SURE**2 * max(low, high)) + 1)


def _chance(predicted: Tensor, labels: Tensor, classes: int) -> float:
    """Agreement of labels that have these frequencies and nothing to do with the predictions."""
    shares = [torch.bincount(part, minlength=classes).double() / len(part) for part in (predicted, labels)]
    return float((shares[0] * shares[1]).sum())


def _vote(bank: Tensor, bank_labels: Tensor, queries: Tensor, classes: int, skip_self: bool) -> Tensor:
    """Classes that the nearest of the bank vote for, weighted by exp(similarity / 0.1) as in `knn_accuracy`."""
    near = min(NEIGHBOURS, len(bank) - int(skip_self))
    found = []
    for first in range(0, len(queries), BLOCK):
        part = queries[first : first + BLOCK]
        similarity = part @ bank.T
        if skip_self:
            rows = torch.arange(len(part))
            similarity[rows, first + rows] = -torch.inf
        value, index = similarity.topk(near, 1)
        votes = torch.zeros(len(part), classes).scatter_add_(1, bank_labels[index], torch.exp(value / 0.1))
        found.append(votes.argmax(1))
    return torch.cat(found)
