"""ReLU by the bits of bfloat16 gives what ReLU gives."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moco.accel.bf16_relu import Bf16ReLU, use_bf16_relu
from moco.encoders.architecture import Architecture
from moco.encoders.encoder import build_encoder


def every_number() -> Tensor:
    """All there are, infinities and NaNs of both signs among them."""
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)


def test_every_number_gives_the_same() -> None:
    found, expected = Bf16ReLU(inplace=True)(every_number()), F.relu(every_number())
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    assert found.isnan().sum() == 2 * 127


def test_gradients_are_the_same_in_any_memory_format() -> None:
    numbers = every_number()
    numbers = numbers[~numbers.isnan()]  # 0 there, as the loss is none either
    numbers = numbers[: len(numbers) // 120 * 120].view(-1, 4, 5, 6)
    upstream = torch.randn(numbers.shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    for memory in (torch.contiguous_format, torch.channels_last):
        results = []
        for layer in (nn.ReLU(inplace=True), Bf16ReLU(inplace=True)):
            x = numbers.clone(memory_format=memory).requires_grad_()
            out = layer(x.clone())
            out.backward(upstream)
            results.append((out, x.grad))
            assert out.is_contiguous(memory_format=memory)
        for theirs, ours in zip(*results, strict=True):
            assert torch.equal(theirs, ours)


def test_it_works_in_place_as_its_gradients_do() -> None:
    leaf = torch.tensor([1.0, -1.0]).bfloat16().requires_grad_()
    x = leaf * 1
    Bf16ReLU(inplace=True)(x)
    assert x.tolist() == [1, 0]
    x.sum().backward()
    assert leaf.grad is not None and leaf.grad.tolist() == [1, 0]


def test_it_keeps_its_input_where_it_is_told_to() -> None:
    x = torch.tensor([1.0, -1.0]).bfloat16()
    assert Bf16ReLU()(x).tolist() == [1, 0] and x.tolist() == [1, -1]


def test_other_types_are_left_to_the_library() -> None:
    x = torch.tensor([1.0, -1.0], requires_grad=True)
    out = Bf16ReLU(inplace=True)(x * 1)
    assert out.tolist() == [1, 0] and type(out.grad_fn).__name__ == "ReluBackward0"


def test_networks_compute_and_learn_the_same() -> None:
    torch.manual_seed(0)
    for name in ("small_resnet", "resnet50"):
        network = build_encoder(Architecture(name, "imagenet", 4, 3), 3).to(memory_format=torch.channels_last)
        assert sum(type(layer) is Bf16ReLU for layer in network.modules()) > 3
        plain = copy.deepcopy(network)
        for layer in plain.modules():
            if type(layer) is Bf16ReLU:
                layer.__class__ = nn.ReLU
        x = torch.randn(4, 3, 32, 32).to(memory_format=torch.channels_last)
        results = []
        for one in (plain, network):
            with torch.autocast("cpu", torch.bfloat16):
                out = one(x)
            out.float().square().sum().backward()
            results.append([out, *(p.grad for p in one.parameters())])
        for theirs, ours in zip(*results, strict=True):
            assert torch.equal(theirs, ours)


def test_relus_that_keep_their_input_stay_what_they_are() -> None:
    assert type(use_bf16_relu(nn.ReLU())) is nn.ReLU
