"""All strategies under their names, and what they need."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from moco.labels.selection.clusters import cluster_margin, k_medoids, typical
from moco.labels.selection.coverage import herd, k_centre
from moco.labels.selection.kmeans import kmeans

SAMPLE = 50_000  # rows that principal components are computed from
BLOCK = 16_384  # rows at a time, so that nothing of the features' size is made beside them
NEEDS_CLASSIFIER = ("uncertainty_herding", "margin")


@dataclass(frozen=True)
class Pool:
    """What a strategy chooses from.

    features: N x D of unit length; candidates: N booleans, those that may be chosen; labelled: L x D, features of the
    images whose labels are known. For strategies that need them: margins (N) between the probabilities that a
    classifier gives the two likeliest classes, and losses (N) of the contrastive task.
    """

    features: Tensor
    candidates: Tensor
    labelled: Tensor
    margins: Tensor | None = None
    losses: Tensor | None = None


@dataclass(frozen=True)
class Choice:
    """What was chosen. rows, scores, clusters: B each, on the CPU, in the order of their rank."""

    rows: Tensor
    scores: Tensor
    clusters: Tensor


def choose(strategy: str, pool: Pool, budget: int, bandwidth: float, seed: int) -> Choice:
    """Choose `budget` candidates; the choice is the same for the same seed.

    bandwidth: of the kernel of the two herding strategies. Strategies: random; loss (the largest contrastive losses);
    kmedoids, typiclust, margin (`clusters`); maxherding, uncertainty_herding, coreset (`coverage`). Those that have no
    clusters of their own get them from k-means over what was chosen, so that a gallery shows similar images together.
    """
    generator = torch.Generator().manual_seed(seed)
    features, candidates, labelled = pool.features, pool.candidates, pool.labelled
    clusters = None
    if strategy == "random":
        order = torch.randperm(len(features), generator=generator).to(candidates.device)
        rows = order[candidates[order]][:budget]
        scores = torch.zeros(budget)
    elif strategy == "loss":
        scores, rows = _needed(pool.losses, strategy).masked_fill(~candidates, -torch.inf).topk(budget)
    elif strategy == "kmedoids":
        rows, scores, clusters = k_medoids(features, candidates, labelled, budget, generator)
    elif strategy == "typiclust":
        rows, scores, clusters = typical(features, candidates, labelled, budget, generator)
    elif strategy == "margin":
        margins = _needed(pool.margins, strategy)
        rows, scores, clusters = cluster_margin(features, candidates, margins, budget, generator)
    elif strategy == "coreset":
        rows, scores = k_centre(features, candidates, labelled, budget)
    elif strategy in ("maxherding", "uncertainty_herding"):
        weights = None
        if strategy == "uncertainty_herding":
            weights = 1 - _needed(pool.margins, strategy)  # (arXiv 2412.20644, section 3)
        rows, scores = herd(features, candidates, labelled, budget, bandwidth, generator, weights)
    else:
        raise ValueError(f"{strategy}: not a strategy")
    rows, scores = rows.cpu(), scores.cpu()
    if clusters is None:
        _, clusters = kmeans(features[rows.to(features.device)], round(len(rows) ** 0.5), generator)
    return Choice(rows, scores, clusters.cpu())


def reduced(features: Tensor, width: int, seed: int = 0) -> Tensor:
    """Return rows of unit length, fp32, N x min(D, width): the principal components of unit-length features.

    The features are not centred, so cosines stay what they were but for what is left out. features: N x D, of any
    precision.
    """
    if features.shape[1] <= width:
        return F.normalize(features.float(), dim=1)
    chosen = torch.randperm(len(features), generator=torch.Generator().manual_seed(seed))[:SAMPLE].to(features.device)
    moments = torch.zeros(features.shape[1], features.shape[1], device=features.device)
    for rows in chosen.split(BLOCK):
        part = F.normalize(features[rows].float(), dim=1)
        moments.addmm_(part.T, part)
    _, directions = torch.linalg.eigh(moments.cpu())  # not every device can
    kept = directions[:, -width:].flip(1).to(features.device)
    parts = [F.normalize(F.normalize(part.float(), dim=1) @ kept, dim=1) for part in features.split(BLOCK)]
    return torch.cat(parts)


def _needed(values: Tensor | None, strategy: str) -> Tensor:
    if values is None:
        raise ValueError(f"{strategy}: it needs a value for each image, and the pool has none")
    return values
