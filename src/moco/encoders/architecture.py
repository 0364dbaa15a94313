"""What is needed to build an encoder again."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Architecture:
    """All that is needed to build an encoder again.

    name: of the encoder, in one of the families (see moco.encoders.families).
    stem: `imagenet`, for images above some 64 pixels, or `small`, which halves their sides less often.
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
        """Return the fields by name."""
        return asdict(self)


def with_features(architecture: Architecture, features: str) -> Architecture:
    """Return the architecture of a classifier that sees these features (`last` or `pyramid`).

    The encoder's weights are the same for both.
    """
    return replace(architecture, features=features)
