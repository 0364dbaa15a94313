"""The encoder that section `pretrain` asks for, checked against the images."""

from __future__ import annotations

from moco.data.manifest import Manifest
from moco.encoders.architecture import Architecture
from moco.encoders.families import encoders, family
from moco.encoders.own import SMALL
from moco.errors import UserError
from moco.settings.pretrain import PretrainConfig
from moco.settings.reading import nearest
from moco.training.schedules import view_size

DEEP = 4  # stages from which on a network is watched through its pyramid


def chosen_architecture(section: PretrainConfig, manifest: Manifest) -> Architecture:
    """Return the architecture that section `pretrain` asks for, checked against the images.

    Raises UserError for an unknown encoder, and for images that it cannot take.
    """
    if section.encoder != SMALL and section.encoder not in (known := encoders()):
        raise UserError(
            f"pretrain.encoder: '{section.encoder}' is not known{nearest(section.encoder, known)}; "
            f"known: {', '.join(known)}"
        )
    if manifest.height != manifest.width:
        raise UserError(f"images are {manifest.width}x{manifest.height}; set data.resize so that they become square")
    chosen = described(section)
    smallest = min(view_size(manifest.height, (share,), (), 0) for share in section.resolutions)
    if smallest < (needed := family(section.encoder).smallest(chosen)):
        own = section.encoder == SMALL
        raise UserError(
            f"pretrain.{'stages' if own else 'encoder'}: {section.encoder} as it is set needs views of {needed} "
            f"pixels, the smallest are of {smallest}; use {'fewer, or ' if own else ''}larger images (data.resize)",
            "E-PRETRAIN-VIEW-SIZE",
        )
    return chosen


def described(section: PretrainConfig) -> Architecture:
    """Return the architecture that section `pretrain` asks for, unchecked."""
    # Contrast acts on the last stage alone, and train.features says what classifiers see. These are the features whose
    # kNN accuracy is watched while pretraining runs. They also decide which random numbers the first weights get, and
    # thereby the encoders of the presets to the bit.
    watched = "pyramid" if section.stages >= DEEP else "last"
    return Architecture(section.encoder, section.stem, section.width, section.stages, watched, section.convolutions)
