"""The small network of this project, for CPUs and small images."""

from __future__ import annotations

import inspect

from torch import nn

from moco.encoders import small_resnet
from moco.encoders.architecture import Architecture
from moco.encoders.small_resnet import SmallResNet

SMALL = "small_resnet"


def names() -> tuple[str, ...]:
    """Return its name."""
    return (SMALL,)


def build(architecture: Architecture, num_outputs: int) -> nn.Module:
    """Return the network; see Family."""
    pyramid = architecture.features == "pyramid"
    stride = _stride(architecture)
    return SmallResNet(num_outputs, architecture.width, architecture.stages, stride, pyramid, architecture.convolutions)


def source(architecture: Architecture, num_outputs: int) -> tuple[str, str]:
    """Return the text of SmallResNet with a get_model() that calls it; see Family."""
    text = inspect.getsource(small_resnet)
    text = text[text.index("from torch import Tensor, nn") :].split("\n", 1)[1].strip()
    arguments = f"{num_outputs}, {architecture.width}, {architecture.stages}, {_stride(architecture)}"
    arguments += ", pyramid=True" if architecture.features == "pyramid" else ""
    arguments += f", convolutions={architecture.convolutions}" if architecture.convolutions != 2 else ""
    return "import torch\nfrom torch import Tensor, nn\nfrom torchvision import transforms", (
        f"{text}\n\n\ndef get_model() -> nn.Module:\n    return SmallResNet({arguments})\n"
    )


def smallest(architecture: Architecture) -> int:
    """Return the side that the stages halve to one pixel; see Family."""
    return int(2 ** (architecture.stages + (architecture.stem == "imagenet")))


def stage(parameter: str) -> str:
    """Return the stem, each stage (all are one Sequential) or the last layer; see Family."""
    words = parameter.split(".")
    part = ".".join(words[:2]) if words[0] == "layers" else words[0]
    return "stem" if part in ("conv1", "bn1") else part


def _stride(architecture: Architecture) -> int:
    return 1 if architecture.stem == "small" else 2
