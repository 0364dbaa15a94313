"""What features are worth, against plain reference computations."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from moco.encoders.small_resnet import SmallResNet
from moco.training import features
from moco.training.features import (
    effective_rank,
    eval_mode,
    extract,
    feature_std,
    knn_accuracy,
    stratified_holdout,
)  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread(few_threads: None) -> None:
    """Tensors this small lose time with more."""
    torch.set_num_threads(1)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def brute_force(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    labels: Tensor,
    neighbours: int,
    classes: int,
    temperature: float,
) -> float:
    """One query at a time, in float64."""
    hits = 0
    rows = [row / math.sqrt(float((row**2).sum())) for row in bank.double()]
    for query, label in zip(queries.double(), labels.tolist(), strict=True):
        unit = query / math.sqrt(float((query**2).sum()))
        similarity = [float((unit * row).sum()) for row in rows]
        nearest = sorted(range(len(rows)), key=lambda i: -similarity[i])[:neighbours]
        votes = [0.0] * classes
        for i in nearest:
            votes[int(bank_labels[i])] += math.exp(similarity[i] / temperature)
        hits += votes.index(max(votes)) == label
    return hits / len(queries)


@pytest.mark.parametrize("temperature", [0.1, 1.0])
@pytest.mark.parametrize("neighbours", [1, 5, 20, 10_000])
def test_nearest_neighbours_equal_brute_force(
    neighbours: int, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features, "QUERY_BLOCK", 7)  # so that several blocks and a partial one are met
    labels = torch.arange(60) % 4
    bank = normal(60, 6) * torch.linspace(0.1, 5, 60)[:, None] + labels[:, None] * 0.3
    truth = torch.arange(33) % 4
    queries = normal(33, 6, seed=1) + truth[:, None] * 0.3
    found = knn_accuracy(
        bank, labels, queries, truth, neighbours=neighbours, classes=4, temperature=temperature
    )  # fmt: skip
    assert found == brute_force(bank, labels, queries, truth, min(neighbours, 60), 4, temperature)
    assert 0 < found < 1


def test_near_neighbours_outvote_many_far_ones() -> None:
    bank = torch.tensor([[1.0, 0.05], [0.0, 1.0], [0.1, 1.0]])
    labels = torch.tensor([0, 1, 1])
    query, truth = torch.tensor([[1.0, 0.0]]), torch.tensor([0])
    assert knn_accuracy(bank, labels, query, truth, neighbours=3, classes=2) == 1
    # With flat votes two beat one.
    assert knn_accuracy(bank, labels, query, truth, neighbours=3, classes=2, temperature=100) == 0


def test_length_of_features_plays_no_part_for_neighbours() -> None:
    bank, labels = torch.tensor([[0.001, 0.0], [50.0, 60.0]]), torch.tensor([0, 1])
    assert knn_accuracy(bank, labels, torch.tensor([[9.0, 0.1]]), torch.tensor([0]), neighbours=1, classes=2) == 1


@pytest.mark.parametrize("width", [16, 256])
def test_spread_is_one_for_noise_and_nothing_for_a_collapse(width: int) -> None:
    assert feature_std(normal(2000, width)) == pytest.approx(1, abs=0.05)
    assert feature_std(100 * normal(2000, width)) == pytest.approx(1, abs=0.05)
    assert feature_std(normal(1, width).expand(50, width)) == pytest.approx(0, abs=1e-5)
    # All on one line: unit lengths, but only two points.
    line = torch.zeros(100, width)
    line[:, 0] = torch.tensor([1.0, -1.0]).repeat(50)
    assert feature_std(line) == pytest.approx(math.sqrt(100 / 99) / math.sqrt(width), rel=1e-4)


def test_effective_rank_of_known_matrices() -> None:
    axes = torch.cat([torch.eye(8), -torch.eye(8)])  # centred; eight equal singular values
    assert effective_rank(axes) == pytest.approx(8, rel=1e-4)
    assert effective_rank(axes[:, :3].repeat(1, 4)) == pytest.approx(3, rel=1e-3)
    assert effective_rank(normal(100, 1) @ normal(1, 20, seed=1)) == pytest.approx(1, abs=1e-2)
    assert effective_rank(axes + 1000) == pytest.approx(8, rel=1e-2), "the mean plays no part"
    two = torch.tensor([[3.0, 0], [-3, 0], [0, 1], [0, -1]])  # shares 3/4 and 1/4
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert effective_rank(two) == pytest.approx(math.exp(entropy), rel=1e-5)


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 0.99, 1.0])
def test_holdout_takes_a_share_of_every_class(share: float) -> None:
    counts = {0: 1, 1: 2, 2: 3, 3: 40, 7: 101}
    labels = np.random.default_rng(0).permutation(np.repeat(list(counts), list(counts.values())))
    kept, held = stratified_holdout(labels, share, seed=4)
    assert sorted([*kept, *held]) == list(range(len(labels))), "disjoint, and nothing is lost"
    assert list(held) == sorted(held) and list(kept) == sorted(kept)
    for label, count in counts.items():
        here = int((labels[held] == label).sum())
        assert here == (0 if count == 1 else min(max(1, round(share * count)), count - 1)), label


def test_holdout_is_a_function_of_its_seed() -> None:
    labels = np.arange(100) % 5
    first, again, other = (stratified_holdout(labels, 0.3, seed)[1] for seed in (1, 1, 2))
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    assert not np.array_equal(first, np.arange(len(first))), "random, not the first ones"


def network() -> nn.Module:
    """In train mode but for one BatchNorm, which is frozen by its user."""
    torch.manual_seed(0)
    model = SmallResNet(3, width=4, stages=2).train()
    model.bn1.eval()
    return model


def modes(model: nn.Module) -> dict[str, bool]:
    return {name: module.training for name, module in model.named_modules()}


@pytest.mark.parametrize("failing", [False, True])
def test_every_module_gets_its_own_mode_back(failing: bool) -> None:
    model = network()
    before = modes(model)
    assert before[""] and not before["bn1"]
    try:
        with eval_mode(model) as inside:
            assert inside is model and not any(modes(model).values())
            if failing:
                raise ValueError
    except ValueError:
        pass
    assert modes(model) == before


def test_train_mode_is_back_after_an_evaluation_and_training_goes_on() -> None:
    """Fault 6."""
    model = network()
    images = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3)).astype(np.uint8)
    before = modes(model)
    extract(model, images, unit, batch_size=2, device=torch.device("cpu"))
    assert modes(model) == before
    statistics = model.get_buffer("layers.0.bn1.running_mean").clone()
    model(normal(4, 3, 8, 8))
    assert not torch.equal(model.get_buffer("layers.0.bn1.running_mean"), statistics), "statistics move again"


def unit(batch: Tensor) -> Tensor:
    assert batch.dtype is torch.uint8
    return batch.permute(0, 3, 1, 2).float() / 255


@pytest.mark.parametrize("batch_size", [1, 4, 10, 100])
def test_features_come_in_order_whatever_the_batch(batch_size: int) -> None:
    model = network()
    images = np.random.default_rng(0).integers(0, 256, (10, 8, 8, 3)).astype(np.uint8)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    found = extract(model, images, unit, batch_size=batch_size, device=torch.device("cpu"))
    assert found.shape == (10, 3) and found.dtype is torch.float32 and not found.requires_grad
    model.eval()
    with torch.no_grad():
        one_by_one = torch.cat([model(unit(torch.from_numpy(image[None]))) for image in images])
    torch.testing.assert_close(found, one_by_one, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_features_in_bf16_are_returned_in_fp32_and_close() -> None:
    model = network()
    images = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3)).astype(np.uint8)
    cpu = torch.device("cpu")
    full = extract(model, images, unit, batch_size=3, device=cpu)
    short = extract(model, images, unit, batch_size=3, device=cpu, precision=torch.bfloat16)
    assert short.dtype is torch.float32 and not torch.equal(short, full)
    torch.testing.assert_close(short, full, rtol=0.1, atol=0.05)


def test_images_are_prepared_in_fp32_whatever_the_precision() -> None:
    """Under autocast the products that resample small images would be rounded, and the jitter refuse them."""
    made = []

    def prepare(batch: Tensor) -> Tensor:
        images = unit(batch)
        made.append(images.flatten(2) @ torch.eye(64))
        return images

    images = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3)).astype(np.uint8)
    extract(network(), images, prepare, batch_size=3, device=torch.device("cpu"), precision=torch.bfloat16)
    assert {each.dtype for each in made} == {torch.float32}
