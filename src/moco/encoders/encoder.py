"""Builds encoders by name: every ResNet of torchvision, and the small one of this package."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import Tensor, nn

from moco.accel.bf16_relu import use_bf16_relu
from moco.accel.small_convolution import use_small_convolutions
from moco.encoders.small_resnet import SmallResNet

SMALL = "small_resnet"


@dataclass(frozen=True)
class Architecture:
    """All that is needed to build an encoder again.

    name: `small_resnet` or one of torchvision's ResNets.
    stem: `imagenet` (7x7 stride 2 and max pooling; for small_resnet 3x3 stride 2) or `small` (3x3 stride 1).
    width, stages, convolutions (a stage), features: used by small_resnet alone. features: `last` (`width * 2**stages`
    wide) or `pyramid` (what classifiers see of the stages before the last beside it; see SmallResNet).
    """

    name: str
    stem: str
    width: int
    stages: int
    features: str = "last"  # files of before there was a choice do not tell; nor the next
    convolutions: int = 2

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def with_features(architecture: Architecture, features: str) -> Architecture:
    """Return the architecture of a classifier that sees these features (`last` or `pyramid`): the encoder's weights are
    the same for both."""
    return replace(architecture, features=features)


def encoders() -> tuple[str, ...]:
    """Names of all. Imports torchvision, which takes seconds; the small one does without."""
    import torchvision.models

    known = torchvision.models.list_models(module=torchvision.models)
    return (SMALL, *(name for name in known if name.startswith(("resnet", "resnext", "wide_resnet"))))


def build_encoder(architecture: Architecture, num_outputs: int) -> nn.Module:
    """A network with randomly set weights whose last layer is `fc`: N x 3 x H x W -> N x `num_outputs`."""
    small_stem = architecture.stem == "small"
    if architecture.name == SMALL:
        stride, pyramid = 1 if small_stem else 2, architecture.features == "pyramid"
        small = SmallResNet(
            num_outputs, architecture.width, architecture.stages, stride, pyramid, architecture.convolutions
        )
        return _quick(small)
    import torchvision.models

    # A zero-initialised last BatchNorm of each block (Goyal et al. 2017) is not used by MoCo; neither here.
    network: nn.Module = torchvision.models.get_model(architecture.name, weights=None, num_classes=num_outputs)
    if small_stem:
        network.conv1 = nn.Conv2d(3, 64, 3, stride=1, padding=1, bias=False)
        nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
        network.maxpool = nn.Identity()
    return _quick(network)


def _quick(network: nn.Module) -> nn.Module:
    """With layers of ours that compute the same sooner on CPUs."""
    return use_bf16_relu(use_small_convolutions(network))


def feature_width(network: nn.Module) -> int:
    """Width of what enters the last layer."""
    head = network.get_submodule("fc")
    return next(module for module in head.modules() if isinstance(module, nn.Linear)).in_features


def last_width(network: nn.Module) -> int:
    """Width of the last stage, whose features stand last among those that enter the last layer."""
    return network.last_width if isinstance(network, SmallResNet) else feature_width(network)


def strip_head(network: nn.Module) -> nn.Module:
    """Replaces the last layer in place, so that the network returns features: N x width."""
    network.fc = nn.Identity()
    return network


def body_weights(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The entries of a state dict that do not belong to the last layer, cloned and contiguous."""
    return {
        name: value.detach().cpu().contiguous().clone() for name, value in state.items() if not name.startswith("fc.")
    }


def load_body(network: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Loads all but the last layer; raises ValueError unless exactly the last layer's keys are missing."""
    missing, unexpected = network.load_state_dict(weights, strict=False)
    expected = sorted(name for name in network.state_dict() if name.startswith("fc."))
    if sorted(missing) != expected or unexpected:
        raise ValueError(
            f"encoder weights do not fit: missing {sorted(set(missing) - set(expected))[:5]}, "
            f"unexpected {sorted(unexpected)[:5]}"
        )


def batch_norms(network: nn.Module) -> Iterator[tuple[nn.Module, str, nn.BatchNorm2d]]:
    """(parent, attribute name, layer) of every two-dimensional BatchNorm."""
    for parent in network.modules():
        for name, child in parent.named_children():
            if isinstance(child, nn.BatchNorm2d):
                yield parent, name, child
