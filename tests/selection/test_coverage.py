"""The herding strategies against their definition, and their way with many images."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moco.labels.selection import coverage
from moco.labels.selection.coverage import herd, k_centre, kernel


def clustered(count: int, seed: int = 0, clusters: int = 12, width: int = 8) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(clusters, width, generator=generator)
    chosen = torch.randint(clusters, (count,), generator=generator)
    return F.normalize(centres[chosen] + 0.3 * torch.randn(count, width, generator=generator), dim=1)


def by_definition(
    features: Tensor, candidates: Tensor, labelled: Tensor, budget: int, bandwidth: float, weights: Tensor
) -> list[int]:
    """Greedy: every candidate's coverage is computed anew in every round."""
    matrix = torch.exp(-torch.cdist(features, features).square() / bandwidth**2)
    covered = torch.zeros(len(features))
    if len(labelled):
        covered = torch.exp(-torch.cdist(features, labelled).square() / bandwidth**2).amax(1)
    picked: list[int] = []
    for _ in range(budget):
        value = torch.stack([(weights * torch.maximum(covered, row)).sum() for row in matrix])
        value[~candidates] = -1
        value[picked] = -1
        picked.append(int(value.argmax()))
        covered = torch.maximum(covered, matrix[picked[-1]])
    return picked


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("known", [0, 5])
def test_lazy_greedy_is_greedy(weighted: bool, known: int) -> None:
    features = clustered(200)
    candidates = torch.ones(200, dtype=torch.bool)
    candidates[::3] = False
    labelled = clustered(known, seed=1) if known else torch.empty(0, 8)
    weights = torch.rand(200, generator=torch.Generator().manual_seed(2)) if weighted else torch.ones(200)
    expected = by_definition(features, candidates, labelled, 15, 0.6, weights)
    rows, gains = herd(features, candidates, labelled, 15, 0.6, torch.Generator(), weights if weighted else None)
    assert rows.tolist() == expected
    assert (gains.diff() <= 1e-7).all(), "coverage has diminishing returns"


def test_without_the_whole_matrix_the_choice_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    features, candidates = clustered(500), torch.ones(500, dtype=torch.bool)
    rows, _ = herd(features, candidates, features[:0], 20, 0.5, torch.Generator())
    monkeypatch.setattr(coverage, "PART", 100)
    again, _ = herd(features, candidates, features[:0], 20, 0.5, torch.Generator())
    assert again.tolist() == rows.tolist()


def test_in_parts_it_covers_nearly_as_much(monkeypatch: pytest.MonkeyPatch) -> None:
    features, candidates = clustered(3000, clusters=40), torch.ones(3000, dtype=torch.bool)
    rows, _ = herd(features, candidates, features[:0], 300, 0.4, torch.Generator())
    monkeypatch.setattr(coverage, "PART", 400)
    monkeypatch.setattr(coverage, "WHOLE", 400)
    parts, gains = herd(features, candidates, features[:0], 300, 0.4, torch.Generator().manual_seed(0))
    assert len(set(parts.tolist())) == 300 and (gains.diff() <= 0).all()
    best, split = (float(coverage.covered(features, features[chosen], 0.4).mean()) for chosen in (rows, parts))
    random = float(coverage.covered(features, features[:300], 0.4).mean())
    assert split > best - 0.1 * (best - random)


def test_a_small_budget_for_many_images_is_chosen_from_some_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coverage, "PART", 100)
    monkeypatch.setattr(coverage, "WHOLE", 500)
    features, candidates = clustered(3000), torch.ones(3000, dtype=torch.bool)
    rows, _ = herd(features, candidates, features[:0], 12, 0.6, torch.Generator().manual_seed(0))
    assert len(set(rows.tolist())) == 12
    first, chosen = coverage.coverage(features, features[:12], features[rows], 0.6)
    assert chosen > first
    assert coverage.coverage(features, features[:0], features[rows], 0.6)[1] > first


def test_images_that_are_all_the_same_are_split_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coverage, "PART", 50)
    monkeypatch.setattr(coverage, "WHOLE", 50)
    features = F.normalize(torch.ones(300, 4), dim=1)
    rows, _ = herd(features, torch.ones(300, dtype=torch.bool), features[:0], 100, 0.5, torch.Generator())
    assert len(set(rows.tolist())) == 100


def test_shares_follow_what_is_open_and_the_room() -> None:
    shares = coverage._shares(torch.tensor([10.0, 30.0, 0.0, 60.0]), torch.tensor([100, 2, 100, 100]), 20)
    assert sum(shares) == 20 and shares[1] == 2 and shares[3] > shares[0] > shares[2]


def test_the_kernel_is_gaussian_in_the_distance() -> None:
    a, b = clustered(5), clustered(7, seed=3)
    assert torch.allclose(kernel(a, b, 0.7), torch.exp(-torch.cdist(a, b).square() / 0.49), atol=1e-5)


def test_the_core_set_takes_the_farthest() -> None:
    features, candidates = clustered(150), torch.ones(150, dtype=torch.bool)
    candidates[10:20] = False
    labelled = clustered(4, seed=5)
    rows, distances = k_centre(features, candidates, labelled, 10)
    for place in range(10):
        known = torch.cat([labelled, features[rows[:place]]])
        distance = torch.cdist(features, known).amin(1)
        distance[~candidates] = -1
        assert rows[place] == distance.argmax()
        assert float(distances[place]) == pytest.approx(float(distance.max()), abs=1e-4)
    first, _ = k_centre(features, candidates, features[:0], 3)
    assert first[0] == torch.where(candidates, features @ features.mean(0), -torch.inf).argmax()


def test_few_candidates_among_many_rows_are_all_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A random part stands for all rows, and may hold fewer candidates than the budget."""
    monkeypatch.setattr(coverage, "WHOLE", 100)
    monkeypatch.setattr(coverage, "PART", 50)
    features, candidates = clustered(1000), torch.zeros(1000, dtype=torch.bool)
    candidates[[3, 500, 700, 900, 999]] = True
    rows, _ = herd(features, candidates, features[:0], 5, 0.5, torch.Generator())
    assert sorted(rows.tolist()) == [3, 500, 700, 900, 999]
    with pytest.raises(ValueError, match="a budget of 6, and 5"):
        herd(features, candidates, features[:0], 6, 0.5, torch.Generator())
