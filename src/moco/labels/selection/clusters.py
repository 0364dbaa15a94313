"""Choices within clusters: k-medoids, TypiClust and Cluster-Margin."""

from __future__ import annotations

import heapq
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from moco.labels.selection.kmeans import kmeans

TYPICAL_CLUSTERS = 500  # at most (arXiv 2202.02794, section 3.2)
TYPICAL_NEIGHBOURS = 20  # (the same)
SMALLEST = 5  # rows of a cluster that TypiClust chooses from (the same)
PAIRS = 8192  # rows of a cluster that are compared with each other, at most
MEDOID_CLUSTERS = 16_384  # at most: more cost minutes, and then a cluster is chosen from several times
MARGIN_FACTOR = 10  # candidates for each image of the budget (arXiv 2107.14263, section 3)
MARGIN_SIZE = 10  # images of a cluster of those, on average

Chosen = tuple[Tensor, Tensor, Tensor]  # rows, scores, clusters; B each


def k_medoids(
    features: Tensor, candidates: Tensor, labelled: Tensor, budget: int, generator: torch.Generator
) -> Chosen:
    """Choose the candidate nearest to the centre of each k-means cluster that has no labelled image.

    The largest cluster comes first. There are as many clusters as there will be labels. score: minus the distance to
    the centre.
    """
    wanted = min(budget + len(labelled), MEDOID_CLUSTERS)
    cluster, known, centres = _clusters(features, labelled, wanted, generator)
    distance = (features - centres[cluster]).square().sum(1).sqrt()

    def rank(rows: Tensor) -> tuple[Tensor, Tensor]:
        near = distance[rows].sort(stable=True)
        return rows[near.indices], -near.values

    return _in_turns(cluster, known, candidates, budget, rank, 1)


def typical(features: Tensor, candidates: Tensor, labelled: Tensor, budget: int, generator: torch.Generator) -> Chosen:
    """Choose by TypiClust (Hacohen et al. 2022, arXiv 2202.02794, algorithm 1).

    It takes the most typical image from the clusters with the fewest labels, the largest cluster first. score: its
    typicality, 1 over the mean distance to its nearest 20 in the cluster.
    """
    wanted = min(budget + len(labelled), TYPICAL_CLUSTERS)
    cluster, known, _ = _clusters(features, labelled, wanted, generator)

    def rank(rows: Tensor) -> tuple[Tensor, Tensor]:
        if len(rows) == 1:
            return rows, torch.zeros(1, device=rows.device)
        if len(rows) > PAIRS:
            rows = rows[torch.randperm(len(rows), generator=generator)[:PAIRS].to(rows.device)]
        near = min(TYPICAL_NEIGHBOURS, len(rows) - 1)
        nearest = torch.cdist(features[rows], features[rows]).topk(near + 1, 1, largest=False).values[:, 1:]
        typicality = (1 / nearest.mean(1).clamp(min=1e-6)).sort(descending=True, stable=True)
        return rows[typicality.indices], typicality.values

    return _in_turns(cluster, known, candidates, budget, rank, SMALLEST)


def cluster_margin(
    features: Tensor, candidates: Tensor, margin: Tensor, budget: int, generator: torch.Generator
) -> Chosen:
    """Choose by Cluster-Margin (Citovsky et al. 2021, arXiv 2107.14263, algorithm 2), with k-means for its clusters.

    It considers ten times as many candidates as the budget, those whose classes are the least certain, and takes one
    from each cluster in turn, the smallest cluster first. margin: N, between the probabilities of the two likeliest
    classes. score: minus the margin.
    """
    least = margin.masked_fill(~candidates, torch.inf)
    pool = least.topk(min(MARGIN_FACTOR * budget, int(candidates.sum())), largest=False).indices
    _, cluster = kmeans(features[pool], max(1, len(pool) // MARGIN_SIZE), generator, iterations=10)
    sizes = torch.bincount(cluster)
    order = sizes[sizes > 0].argsort(stable=True)
    members = [pool[cluster == number] for number in sizes.nonzero().flatten()[order]]  # the surest last
    turns = [(place, rank, rows[place]) for rank, rows in enumerate(members) for place in range(len(rows))]
    turns.sort(key=lambda each: each[:2])
    rows = torch.stack([row for _, _, row in turns[:budget]])
    ranks = torch.tensor([rank for _, rank, _ in turns[:budget]])
    return rows, -margin[rows], ranks


def margins(probabilities: Tensor) -> Tensor:
    """Return by how much the likeliest class is ahead of the second, N, for probabilities N x C."""
    top = F.pad(probabilities, (0, 1)).topk(2, 1).values  # a single class is ahead of nothing
    return top[:, 0] - top[:, 1]


def _clusters(
    features: Tensor, labelled: Tensor, count: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (cluster of each row, labelled images of each cluster, centres) of rows and labelled images together."""
    centres, nearest = kmeans(torch.cat([features, labelled]), count, generator)
    known = torch.bincount(nearest[len(features) :], minlength=len(centres))
    return nearest[: len(features)], known, centres


def _in_turns(
    cluster: Tensor, known: Tensor, candidates: Tensor, budget: int,
    rank: Callable[[Tensor], tuple[Tensor, Tensor]], smallest: int,
) -> Chosen:  # fmt: skip
    """Choose one candidate at a time from the cluster with the fewest labels, given or chosen here.

    Of several such clusters the largest comes first. Clusters of less than `smallest` rows come last. rank: sorts rows
    of a cluster, or some of them, the best first, with their scores; it is asked once, and again only when those are
    used up.
    """
    device, sizes = cluster.device, torch.bincount(cluster, minlength=len(known)).cpu()
    order = cluster.cpu().argsort(stable=True)
    open_rows = candidates.cpu()
    members = [rows[open_rows[rows]] for rows in order.split(sizes.tolist())]
    labels, small = known.cpu().tolist(), (sizes < smallest).tolist()
    queue = [(labels[n], small[n], -int(sizes[n]), n) for n, rows in enumerate(members) if len(rows)]
    heapq.heapify(queue)
    ranked: dict[int, list[tuple[int, float]]] = {}  # the best last
    chosen: list[tuple[int, float, int]] = []
    while len(chosen) < budget:
        count, late, size, number = heapq.heappop(queue)
        if not ranked.get(number):
            rows, scores = (each.cpu() for each in rank(members[number].to(device)))
            ranked[number] = list(zip(rows.tolist(), scores.tolist(), strict=True))[::-1]
            members[number] = members[number][~torch.isin(members[number], rows)]
        chosen.append((*ranked[number].pop(), number))
        if ranked[number] or len(members[number]):
            heapq.heappush(queue, (count + 1, late, size, number))
    picked, values, where = zip(*chosen, strict=True)
    return torch.tensor(picked), torch.tensor(values), torch.tensor(where)
