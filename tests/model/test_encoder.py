"""Encoders by name, their heads, and moving a body from one to another."""

from __future__ import annotations

import pytest
import torch
import torchvision.models
from torch import Tensor, nn

from moco.encoders.architecture import Architecture
from moco.encoders.encoder import (
    batch_norms,
    body_weights,
    build_encoder,
    feature_width,
    last_width,
    load_body,
    strip_head,
)
from moco.encoders.families import encoders
from moco.encoders.small_resnet import SmallResNet
from moco.methods.projection import with_head


@pytest.fixture(autouse=True)
def one_thread(few_threads: None) -> None:
    """Tensors this small lose time with more."""
    torch.set_num_threads(1)


WIDTHS = {  # all others: 2048
    "small_resnet": 16, "resnet18": 512, "resnet34": 512, "convnext_tiny": 768, "convnext_small": 768,
    "convnext_base": 1024, "convnext_large": 1536,
}  # fmt: skip


def small(outputs: int = 5, stem: str = "small", width: int = 4, stages: int = 2) -> nn.Module:
    return build_encoder(Architecture("small_resnet", stem, width, stages), outputs)


def shape_at(network: nn.Module, layer: str, x: Tensor) -> tuple[int, ...]:
    """Shape of what a layer puts out for x."""
    seen: list[tuple[int, ...]] = []
    handle = network.get_submodule(layer).register_forward_hook(lambda m, i, output: seen.append(tuple(output.shape)))
    with torch.no_grad():
        network(x)
    handle.remove()
    return seen[0]


def test_every_resnet_of_torchvision_is_offered() -> None:
    first, *offered = encoders()
    assert first == "small_resnet"
    for name in ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnext50_32x4d", "wide_resnet50_2"):
        assert name in offered
    assert not [name for name in offered if not hasattr(torchvision.models, name)]
    assert not [name for name in offered if "quantized" in name or "fcn" in name or "deeplab" in name]


@pytest.mark.parametrize(
    ("name", "stem"),
    [*((name, "imagenet") for name in encoders()), ("small_resnet", "small"), ("resnet34", "small")],
)
def test_maps_images_to_outputs_and_knows_its_width(name: str, stem: str) -> None:
    """On torch's `meta` device, which computes shapes alone: the big ones cost nothing."""
    with torch.device("meta"):
        network = build_encoder(Architecture(name, stem, 4, 2), 7)
        x = torch.empty(3, 3, 40, 40)
        assert network.get_submodule("fc").weight.shape == (7, WIDTHS.get(name, 2048))
        assert feature_width(network) == WIDTHS.get(name, 2048)
        assert strip_head(network)(x).shape == (3, WIDTHS.get(name, 2048))


@pytest.mark.parametrize("stem", ["imagenet", "small"])
@pytest.mark.parametrize("name", ["small_resnet", "resnet18", "resnet50"])
def test_really_computes_finite_outputs_that_depend_on_the_image(name: str, stem: str) -> None:
    torch.manual_seed(0)
    network = build_encoder(Architecture(name, stem, 4, 2), 4).train()
    with torch.no_grad():
        y = network(torch.randn(3, 3, 16, 16))
    assert y.shape == (3, 4) and torch.isfinite(y).all()
    assert (y[0] - y[1]).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("stem", "stem_edge", "last_edge"), [("imagenet", 16, 4), ("small", 32, 8)], ids=["imagenet", "small"]
)
def test_small_resnet_halves_in_every_stage(stem: str, stem_edge: int, last_edge: int) -> None:
    network = small(stem=stem)
    x = torch.randn(2, 3, 32, 32)
    assert shape_at(network, "bn1", x) == (2, 4, stem_edge, stem_edge)
    assert shape_at(network, "layers.0", x) == (2, 8, stem_edge // 2, stem_edge // 2)
    assert shape_at(network, "layers.1", x) == (2, 16, last_edge, last_edge)


@pytest.mark.parametrize(("stem", "edge"), [("imagenet", 8), ("small", 32)])
def test_stem_of_a_torchvision_resnet_sets_the_resolution_of_its_first_block(stem: str, edge: int) -> None:
    network = build_encoder(Architecture("resnet18", stem, 1, 1), 2)
    assert shape_at(network, "maxpool", torch.randn(2, 3, 32, 32)) == (2, 64, edge, edge)
    size = (3, 3) if stem == "small" else (7, 7)
    assert network.get_submodule("conv1").weight.shape == (64, 3, *size)


def test_imagenet_stem_is_exactly_torchvisions_network() -> None:
    torch.manual_seed(3)
    ours = build_encoder(Architecture("resnet18", "imagenet", 1, 1), 5)
    torch.manual_seed(3)
    theirs = torchvision.models.resnet18(weights=None, num_classes=5)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name


@pytest.mark.parametrize("mlp", [True, False])
def test_projection_head_has_the_papers_layers(mlp: bool) -> None:
    network = with_head(small(), dim=6, mlp=mlp)
    kinds = [type(module) for module in network.get_submodule("fc").modules() if not list(module.children())]
    assert kinds == ([nn.Linear, nn.ReLU, nn.Linear] if mlp else [nn.Linear])
    assert feature_width(network) == 16
    assert network(torch.randn(2, 3, 16, 16)).shape == (2, 6)
    shapes = [tuple(p.shape) for p in network.get_submodule("fc").parameters() if p.dim() == 2]
    assert shapes == ([(16, 16), (6, 16)] if mlp else [(6, 16)])


def test_one_convolution_a_stage_is_the_block_without_its_second() -> None:
    torch.manual_seed(0)
    network = build_encoder(Architecture("small_resnet", "small", 4, 1, convolutions=1), 2).eval()
    x, block = torch.randn(2, 3, 8, 8), network.get_submodule("layers.0")
    for _, _, norm in batch_norms(network):
        nn.init.uniform_(norm.running_mean)
        nn.init.uniform_(norm.running_var, 0.5, 2)
    assert sum(isinstance(module, nn.Conv2d) for module in block.modules()) == 2  # with the shortcut's
    stem = nn.functional.avg_pool2d(torch.relu(network.bn1(network.conv1(x))), 2)
    expected = torch.relu(block.bn1(block.conv1(stem)) + block.bn_shortcut(block.shortcut(stem)))
    torch.testing.assert_close(strip_head(network)(x), expected.mean((2, 3)))


@pytest.mark.parametrize("size", [16, 22, 40])
def test_pyramid_adds_the_quarters_of_the_stages_between(size: int) -> None:
    network = build_encoder(Architecture("small_resnet", "small", 3, 4, "pyramid"), 5).eval()
    x = torch.randn(2, 3, size, size)
    seen: list[torch.Tensor] = []
    for layer in network.get_submodule("layers").children():
        layer.register_forward_hook(lambda m, i, output: seen.append(output))
    features = strip_head(network)(x)
    expected = [nn.functional.adaptive_avg_pool2d(stage, 2).flatten(1) for stage in seen[1:3]]
    torch.testing.assert_close(features, torch.cat([*expected, seen[3].mean((2, 3))], 1))
    assert features.shape == (2, 4 * 12 + 4 * 24 + 48)


@pytest.mark.parametrize("mlp", [True, False])
def test_contrast_sees_the_last_stage_of_a_pyramid_alone(mlp: bool) -> None:
    def encoder(features: str) -> nn.Module:
        torch.manual_seed(0)
        return with_head(build_encoder(Architecture("small_resnet", "small", 4, 3, features), 1), dim=6, mlp=mlp)

    torch.manual_seed(1)
    pyramid, last, x = encoder("pyramid"), encoder("last"), torch.randn(4, 3, 16, 16)
    load_body(last, body_weights(pyramid.state_dict()))
    for theirs, ours in zip(
        last.get_submodule("fc").parameters(), pyramid.get_submodule("fc").parameters(), strict=True
    ):
        theirs.data.copy_(ours.data)
    torch.testing.assert_close(pyramid(x), last(x), rtol=0, atol=0)
    assert last_width(pyramid) == last_width(last) == 32
    body = strip_head(pyramid)
    assert last_width(body) == 32
    assert body(x).shape == (4, 32), "in training, no step goes into what nothing is learnt from"
    assert body.eval()(x).shape == (4, 32 + 4 * 16), "classifiers and monitoring see all"
    supervised = build_encoder(Architecture("small_resnet", "small", 4, 3, "pyramid"), 5)
    assert strip_head(supervised)(x).shape == (4, 32 + 4 * 16), "and learn through it"


def test_stripped_network_returns_what_entered_the_head() -> None:
    network = small().eval()
    x = torch.randn(2, 3, 16, 16)
    logits = network(x)
    head = network.get_submodule("fc")
    features = strip_head(network)(x)
    torch.testing.assert_close(head(features), logits)
    assert not [name for name in network.state_dict() if name.startswith("fc")]


def test_body_weights_are_all_but_the_head_and_independent_of_the_network() -> None:
    network = small().to(memory_format=torch.channels_last)
    body = body_weights(network.state_dict())
    assert set(body) == {name for name in network.state_dict() if not name.startswith("fc.")}
    assert len(network.state_dict()) - len(body) == 2
    assert all(value.is_contiguous() and not value.requires_grad for value in body.values())
    before = {name: value.clone() for name, value in body.items()}
    with torch.no_grad():
        for value in network.state_dict().values():
            value.add_(1)
    assert all(torch.equal(value, before[name]) for name, value in body.items())


@pytest.mark.parametrize("outputs", [5, 9])
def test_body_moves_to_a_network_with_another_head(outputs: int) -> None:
    torch.manual_seed(0)
    pretrained = with_head(small(), dim=6, mlp=True)
    pretrained(torch.randn(4, 3, 16, 16))  # moves the running statistics
    other = small(outputs)
    head = other.get_parameter("fc.weight").clone()
    load_body(other, body_weights(pretrained.state_dict()))
    assert torch.equal(other.get_parameter("fc.weight"), head)
    x = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(strip_head(other).eval()(x), strip_head(pretrained).eval()(x), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["conv1.weight", "layers.1.bn2.running_var"])
def test_a_missing_key_is_refused_and_named(name: str) -> None:
    body = body_weights(small().state_dict())
    del body[name]
    with pytest.raises(ValueError, match=name):
        load_body(small(), body)


def test_an_unexpected_key_is_refused_and_named() -> None:
    body = body_weights(small().state_dict())
    with pytest.raises(ValueError, match=r"layers\.7\.oops"):
        load_body(small(), {**body, "layers.7.oops": torch.zeros(1)})


def test_a_body_that_brings_a_head_is_refused() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        load_body(small(), small().state_dict())


def test_batch_norms_finds_every_layer_where_it_sits() -> None:
    network = SmallResNet(2, width=4, stages=2)
    found = list(batch_norms(network))
    assert len(found) == 1 + 2 * 3
    assert all(getattr(parent, name) is layer for parent, name, layer in found)


def test_a_description_of_before_there_was_a_choice_is_that_of_then() -> None:
    old = Architecture(**{"name": "small_resnet", "stem": "small", "width": 4, "stages": 3})
    network = build_encoder(old, 2)
    assert feature_width(network) == 32
    assert sum(isinstance(module, nn.Conv2d) for module in network.modules()) == 1 + 3 * 3
