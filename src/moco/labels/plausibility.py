"""Whether new labels are likely to belong to their images, from the images' neighbours among those known before.

The labels of an image's nearest neighbours in the features predict its own. The known images tell how often that is
right for each class, and how often an image of another class is taken for one. So a run of lines is expected to agree
as the known images of its classes do; labels that belong to any other images of the file (its rows have slipped by one)
would agree as often as chance has it. A run that agrees less than a third of the way from chance to what is expected is
suspicious, in files that are sorted by class or of one class alone as well. A third, not a half: images that were
chosen because they are hard agree less with their neighbours, and are still far from chance.
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
MOST = 0.5  # share of the new labels that one class may have for chance to be told from their own frequencies
ADDED = 10  # images of a class that are added to those that are known
SMALLEST_GAP = 0.02  # between chance and what is expected; below it, nothing can be told
BLOCK = 1024  # rows of the similarity matrix that are held at a time


@dataclass(frozen=True)
class Run:
    """Consecutive new labels, first to last (indices from 0). agreement, chance, threshold: fractions of them."""

    first: int
    last: int
    agreement: float
    chance: float
    threshold: float

    @property
    def suspicious(self) -> bool:
        """Return whether the labels agree with their images' neighbours less often than the threshold asks for."""
        return self.agreement < self.threshold


@dataclass(frozen=True)
class Check:
    """What the check of new labels has found.

    known: fraction of the known images whose neighbours agree with them. runs: empty where no run of labels would be
    long enough to tell chance from truth. needed: how long a run would have to be; None where no length would do.
    """

    known: float
    runs: list[Run]
    needed: int | None


def check_labels(known: Tensor, known_labels: Tensor, new: Tensor, labels: Tensor, classes: int) -> Check:
    """Check new labels against those that the nearest known images predict.

    known: N x D features with labels N; new: M x D features with labels M, in the order in which they were given.
    """
    known, new = F.normalize(known, dim=1), F.normalize(new, dim=1)
    among_known = _vote(known, known_labels, known, classes, skip_self=True)
    agreement = float((among_known == known_labels).float().mean())
    predicted = _vote(known, known_labels, new, classes, skip_self=False)
    rates = _rates(among_known, known_labels, agreement, classes)
    shares = _shares(labels, classes)
    if shares.max() > MOST:  # a slip would leave most labels right; any image of the pool is what they might belong to
        shares = _shares(known_labels, classes)
    right, by_chance = rates.diagonal(), shares @ rates
    needed = _needed(float(right[labels].mean()), float(by_chance[labels].mean()))
    if needed is None or len(labels) < needed:
        return Check(agreement, [], needed)
    count = max(1, min(RUNS, len(labels) // needed))
    bounds = [round(i * len(labels) / count) for i in range(count + 1)]
    runs = []
    for first, end in itertools.pairwise(bounds):
        given = labels[first:end]
        expected, chance = float(right[given].mean()), float(by_chance[given].mean())
        threshold = chance + SHARE * (expected - chance) if expected - chance > SMALLEST_GAP else 0.0
        runs.append(Run(first, end - 1, float((predicted[first:end] == given).float().mean()), chance, threshold))
    return Check(agreement, runs, needed)


def _rates(predicted: Tensor, labels: Tensor, agreement: float, classes: int) -> Tensor:
    """Return how often an image of one class is taken for another, C x C.

    As a class may have few images, some more are added that are taken for what all images are taken for.
    """
    counts = torch.zeros(classes, classes)
    counts.index_put_((labels, predicted), torch.ones(len(labels)), accumulate=True)
    usual = agreement * torch.eye(classes) + (1 - agreement) * _shares(predicted, classes)
    return (counts + ADDED * usual) / (counts.sum(1, keepdim=True) + ADDED)


def _shares(labels: Tensor, classes: int) -> Tensor:
    return torch.bincount(labels, minlength=classes) / len(labels)


def _needed(expected: float, chance: float) -> int | None:
    """Return the number of labels by which the threshold is SURE standard deviations from both agreements.

    These are the agreement of wrong labels and that of right labels.
    """
    gap = expected - chance
    if gap <= SMALLEST_GAP:
        return None
    low = chance * (1 - chance) / (SHARE * gap) ** 2
    high = expected * (1 - expected) / ((1 - SHARE) * gap) ** 2
    return max(10, int(SURE**2 * max(low, high)) + 1)


def _vote(bank: Tensor, bank_labels: Tensor, queries: Tensor, classes: int, skip_self: bool) -> Tensor:
    """Return the classes that the nearest of the bank vote for.

    Votes are weighted by exp(similarity / 0.1), as in `knn_accuracy`.
    """
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
