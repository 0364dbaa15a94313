"""Torchvision's ResNets, ResNeXts and wide ResNets (arXiv 1512.03385)."""

from __future__ import annotations

from torch import nn

from moco.encoders.architecture import Architecture

SMALL_STEM = (  # for images below some 64 pixels: stride 1, no pooling
    "    model.conv1 = nn.Conv2d(3, 64, 3, stride=1, padding=1, bias=False)",
    "    model.maxpool = nn.Identity()",
)


def names() -> tuple[str, ...]:
    """Return the names that torchvision gives them."""
    import torchvision.models

    known = torchvision.models.list_models(module=torchvision.models)
    return tuple(name for name in known if name.startswith(("resnet", "resnext", "wide_resnet")))


def build(architecture: Architecture, num_outputs: int) -> nn.Module:
    """Return the network; see Family.

    A zero-initialised last BatchNorm of each block (Goyal et al. 2017) is not used by MoCo; neither here.
    """
    import torchvision.models

    network: nn.Module = torchvision.models.get_model(architecture.name, weights=None, num_classes=num_outputs)
    if architecture.stem == "small":
        network.conv1 = nn.Conv2d(3, 64, 3, stride=1, padding=1, bias=False)
        nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
        network.maxpool = nn.Identity()
    return network


def source(architecture: Architecture, num_outputs: int) -> tuple[str, str]:
    """Return a get_model() that asks torchvision; see Family."""
    body = [f"    model = models.{architecture.name}(weights=None, num_classes={num_outputs})"]
    body += SMALL_STEM if architecture.stem == "small" else ()
    definition = "\n".join(["def get_model() -> nn.Module:", *body, "    return model"]) + "\n"
    return "from torch import nn\nfrom torchvision import models, transforms", definition


def smallest(architecture: Architecture) -> int:
    """Return one pixel, as every convolution is padded; see Family."""
    return 1


def stage(parameter: str) -> str:
    """Return the stem, each of the four stages, or the last layer; see Family."""
    part = parameter.split(".", maxsplit=1)[0]
    return "stem" if part in ("conv1", "bn1") else part
