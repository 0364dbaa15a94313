"""Greedy choices that cover the pool: MaxHerding and the k-centre core-set."""

from __future__ import annotations

import torch
from torch import Tensor

from moco.labels.selection.kmeans import kmeans

PART = 8192  # rows that are covered at a time, as all pairs of them are looked at
WHOLE = 65_536  # rows up to which a small budget is spread over all of them at once
ROUND = 64  # rows whose gain is computed at a time
PER_PART = 16  # images that a part gets at least, so that parts cost little coverage
AT_LEAST = 4  # candidates for each image of the budget, where a part of the rows stands for all
BLOCK = 1 << 24  # elements of a block of similarities: 64 MiB


def kernel(a: Tensor, b: Tensor, bandwidth: float) -> Tensor:
    """Return exp(-|x - y|^2 / bandwidth^2) of all pairs of unit-length rows, N x M."""
    return torch.mm(a, b.T).sub_(1).mul_(2 / bandwidth**2).exp_()


def herd(
    features: Tensor, candidates: Tensor, labelled: Tensor, budget: int, bandwidth: float,
    generator: torch.Generator, weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Choose rows by greedy generalised coverage, MaxHerding (Bae et al. 2024, arXiv 2407.12212, equation 3).

    Coverage is the mean over all rows of the kernel with the nearest chosen or labelled one. Returns (rows B, gains B),
    the largest gain first.

    features: N x D of unit length; candidates: N booleans; labelled: L x D. weights (N): how much covering a row is
    worth, as in Uncertainty Herding (Bae et al. 2024, arXiv 2412.20644). The greedy choice is exact, by lazy evaluation
    (Minoux 1978), for small budgets and up to 65,536 rows. Of more rows, a random choice of as many stands for all.
    Larger budgets are shared between parts that k-means makes, in proportion to what of each is not covered yet. There
    must be as many candidates as the budget.
    """
    count = len(features)
    weights = torch.ones(count, device=features.device) if weights is None else weights
    if budget < PER_PART * -(-count // PART) or count <= PART:
        rows = torch.arange(count) if count <= WHOLE else _some(candidates.cpu(), budget, generator)
        parts = [rows.to(features.device)]
    else:
        parts = _parts(features, torch.arange(count, device=features.device), generator)
    before = [covered(features[rows], labelled, bandwidth) for rows in parts]
    open_weight = torch.stack([(weights[rows] * (1 - done)).sum() for rows, done in zip(parts, before, strict=True)])
    room = torch.stack([candidates[rows].sum() for rows in parts])
    found, gains = [], []
    for rows, done, share in zip(parts, before, _shares(open_weight.cpu(), room.cpu(), budget), strict=True):
        picked, gain = _greedy(features[rows], candidates[rows], done, weights[rows], share, bandwidth)
        found.append(rows[picked])
        gains.append(gain / count)
    order = torch.cat(gains).sort(descending=True, stable=True).indices
    return torch.cat(found)[order], torch.cat(gains)[order]


def coverage(features: Tensor, labelled: Tensor, chosen: Tensor, bandwidth: float) -> tuple[float, float]:
    """Return the coverage of all rows by the labelled ones, and by the labelled and the chosen ones together.

    Coverage is the mean over all rows of the kernel with the nearest of them, between 0 and 1.
    """
    before = covered(features, labelled, bandwidth)
    after = torch.maximum(before, covered(features, chosen, bandwidth))
    return float(before.mean()), float(after.mean())


def covered(features: Tensor, chosen: Tensor, bandwidth: float) -> Tensor:
    """Return for each row the kernel with the nearest of the chosen ones; 0 where there is none."""
    if not len(chosen):
        return torch.zeros(len(features), device=features.device)
    rows = max(1, BLOCK // len(chosen))
    nearest = torch.cat([torch.mm(part, chosen.T).amax(1) for part in features.split(rows)])
    return nearest.sub_(1).mul_(2 / bandwidth**2).exp_()


def _parts(features: Tensor, rows: Tensor, generator: torch.Generator) -> list[Tensor]:
    """Return the rows, split by k-means until no part has more than PART."""
    if len(rows) <= PART:
        return [rows]
    wanted = 2 * -(-len(rows) // PART)  # half as large as they may be: parts differ in size
    _, nearest = kmeans(features[rows], wanted, generator, iterations=10, per_centre=128)
    parts = [rows[nearest == number] for number in range(wanted)]
    if max(map(len, parts)) == len(rows):  # all the same
        return list(rows.split(PART))
    return [small for part in parts if len(part) for small in _parts(features, part, generator)]


def _some(candidates: Tensor, budget: int, generator: torch.Generator) -> Tensor:
    """Return random rows, with more candidates where these have few: four times the budget, as far as there are."""
    order = torch.randperm(len(candidates), generator=generator)
    rows, others = order[:WHOLE], order[WHOLE:]
    missing = max(0, AT_LEAST * budget - int(candidates[rows].sum()))
    return torch.cat([rows, others[candidates[others]][:missing]]).sort().values


def _shares(open_weight: Tensor, room: Tensor, budget: int) -> list[int]:
    """Split `budget` in proportion to what is open, each at most its room, by the largest remainders."""
    if budget > int(room.sum()):
        raise ValueError(f"a budget of {budget}, and {int(room.sum())} candidates")
    shares = torch.zeros(len(room), dtype=torch.int64)
    while (left := budget - int(shares.sum())) > 0:
        weight = torch.where(shares < room, open_weight.double().clamp(min=1e-12), torch.zeros(1, dtype=torch.float64))
        exact = left * weight / weight.sum()
        extra = torch.minimum(exact.floor().long(), room - shares)
        shares += extra
        rest = left - int(extra.sum())
        for place in (exact - exact.floor()).argsort(descending=True, stable=True).tolist() if rest else []:
            if rest and shares[place] < room[place]:
                shares[place] += 1
                rest -= 1
    return shares.tolist()


def _greedy(
    features: Tensor, candidates: Tensor, done: Tensor, weights: Tensor, budget: int, bandwidth: float
) -> tuple[Tensor, Tensor]:
    """Choose by the lazy greedy algorithm.

    A gain computed earlier is an upper bound of the gain now, as coverage only grows.
    """
    whole = kernel(features, features, bandwidth) if len(features) <= PART else None

    def rows_of(chosen: Tensor) -> Tensor:
        return whole[chosen] if whole is not None else kernel(features[chosen], features, bandwidth)

    def gains_of(chosen: Tensor) -> Tensor:
        return rows_of(chosen).sub_(done).clamp_(min=0) @ weights

    open_rows = candidates.nonzero().flatten()
    bounds = torch.full((len(features),), -torch.inf, device=features.device)
    step = max(ROUND, BLOCK // len(features))
    for part in open_rows.split(step):
        bounds[part] = gains_of(part)
    picked, gains = [], []
    for _ in range(budget):
        fresh = torch.zeros(len(features), dtype=torch.bool, device=features.device)
        while True:
            best = int(bounds.argmax())
            if fresh[best]:
                break
            stale = torch.where(fresh, -torch.inf, bounds).topk(min(ROUND, len(features))).indices
            stale = stale[bounds[stale] > -torch.inf]
            bounds[stale] = gains_of(stale)
            fresh[stale] = True
        picked.append(best)
        gains.append(float(bounds[best]))
        bounds[best] = -torch.inf
        done = torch.maximum(done, rows_of(torch.tensor([best], device=features.device))[0])
    device = features.device
    return torch.tensor(picked, dtype=torch.int64, device=device), torch.tensor(gains, device=device)


def k_centre(features: Tensor, candidates: Tensor, labelled: Tensor, budget: int) -> tuple[Tensor, Tensor]:
    """Choose each time the candidate that is farthest from all chosen and labelled ones: (rows B, distances B).

    This is the core-set (Sener and Savarese 2018, arXiv 1708.00489, algorithm 1). Without labels the first is the one
    nearest to the mean.
    """
    if len(labelled):
        rows = max(1, BLOCK // len(labelled))
        nearest = torch.cat([torch.mm(part, labelled.T).amax(1) for part in features.split(rows)])
        distance = (2 - 2 * nearest).clamp(min=0)
    else:
        distance = torch.full((len(features),), 4.0, device=features.device)
        first = torch.where(candidates, features @ features.mean(0), -torch.inf).argmax()
        distance[first] = 4.5  # beyond any distance on the sphere
    picked, scores = [], []
    closed = ~candidates
    for _ in range(budget):
        best = int(distance.masked_fill(closed, -1).argmax())
        picked.append(best)
        scores.append(min(float(distance[best]), 4.0) ** 0.5)
        closed[best] = True
        distance = torch.minimum(distance, (2 - 2 * (features @ features[best])).clamp(min=0))
    return torch.tensor(picked, dtype=torch.int64), torch.tensor(scores)
