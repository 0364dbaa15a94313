"""Build encoders by name, and what all of them have: features, and a last layer `fc` that can be taken off."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor, nn

from moco.accel.small_convolution import use_small_convolutions
from moco.encoders.architecture import Architecture
from moco.encoders.families import family
from moco.encoders.small_resnet import SmallResNet


def build_encoder(architecture: Architecture, num_outputs: int) -> nn.Module:
    """Return a network with random weights whose last layer is `fc`: N x 3 x H x W -> N x `num_outputs`."""
    return use_small_convolutions(family(architecture.name).build(architecture, num_outputs))  # sooner on CPUs


def feature_width(network: nn.Module) -> int:
    """Return the width of what enters the last layer."""
    head = network.get_submodule("fc")
    return next(module for module in head.modules() if isinstance(module, nn.Linear)).in_features


def last_width(network: nn.Module) -> int:
    """Return the width of the last stage, whose features stand last among those that enter the last layer."""
    return network.last_width if isinstance(network, SmallResNet) else feature_width(network)


def strip_head(network: nn.Module) -> nn.Module:
    """Remove the last layer in place and return the network, which then returns features: N x width."""
    network.fc = nn.Identity()
    return network


def body_weights(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the entries of a state dict that do not belong to the last layer, cloned and contiguous."""
    return {
        name: value.detach().cpu().contiguous().clone() for name, value in state.items() if not name.startswith("fc.")
    }


def load_body(network: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Load all weights but those of the last layer.

    Raises ValueError unless exactly the last layer's keys are missing.
    """
    missing, unexpected = network.load_state_dict(weights, strict=False)
    expected = sorted(name for name in network.state_dict() if name.startswith("fc."))
    if sorted(missing) != expected or unexpected:
        raise ValueError(
            f"encoder weights do not fit: missing {sorted(set(missing) - set(expected))[:5]}, "
            f"unexpected {sorted(unexpected)[:5]}"
        )


def batch_norms(network: nn.Module) -> Iterator[tuple[nn.Module, str, nn.BatchNorm2d]]:
    """Yield (parent, attribute name, layer) of every two-dimensional BatchNorm."""
    for parent in network.modules():
        for name, child in parent.named_children():
            if isinstance(child, nn.BatchNorm2d):
                yield parent, name, child
