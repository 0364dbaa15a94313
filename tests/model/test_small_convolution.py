"""Convolutions as matrix products give what convolutions give."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from moco.accel import small_convolution
from moco.accel.small_convolution import SmallConv2d, use_small_convolutions
from moco.encoders.architecture import Architecture
from moco.encoders.encoder import build_encoder


@pytest.mark.parametrize(("kernel", "size", "stride", "product"), [
    (1, (6, 6), 1, True), (1, (12, 12), 2, True), (1, (7, 5), 2, True), (1, (13, 12), 1, False),
    (3, (3, 3), 1, True), (3, (4, 4), 1, True), (3, (7, 7), 2, True), (3, (5, 2), 2, True), (3, (1, 1), 2, True),
    (3, (5, 4), 1, False), (3, (9, 9), 2, False),
])  # fmt: skip
@pytest.mark.parametrize("bias", [False, True])
def test_result_and_gradients_are_those_of_the_convolution(
    kernel: int, size: tuple[int, int], stride: int, product: bool, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(small_convolution, "_in_tiles", lambda _: True)
    plain = nn.Conv2d(8, 6, kernel, stride, kernel // 2, bias=bias).to(memory_format=torch.channels_last)
    small = use_small_convolutions(copy.deepcopy(plain))
    assert type(small) is SmallConv2d and small.state_dict().keys() == plain.state_dict().keys()
    convolved: list[object] = []
    forward = nn.Conv2d.forward
    monkeypatch.setattr(nn.Conv2d, "forward", lambda self, x: convolved.append(self) or forward(self, x))
    results = []
    for layer in (plain, small):
        x = torch.randn(4, 8, *size, generator=torch.Generator().manual_seed(1))
        x = x.to(memory_format=torch.channels_last).requires_grad_()
        out = layer(x)
        out.square().sum().backward()
        results.append([out, x.grad, *(p.grad for p in layer.parameters())])
    assert (small not in convolved) is product
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert results[1][0].is_contiguous(memory_format=torch.channels_last)


def test_other_memory_formats_are_left_to_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    small = use_small_convolutions(nn.Conv2d(4, 4, 1))
    monkeypatch.setattr(nn.Conv2d, "forward", lambda self, x: None)
    assert small(torch.zeros(2, 4, 3, 3)) is None


@pytest.mark.parametrize("layer", [
    nn.Conv2d(4, 4, 3, padding=1, groups=2), nn.Conv2d(4, 4, 3, padding=2, dilation=2), nn.Conv2d(4, 4, 3),
    nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), nn.Conv2d(4, 4, 7, padding=3), nn.Conv2d(4, 4, 1, (1, 2)),
])  # fmt: skip
def test_other_convolutions_stay_what_they_are(layer: nn.Conv2d) -> None:
    assert type(use_small_convolutions(layer)) is nn.Conv2d


def test_3x3_windows_are_products_where_there_are_tiles_for_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(1)
    for tiles in (True, False):
        monkeypatch.setattr(small_convolution, "has_bf16_tiles", lambda tiles=tiles: tiles)
        assert not small_convolution._in_tiles(x)
        assert small_convolution._in_tiles(x.bfloat16()) is tiles
        with torch.autocast("cpu", torch.bfloat16):
            assert small_convolution._in_tiles(x) is tiles


@pytest.mark.parametrize("name", ["small_resnet", "resnet18", "resnet50", "resnext50_32x4d"])
def test_whole_networks_compute_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In evaluation to the bit."""
    torch.manual_seed(0)
    monkeypatch.setattr(small_convolution, "_in_tiles", lambda _: True)
    network = build_encoder(Architecture(name, "imagenet", 4, 4), 3).to(memory_format=torch.channels_last)
    assert sum(type(layer) is SmallConv2d for layer in network.modules()) > 5
    plain = copy.deepcopy(network)
    for layer in plain.modules():
        if type(layer) is SmallConv2d:
            layer.__class__ = nn.Conv2d  # type: ignore[assignment]
    images = torch.randn(8, 3, 64, 64).to(memory_format=torch.channels_last)
    found, expected = network(images), plain(images)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert not torch.equal(found, expected), "products were made"
    plain.load_state_dict(network.state_dict())
    with torch.no_grad():
        assert torch.equal(network.eval()(images), plain.eval()(images))
