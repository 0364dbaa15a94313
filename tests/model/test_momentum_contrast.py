"""Momentum contrast against a float64 reference written from the papers' equations."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from moco.encoders.small_resnet import SmallResNet
from moco.encoders.split_batch_norm import use_split_batch_norm
from moco.methods.momentum_contrast import MomentumContrast, info_nce

LR, SGD_MOMENTUM, DECAY, KEY_MOMENTUM, TEMPERATURE = 0.05, 0.9, 1e-3, 0.9, 0.2
# The implementation computes logits in float32, all else here in float64.
CLOSE = {"rtol": 1e-4, "atol": 1e-6}


@pytest.fixture(autouse=True)
def one_thread(few_threads: None) -> None:
    """Tensors this small lose time with more."""
    torch.set_num_threads(1)


def make_model(
    dim: int = 3, queue: int = 8, *, splits: int = 1, mlp: bool = True, symmetric: bool = False, shuffle: bool = False
) -> MomentumContrast:
    torch.manual_seed(1)
    encoder = use_split_batch_norm(SmallResNet(1, width=2, stages=1), splits)
    return MomentumContrast(
        encoder, dim=dim, queue_length=queue, temperature=TEMPERATURE, mlp=mlp, symmetric=symmetric, shuffle=shuffle
    )


def images(batch: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.rand(2, batch, 3, 8, 8, generator=generator, dtype=torch.float64).unbind(0)
    return a, b


class Reference:
    """Explicit sums, one parameter at a time, the queue as a list of rows (oldest first)."""

    def __init__(self, model: MomentumContrast, splits: int, mlp: bool) -> None:
        self.splits, self.symmetric, self.shuffle = splits, model.symmetric, model.shuffle
        dim = model.queue.shape[1]
        self.query, self.key = self.network(dim, mlp), self.network(dim, mlp)
        self.query.load_state_dict(model.query_encoder.state_dict())
        self.key.load_state_dict(model.key_encoder.state_dict())
        self.queue = [row.clone().double() for row in model.queue]
        self.velocity = {name: torch.zeros_like(p) for name, p in self.query.named_parameters()}

    @staticmethod
    def network(dim: int, mlp: bool) -> nn.Module:
        network = SmallResNet(1, width=2, stages=1)  # plain BatchNorm
        width = 4
        network.fc = nn.Linear(width, dim)  # type: ignore[assignment]
        if mlp:
            network.fc = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, dim))  # type: ignore[assignment]
        return network.double()

    def embed(self, network: nn.Module, x: Tensor) -> Tensor:
        """As `splits` GPUs would: every part of the batch alone."""
        y = torch.cat([network(part) for part in x.tensor_split(self.splits)])
        return y / y.pow(2).sum(1, keepdim=True).sqrt()

    def keys(self, x: Tensor, generator: torch.Generator) -> Tensor:
        with torch.no_grad():
            if not self.shuffle:
                return self.embed(self.key, x)
            order = torch.randperm(len(x), generator=generator).tolist()
            mixed = self.embed(self.key, torch.stack([x[i] for i in order]))
            restored: list[Tensor] = [mixed[0]] * len(x)
            for place, i in enumerate(order):
                restored[i] = mixed[place]
            return torch.stack(restored)

    def one_way(self, x: Tensor, keys: Tensor) -> tuple[Tensor, float]:
        total, hits = torch.zeros((), dtype=torch.float64), 0
        queue = torch.stack(self.queue)
        for query, key in zip(self.embed(self.query, x), keys, strict=True):
            positive = (query * key).sum() / TEMPERATURE
            negatives = (queue * query).sum(1) / TEMPERATURE
            total = total - torch.log(positive.exp() / (positive.exp() + negatives.exp().sum()))
            hits += bool((positive >= negatives).all())
        return total / len(x), hits / len(x)

    def step(self, a: Tensor, b: Tensor, generator: torch.Generator) -> tuple[float, float, dict[str, Tensor]]:
        fresh = self.keys(b, generator)
        loss, accuracy = self.one_way(a, fresh)
        if self.symmetric:
            other = self.keys(a, generator)
            loss_b, accuracy_b = self.one_way(b, other)
            loss, accuracy = (loss + loss_b) / 2, (accuracy + accuracy_b) / 2
            fresh = torch.cat([fresh, other])
        names = [name for name, _ in self.query.named_parameters()]
        gradients = dict(zip(names, torch.autograd.grad(loss, list(self.query.parameters())), strict=True))
        with torch.no_grad():
            keys = dict(self.key.named_parameters())
            for name, weight in self.query.named_parameters():
                self.velocity[name] = SGD_MOMENTUM * self.velocity[name] + gradients[name] + DECAY * weight
                weight.copy_(weight - LR * self.velocity[name])
                keys[name].copy_(KEY_MOMENTUM * keys[name] + (1 - KEY_MOMENTUM) * weight)
        for row in fresh:
            self.queue.append(row)
            self.queue.pop(0)
        return loss.item(), accuracy, gradients


def oldest_first(model: MomentumContrast) -> Tensor:
    return torch.roll(model.queue, -int(model.cursor), 0)


@pytest.mark.parametrize("mlp", [True, False], ids=["mlp", "linear"])
@pytest.mark.parametrize("shuffle", [True, False], ids=["shuffle", "ordered"])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("splits", [1, 2, 4])
@pytest.mark.parametrize(
    ("batch", "dim", "queue"), [(8, 3, 16), (9, 4, 20), (10, 3, 6)], ids=["divides", "uneven", "batch-above-queue"]
)
def test_three_steps_equal_the_papers_equations(
    batch: int, dim: int, queue: int, splits: int, symmetric: bool, shuffle: bool, mlp: bool
) -> None:
    model = make_model(dim, queue, splits=splits, mlp=mlp, symmetric=symmetric, shuffle=shuffle).double()
    model.queue = model.queue.float()
    reference = Reference(model, splits, mlp)
    optimizer = torch.optim.SGD(
        model.query_encoder.parameters(), lr=LR, momentum=SGD_MOMENTUM, weight_decay=DECAY
    )  # fmt: skip
    for number in range(3):
        a, b = images(batch, number)
        contrast = model(a, b, torch.Generator().manual_seed(number))
        optimizer.zero_grad()
        contrast.loss.backward()
        loss, accuracy, gradients = reference.step(a, b, torch.Generator().manual_seed(number))
        assert contrast.loss.item() == pytest.approx(loss, rel=1e-5)
        assert contrast.accuracy.item() == pytest.approx(accuracy)
        for name, parameter in model.query_encoder.named_parameters():
            torch.testing.assert_close(parameter.grad, gradients[name], **CLOSE, msg=lambda m, n=name: f"{n}: {m}")
        optimizer.step()
        model.update(contrast.keys, KEY_MOMENTUM)
        torch.testing.assert_close(oldest_first(model).double(), torch.stack(reference.queue), **CLOSE)
    for name, weight in model.key_encoder.named_parameters():
        torch.testing.assert_close(weight, dict(reference.key.named_parameters())[name], **CLOSE)


def test_loss_and_accuracy_of_a_case_worked_out_by_hand() -> None:
    queries = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    keys = torch.tensor([[1.0, 0.0], [1.0, 0.0]])  # similarities 1 and 0
    queue = torch.tensor([[0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]])  # (0, -1, 0) and (1, 0, -1)
    loss, accuracy = info_nce(queries, keys, queue, temperature=0.5)
    first = -2 + math.log(math.exp(2) + 1 + math.exp(-2) + 1)
    second = -0 + math.log(1 + math.exp(2) + 1 + math.exp(-2))
    assert loss.item() == pytest.approx((first + second) / 2, rel=1e-6)
    assert accuracy.item() == 0.5


def train(model: MomentumContrast, batches: list[int]) -> None:
    optimizer = torch.optim.SGD(model.query_encoder.parameters(), lr=LR)
    for number, batch in enumerate(batches):
        a, b = (x.float() for x in images(batch, number))
        contrast = model(a, b, torch.Generator().manual_seed(number))
        contrast.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        model.update(contrast.keys, KEY_MOMENTUM)


def test_a_positive_no_nearer_than_the_nearest_negative_is_not_picked() -> None:
    query = torch.tensor([[1.0, 0.0]])
    near, nearer = torch.tensor([[0.5, 0.0], [0.0, 1.0]]), torch.tensor([[0.5, 0.0], [0.75, 0.0]])
    found = [info_nce(query, torch.tensor([[0.5, 0.0]]), queue, 0.5)[1].item() for queue in (near, nearer)]
    assert found == [0.0, 0.0]
    far = torch.tensor([[0.4999, 0.0]])
    assert info_nce(query, torch.tensor([[0.5, 0.0]]), far, 0.5)[1].item() == 1.0
    assert info_nce(query * torch.nan, torch.tensor([[0.5, 0.0]]), near, 0.5)[1].item() == 0, "a broken one is not"


def test_queue_and_key_encoder_change_in_place_and_never_get_a_gradient() -> None:
    """Fault 3."""
    model = make_model(symmetric=True, shuffle=True)
    tensors = {"queue": model.queue, "cursor": model.cursor, **dict(model.key_encoder.named_parameters())}
    before = {name: (tensor.data_ptr(), tensor.detach().clone()) for name, tensor in tensors.items()}
    train(model, [4, 4, 4])
    after = {"queue": model.queue, "cursor": model.cursor, **dict(model.key_encoder.named_parameters())}
    for name, tensor in after.items():
        assert tensor.data_ptr() == before[name][0], f"{name} was bound to new memory"
        assert tensor is tensors[name]
        assert tensor.grad is None and not tensor.requires_grad, name
    assert not torch.equal(model.queue, before["queue"][1])
    assert not torch.equal(tensors["conv1.weight"], before["conv1.weight"][1])


def test_forward_and_backward_change_neither_queue_nor_key_weights() -> None:
    model = make_model()
    queue = model.queue.clone()
    weights = [p.clone() for p in model.key_encoder.parameters()]
    a, b = (x.float() for x in images(4, 0))
    contrast = model(a, b)
    contrast.loss.backward()
    assert torch.equal(model.queue, queue) and int(model.cursor) == 0
    assert all(torch.equal(p, w) for p, w in zip(model.key_encoder.parameters(), weights, strict=True))
    assert not contrast.keys.requires_grad


def test_key_encoder_starts_as_a_copy_that_shares_no_memory() -> None:
    model = make_model()
    for query, key in zip(model.query_encoder.parameters(), model.key_encoder.parameters(), strict=True):
        assert torch.equal(query, key) and query.data_ptr() != key.data_ptr()
    lengths = model.queue.norm(dim=1)
    torch.testing.assert_close(lengths, torch.ones_like(lengths))


def test_shuffling_is_undone_exactly() -> None:
    model = make_model(dim=5)
    train(model, [6])  # running statistics that are not those of a fresh network
    model.eval()
    x = images(7, 3)[0].float()
    ordered = model.encode_keys(x, None)
    model.shuffle = True
    for seed in range(5):
        shuffled = model.encode_keys(x, torch.Generator().manual_seed(seed))
        torch.testing.assert_close(shuffled, ordered, rtol=0, atol=1e-6)


def test_shuffling_changes_which_images_share_split_statistics() -> None:
    model = make_model(dim=5, splits=2).train()
    x = images(8, 3)[0].float()
    ordered = model.encode_keys(x, None)
    model.shuffle = True
    shuffled = model.encode_keys(x, torch.Generator().manual_seed(0))
    assert (shuffled - ordered).abs().max() > 1e-3
    again = model.encode_keys(x, torch.Generator().manual_seed(0))
    torch.testing.assert_close(again, shuffled, rtol=0, atol=1e-6)


@pytest.mark.parametrize("queue", [1, 5, 8, 16])
def test_partial_batches_of_any_size_pass_through_the_ring(queue: int) -> None:
    """Fault 4."""
    model = make_model(dim=2, queue=queue)
    expected = list(model.queue.clone())
    address = model.queue.data_ptr()
    for number, batch in enumerate([8, 8, 3, 1, 20, 2]):
        keys = torch.full((batch, 2), float(number)) + torch.arange(batch)[:, None] / 100
        model.enqueue(keys)
        expected = (expected + list(keys))[-queue:]
        assert torch.equal(oldest_first(model), torch.stack(expected))
        assert 0 <= int(model.cursor) < queue
    assert model.queue.data_ptr() == address


def test_a_smaller_last_batch_trains() -> None:
    model = make_model(queue=10, splits=2, symmetric=True, shuffle=True)
    train(model, [8, 8, 3])
    assert torch.isfinite(model.queue).all()
    assert int(model.cursor) == 6  # both batches of 16 keys filled the ring of 10; then 6 keys came


def test_momentum_of_one_freezes_and_of_zero_copies() -> None:
    model = make_model()
    with torch.no_grad():
        for parameter in model.query_encoder.parameters():
            parameter.add_(1)
    before = [p.clone() for p in model.key_encoder.parameters()]
    model.update(model.queue[:2].clone(), 1.0)
    assert all(torch.equal(p, w) for p, w in zip(model.key_encoder.parameters(), before, strict=True))
    model.update(model.queue[:2].clone(), 0.0)
    pairs = zip(model.key_encoder.parameters(), model.query_encoder.parameters(), strict=True)
    assert all(torch.equal(key, query) for key, query in pairs)
