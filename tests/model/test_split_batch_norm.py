"""Split BatchNorm: as several GPUs with plain BatchNorm, with weights that fit everywhere."""

from __future__ import annotations

import copy

import pytest
import torch
import torchvision.models
from torch import Tensor, nn

from moco.encoders import split_batch_norm
from moco.encoders.architecture import Architecture
from moco.encoders.encoder import build_encoder
from moco.encoders.small_resnet import SmallResNet
from moco.encoders.split_batch_norm import SplitBatchNorm2d, use_split_batch_norm

CHANNELS = 3


pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning")


@pytest.fixture(autouse=True)
def one_thread(few_threads: None) -> None:
    """Tensors this small lose time with more."""
    torch.set_num_threads(1)


def layers(splits: int, momentum: float | None = 0.1) -> tuple[nn.BatchNorm2d, nn.BatchNorm2d]:
    """(plain, split) with the same weights and statistics, none of them at its start value."""
    torch.manual_seed(0)
    plain = nn.BatchNorm2d(CHANNELS, momentum=momentum)
    with torch.no_grad():
        plain.weight.uniform_(0.5, 2)
        plain.bias.uniform_(-1, 1)
        assert plain.running_mean is not None and plain.running_var is not None
        plain.running_mean.uniform_(-1, 1)
        plain.running_var.uniform_(0.5, 2)
    holder = use_split_batch_norm(nn.Sequential(copy.deepcopy(plain)), splits)
    assert isinstance(holder[0], nn.BatchNorm2d)
    return plain, holder[0]


def batch(size: int, seed: int = 0) -> Tensor:
    """Images whose statistics differ from one to the next."""
    x = torch.randn(size, CHANNELS, 5, 4, generator=torch.Generator().manual_seed(seed))
    return x * (1 + torch.arange(size)[:, None, None, None]) + torch.arange(size)[:, None, None, None]


def run_parts(plain: nn.BatchNorm2d, x: Tensor, parts: list[int]) -> tuple[Tensor, list[nn.BatchNorm2d]]:
    """Each part through a plain layer of its own; gradients gather in `plain`."""
    outputs, used, first = [], [], 0
    for size in parts:
        layer = copy.deepcopy(plain)
        layer.weight, layer.bias = plain.weight, plain.bias
        outputs.append(layer(x[first : first + size]))
        used.append(layer)
        first += size
    return torch.cat(outputs), used


@pytest.fixture(params=[False, True], ids=["PyTorch's", "own kernels"])
def calls(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[int] | None:
    """None, or the parts of each call of the kernels, which Triton's interpreter then runs as if on a GPU."""
    if not request.param:
        return None
    module = pytest.importorskip("moco.accel.batch_norm_kernels", reason="triton comes with PyTorch for GPUs alone")
    made: list[int] = []

    def counted(*args: Tensor, parts: int, **options: float) -> Tensor:
        made.append(parts)
        found: Tensor = module.batch_norm(*args, parts=parts, **options)
        return found

    monkeypatch.setattr(split_batch_norm, "on_gpu", lambda x: True)
    monkeypatch.setattr(split_batch_norm, "kernels", lambda: counted)
    return made


def layout(calls: list[int] | None) -> torch.memory_format:
    """The kernels take channels-last images alone."""
    return torch.contiguous_format if calls is None else torch.channels_last


EVEN_AND_UNEVEN = [
    (8, 2, [4, 4]), (8, 4, [2, 2, 2, 2]), (9, 2, [5, 4]), (11, 4, [3, 3, 3, 2]), (6, 1, [6]),
    (5, 4, [3, 2]), (3, 2, [3]), (4, 100, [2, 2]),
]  # fmt: skip


@pytest.mark.parametrize(("size", "splits", "parts"), EVEN_AND_UNEVEN)
def test_equals_plain_batch_norm_on_every_part(
    size: int, splits: int, parts: list[int], calls: list[int] | None
) -> None:
    plain, split = layers(splits)
    x = batch(size).requires_grad_()
    y = batch(size).to(memory_format=layout(calls)).requires_grad_()
    expected, used = run_parts(plain, x, parts)
    found = split(y)
    assert calls in (None, [len(parts)] if len(set(parts)) == 1 else []), "equal parts only"
    # The kernels add up in another order than PyTorch, which does as each part alone.
    torch.testing.assert_close(found, expected, **({} if calls is None else {"rtol": 1e-5, "atol": 1e-5}))
    weigh = torch.randn(found.shape, generator=torch.Generator().manual_seed(9))
    (expected * weigh).sum().backward()
    (found * weigh).sum().backward()
    torch.testing.assert_close(y.grad, x.grad)
    torch.testing.assert_close(split.weight.grad, plain.weight.grad)
    torch.testing.assert_close(split.bias.grad, plain.bias.grad)
    for name in ("running_mean", "running_var"):
        mean = torch.stack([getattr(layer, name) for layer in used]).mean(0)
        torch.testing.assert_close(getattr(split, name), mean)


def test_parts_do_not_see_each_other() -> None:
    _, split = layers(2)
    x = batch(8)
    other = x.clone()
    other[4:] *= 100
    torch.testing.assert_close(split(x)[:4], split(other)[:4])
    plain, _ = layers(1)
    assert not torch.allclose(plain(x)[:4], plain(other)[:4], atol=0.1)


@pytest.mark.parametrize("momentum", [0.1, 0.7, 0.0, None])
def test_running_statistics_over_several_batches_follow_the_mean_of_the_parts(
    momentum: float | None, calls: list[int] | None
) -> None:
    plain, split = layers(2, momentum)
    assert plain.running_mean is not None and plain.running_var is not None
    expected_mean, expected_var = plain.running_mean.clone(), plain.running_var.clone()
    for number in range(3):
        x = batch(6, number)
        split(x.to(memory_format=layout(calls)))
        share = 1 / (number + 1) if momentum is None else momentum
        means = torch.stack([part.mean((0, 2, 3)) for part in (x[:3], x[3:])]).mean(0)
        variances = torch.stack([part.var((0, 2, 3)) for part in (x[:3], x[3:])]).mean(0)  # unbiased
        expected_mean = (1 - share) * expected_mean + share * means
        expected_var = (1 - share) * expected_var + share * variances
        torch.testing.assert_close(split.running_mean, expected_mean)
        torch.testing.assert_close(split.running_var, expected_var)
    assert int(split.num_batches_tracked) == 3  # type: ignore[arg-type]
    assert calls in (None, [] if momentum is None else [2, 2, 2])


def test_evaluation_is_plain_batch_norm_and_changes_no_statistics() -> None:
    plain, split = layers(2)
    x = batch(7)
    before = {name: value.clone() for name, value in split.state_dict().items()}
    assert torch.equal(split.eval()(x), plain.eval()(x))
    assert all(torch.equal(value, before[name]) for name, value in split.state_dict().items())


@pytest.mark.parametrize("size", [8, 9])
def test_channels_last_gives_the_same_and_stays_so(size: int) -> None:
    _, split = layers(2)
    _, again = layers(2)
    x, y = batch(size).requires_grad_(), batch(size).to(memory_format=torch.channels_last).requires_grad_()
    flat, last = split(x), again(y)
    assert last.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(last.contiguous(), flat)
    flat.pow(3).sum().backward()
    last.pow(3).sum().backward()
    assert y.grad is not None and x.grad is not None
    torch.testing.assert_close(y.grad.contiguous(), x.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(again.running_var, split.running_var)


@pytest.mark.parametrize("name", ["small_resnet", "resnet18"])
def test_weights_load_strictly_into_the_plain_network(name: str) -> None:
    torch.manual_seed(0)
    split = use_split_batch_norm(build_encoder(Architecture(name, "imagenet", 4, 2), 6), 2)
    kinds = {type(module) for module in split.modules() if isinstance(module, nn.BatchNorm2d)}
    assert kinds == {SplitBatchNorm2d}, "every BatchNorm is a split one"
    with torch.no_grad():
        split(torch.randn(4, 3, 32, 32))
    if name == "small_resnet":
        plain: nn.Module = SmallResNet(6, width=4, stages=2, stem_stride=2)
    else:
        plain = torchvision.models.get_model(name, weights=None, num_classes=6)
    plain.load_state_dict(split.state_dict(), strict=True)
    assert {k: v.shape for k, v in plain.state_dict().items()} == {k: v.shape for k, v in split.state_dict().items()}
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(plain.eval()(x), split.eval()(x))


def test_one_split_is_plain_batch_norm_to_the_bit() -> None:
    plain, split = layers(1)
    assert torch.equal(plain(batch(5)), split(batch(5)))
    assert all(torch.equal(a, b) for a, b in zip(plain.buffers(), split.buffers(), strict=True))


def test_a_deep_copy_keeps_the_splits_but_not_the_memory() -> None:
    _, split = layers(2)
    twin = copy.deepcopy(split)
    x = batch(8)
    assert torch.equal(twin(x), split(x))
    assert twin.running_mean is not None and split.running_mean is not None
    assert twin.running_mean.data_ptr() != split.running_mean.data_ptr()


def test_a_layer_is_made_by_its_own_name() -> None:
    images = torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    made, given = SplitBatchNorm2d(3, splits=2, momentum=0.2), nn.BatchNorm2d(3, momentum=0.2)
    replaced = use_split_batch_norm(nn.Sequential(given), 2)
    assert torch.equal(made(images), replaced(images))
    assert torch.equal(made.running_var, given.running_var), "the layer that was replaced shares its tensors"
    assert torch.equal(SplitBatchNorm2d(3)(images), nn.BatchNorm2d(3)(images))
