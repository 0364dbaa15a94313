"""k-means, and what is chosen within its clusters."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moco.labels.selection import clusters, near_duplicates
from moco.labels.selection import kmeans as module
from moco.labels.selection.clusters import cluster_margin, k_medoids, margins, typical
from moco.labels.selection.kmeans import assign, kmeans
from moco.labels.selection.near_duplicates import deduplicate, small_pictures
from moco.labels.selection.strategies import reduced


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def blobs(sizes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Far apart, each around an axis of its own, with less and less noise towards its first row."""
    truth = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    place = torch.cat([torch.arange(size) for size in sizes])
    noise = torch.randn(len(truth), len(sizes) + 4, generator=seeded())
    features = F.one_hot(truth, len(sizes) + 4) + 0.002 * (place[:, None] + 1) * F.normalize(noise, dim=1)
    return F.normalize(features.float(), dim=1), truth


def test_kmeans_finds_what_lies_apart() -> None:
    features, truth = blobs((40, 30, 20, 10))
    centres, nearest = kmeans(features, 4, seeded())
    assert len(centres) == 4
    assert len({(int(a), int(b)) for a, b in zip(truth, nearest, strict=True)}) == 4
    assert torch.allclose(centres[nearest[0]], features[:40].mean(0), atol=1e-6)
    again, distance = assign(features, centres)
    assert torch.equal(again, nearest)
    assert torch.allclose(distance, torch.cdist(features, centres).amin(1).square(), atol=1e-5)


def test_kmeans_is_lloyds_to_the_end(monkeypatch: object) -> None:
    features = F.normalize(torch.randn(300, 6, generator=seeded()), dim=1)
    centres, nearest = kmeans(features, 9, seeded(), iterations=200)
    for number in range(9):
        assert torch.allclose(centres[number], features[nearest == number].mean(0), atol=1e-5)


def test_kmeans_with_more_centres_than_rows_and_from_random_rows(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    features, _ = blobs((3, 2))
    assert len(kmeans(features, 50, seeded())[0]) == 5
    monkeypatch.setattr(module, "SEEDED", 0)
    features, truth = blobs((400, 300, 200, 100))
    _, nearest = kmeans(features, 12, seeded(), per_centre=20)
    for number in range(12):
        assert len(set(truth[nearest == number].tolist())) <= 1


def test_medoids_come_from_the_largest_clusters_without_labels() -> None:
    features, truth = blobs((40, 30, 20, 10))
    rows, scores, where = k_medoids(features, torch.ones(100, dtype=torch.bool), features[:1], 3, seeded())
    assert truth[rows].tolist() == [1, 2, 3], "class 0 has its label"
    assert len(set(where.tolist())) == 3 and (scores <= 0).all()
    centre = features[truth == 1].mean(0)
    assert rows[0] == 40 + int((features[40:70] - centre).square().sum(1).argmin())


def test_typical_images_lie_where_it_is_dense_and_small_clusters_wait() -> None:
    features, truth = blobs((40, 30, 20, 3))
    candidates = torch.ones(93, dtype=torch.bool)
    rows, scores, _ = typical(features, candidates, features[:0], 4, seeded())
    assert truth[rows].tolist() == [0, 1, 2, 3]
    near = torch.cdist(features[:40], features[:40]).sort(1).values[:, 1:21].mean(1)
    assert rows[0] == near.argmin() and torch.allclose(scores[0], 1 / near.min(), rtol=1e-3)
    candidates[rows[0]] = False
    assert typical(features, candidates, features[:0], 1, seeded())[0][0] != rows[0]


def test_more_is_asked_for_than_there_are_clusters() -> None:
    features, _ = blobs((40, 30, 20, 10))
    known = features[torch.tensor([0, 40, 70, 90])]
    rows, _, _ = typical(features, torch.ones(100, dtype=torch.bool), known, 60, seeded())
    assert len(set(rows.tolist())) == 60


def test_clusters_are_compared_once_and_large_ones_by_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    features, truth = blobs((40, 30, 20, 10))
    monkeypatch.setattr(clusters, "TYPICAL_CLUSTERS", 4)
    compared: list[int] = []
    cdist = torch.cdist

    def counted(a: Tensor, b: Tensor) -> Tensor:
        compared.append(len(a))
        return cdist(a, b)

    monkeypatch.setattr(clusters.torch, "cdist", counted)
    everything = torch.ones(100, dtype=torch.bool)
    rows, scores, where = typical(features, everything, features[:0], 36, seeded())
    assert compared == [40, 30, 20, 10], "once for each cluster, whatever the budget"
    assert truth[rows[:4]].tolist() == [0, 1, 2, 3] and torch.bincount(where).tolist() == [9, 9, 9, 9]
    of_first = scores[truth[rows] == 0]
    assert torch.equal(of_first, of_first.sort(descending=True).values), "the most typical first"
    monkeypatch.setattr(clusters, "PAIRS", 16)
    rows, _, _ = typical(features, everything, features[:0], 100, seeded())
    assert sorted(rows.tolist()) == list(range(100)), "a part of a cluster that is used up, then the next"


def test_margins_are_small_and_from_all_clusters() -> None:
    features, truth = blobs((60, 60, 60))
    sure = torch.linspace(0, 0.5, 180)[torch.randperm(180, generator=seeded())]
    margin = margins(torch.stack([0.5 - sure, 0.5 + sure], 1))
    rows, scores, _ = cluster_margin(features, torch.ones(180, dtype=torch.bool), margin, 6, seeded())
    assert set(truth[rows].tolist()) == {0, 1, 2}
    assert (-scores <= (2 * sure).sort().values[59] + 1e-6).all(), "of the ten times as many least certain"
    assert torch.allclose(margin, 2 * sure, atol=1e-6)
    assert (margins(torch.ones(5, 1)) == 1).all(), "of one class everything is certain"


def test_reduced_features_keep_their_cosines() -> None:
    low = torch.randn(200, 5, generator=seeded()) @ torch.randn(5, 60, generator=seeded())
    small = reduced(low, 5)
    assert small.shape == (200, 5)
    unit = F.normalize(low, dim=1)
    assert torch.allclose(small @ small.T, unit @ unit.T, atol=1e-4)
    assert torch.equal(reduced(low, 100), unit)


def test_near_copies_are_found_once() -> None:
    pictures = torch.rand(6, 16, 16, 3, generator=seeded()).mul(255).byte()
    pictures[3] = (pictures[0].int() + 2).clamp(max=255).byte()
    pictures[4] = (pictures[3].int() + 2).clamp(max=255).byte()  # like 3, which is like 0, and like 0 itself
    small = small_pictures(pictures.numpy())
    assert small.shape == (6, 192)
    assert deduplicate(small, small[:0]).tolist() == [True, True, True, False, False, True]
    assert deduplicate(small, small[1:2]).tolist() == [True, False, True, False, False, True]


def test_near_copies_are_found_across_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = 255 * torch.rand(40, 192, generator=seeded())
    again = torch.randint(40, (200,), generator=seeded())
    small = pictures[again]
    first = [number not in again[:place] for place, number in enumerate(again)]
    assert deduplicate(small, small[:0]).tolist() == first
    monkeypatch.setattr(near_duplicates, "BLOCK", 7)
    assert deduplicate(small, small[:0]).tolist() == first
    assert not deduplicate(small, pictures).any()
