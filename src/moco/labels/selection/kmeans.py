"""k-means by Lloyd's iterations, in blocks, on the device of its input."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 1 << 24  # elements of a block of similarities: 64 MiB
SEEDED = 1 << 31  # rows x centres x columns up to which the first centres are spread out


def kmeans(
    features: Tensor, count: int, generator: torch.Generator, *, iterations: int = 20, per_centre: int = 256
) -> tuple[Tensor, Tensor]:
    """Return (centres K x D, index of the nearest centre of each row N) of `count` clusters.

    There are fewer centres where there are fewer rows. features: N x D. The centres are moved on a random part of at
    most `per_centre` rows for each. They begin spread out (k-means++: Arthur and Vassilvitskii 2007) where that is
    affordable, else at random rows. A centre that loses all rows moves to the row that is farthest from its own centre.
    """
    count = min(count, len(features))
    chosen = torch.randperm(len(features), generator=generator)[: count * per_centre]
    sample = features[chosen.to(features.device)] if len(chosen) < len(features) else features
    if sample.numel() * count <= SEEDED:
        centres = _spread(sample, count, generator)
    else:
        start = torch.randperm(len(sample), generator=generator)[:count]
        centres = sample[start.to(sample.device)].clone()
    before = None
    for _ in range(iterations):
        nearest, distance = assign(sample, centres)
        if before is not None and torch.equal(nearest, before):
            break
        before = nearest
        sizes = torch.bincount(nearest, minlength=count)
        centres = torch.zeros_like(centres).index_add_(0, nearest, sample)
        centres /= sizes.clamp(min=1)[:, None]
        empty = (sizes == 0).nonzero().flatten()
        if len(empty):
            centres[empty] = sample[distance.topk(len(empty)).indices]
    return centres, assign(features, centres)[0]


def assign(features: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    """Return (index of the nearest centre N, squared distance to it N)."""
    half = centres.square().sum(1) / 2
    rows = max(1, BLOCK // len(centres))
    found = [torch.addmm(half, part, centres.T, beta=-1).max(1) for part in features.split(rows)]
    nearest = torch.cat([each.indices for each in found])
    closeness = torch.cat([each.values for each in found])
    return nearest, (features.square().sum(1) - 2 * closeness).clamp(min=0)


def _spread(sample: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Draw centres one by one, each row with a chance proportional to its squared distance from those before."""
    first = int(torch.randint(len(sample), (1,), generator=generator))
    centres = [sample[first]]
    distance = (sample - centres[0]).square().sum(1)
    for _ in range(count - 1):
        total = distance.cpu().double().cumsum(0)  # not every device has doubles
        at = torch.rand(1, generator=generator, dtype=torch.float64) * total[-1]
        row = int(torch.searchsorted(total, at).clamp(max=len(sample) - 1))
        centres.append(sample[row])
        distance = torch.minimum(distance, (sample - sample[row]).square().sum(1))
    return torch.stack(centres)
