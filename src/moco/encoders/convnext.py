"""Torchvision's ConvNeXts (arXiv 2201.03545): no BatchNorm, so that splits and shuffled keys change nothing."""

from __future__ import annotations

import inspect

from torch import nn

from moco.encoders import head_apart
from moco.encoders.architecture import Architecture
from moco.encoders.head_apart import HeadApart


def names() -> tuple[str, ...]:
    """Return the names that torchvision gives them."""
    import torchvision.models

    return tuple(torchvision.models.list_models(module=torchvision.models, include="convnext*"))


def build(architecture: Architecture, num_outputs: int) -> nn.Module:
    """Return the network; see Family.

    Without stochastic depth, whose random numbers would be no function of the step. The stem cuts the image into
    patches of 4 pixels, the small one of 2.
    """
    import torchvision.models

    body: nn.Module = torchvision.models.get_model(architecture.name, weights=None, stochastic_depth_prob=0.0)
    if architecture.stem == "small":
        patches = body.get_submodule("features.0")
        first = patches.get_submodule("0")
        patches.register_module("0", nn.Conv2d(3, first.out_channels, 2, stride=2))  # type: ignore[arg-type]
    width: int = body.get_submodule("classifier.2").in_features  # type: ignore[assignment]
    body.get_submodule("classifier").register_module("2", nn.Identity())
    return HeadApart(body, width, num_outputs)


def source(architecture: Architecture, num_outputs: int) -> tuple[str, str]:
    """Return the text of HeadApart with a get_model() that asks torchvision for the body; see Family."""
    text = inspect.getsource(head_apart)
    text = text[text.index("class HeadApart") :].strip()
    lines = [f"    body = models.{architecture.name}(weights=None)"]
    if architecture.stem == "small":
        lines.append("    body.features[0][0] = nn.Conv2d(3, body.features[0][0].out_channels, 2, stride=2)")
    lines += ["    width = body.classifier[2].in_features", "    body.classifier[2] = nn.Identity()"]
    lines.append(f"    return HeadApart(body, width, {num_outputs})")
    definition = "\n".join([f"{text}\n\n\ndef get_model() -> nn.Module:", *lines]) + "\n"
    return "from torch import Tensor, nn\nfrom torchvision import models, transforms", definition


def smallest(architecture: Architecture) -> int:
    """Return the side that the patches and three halvings leave one pixel of; see Family."""
    return 16 if architecture.stem == "small" else 32


def stage(parameter: str) -> str:
    """Return the stem, each stage with the layer before it, or the last layer; see Family."""
    words = parameter.split(".")  # body.features.NUMBER..., of which odd ones are stages
    if words[:2] != ["body", "features"]:
        return "last" if words[0] == "fc" else "norm"
    number = int(words[2])
    return f"stage {number // 2 + (number > 0)}"
