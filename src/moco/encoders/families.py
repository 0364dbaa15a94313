"""Families of encoders. To add one: write a module with these functions beside this one, and name it in FAMILIES."""

from __future__ import annotations

from typing import Protocol, cast

from torch import nn

from moco.encoders import convnext, own, resnet
from moco.encoders.architecture import Architecture


class Family(Protocol):
    """A module of encoders that are built alike."""

    def names(self) -> tuple[str, ...]:
        """Return the names of its encoders."""

    def build(self, architecture: Architecture, num_outputs: int) -> nn.Module:
        """Return a network with random weights whose last layer is `fc`: N x 3 x H x W -> N x `num_outputs`."""

    def source(self, architecture: Architecture, num_outputs: int) -> tuple[str, str]:
        """Return Python text that builds the same network without this project.

        The text is in two parts: imports, and a definition of get_model() with what it needs.
        """

    def smallest(self, architecture: Architecture) -> int:
        """Return the side of the smallest images that the encoder takes, in pixels."""

    def stage(self, parameter: str) -> str:
        """Return which part of the network a parameter belongs to, by the parameter's name.

        In fine-tuning each part has its own learning rate. The order of the parts is that in which they first come.
        """


FAMILIES = tuple(cast(Family, module) for module in (own, resnet, convnext))  # own first: it needs no torchvision


def encoders() -> tuple[str, ...]:
    """Return the names of all encoders. Imports torchvision, which takes seconds."""
    return tuple(name for family in FAMILIES for name in family.names())


def family(name: str) -> Family:
    """Return the family of an encoder. Raises ValueError for a name that none has."""
    for each in FAMILIES:
        if name in each.names():
            return each
    raise ValueError(f"{name}: no family of encoders has it")
