"""Writes `submission.py`: the one file that a scorer needs beside `model_sub.pth`.

The scorer's contract (the course's own, 2021): the module has `get_model()`, `eval_transform`, `team_id`,
`team_name` and `email_address`; `model_sub.pth` is a bare state dict for what `get_model()` returns.
"""

from __future__ import annotations

import inspect

from moco.data import as_seen
from moco.data.manifest import Manifest
from moco.encoders.architecture import Architecture
from moco.encoders.families import family
from moco.settings.eval import EvalConfig

HEADER = '''"""A classifier, complete with model_sub.pth beside it; needs torch, torchvision, numpy and Pillow.

    model = get_model(); model.load_state_dict(torch.load("model_sub.pth", weights_only=True)); model.eval()
    logits = model(eval_transform(image).unsqueeze(0))   # image: PIL, as opened from its file
"""
'''


def _as_seen_source() -> str:
    """Return the source of the function that turns an opened file into the picture that a person sees.

    The training images were read in the same way.
    """
    text = inspect.getsource(as_seen)
    return text[text.index("# EXIF") :].strip()


def render(architecture: Architecture, manifest: Manifest, config: EvalConfig) -> str:
    """Return the text of submission.py for one architecture, data set and team."""
    imports, model = family(architecture.name).source(architecture, len(manifest.classes))
    steps = ["as_seen"]
    if manifest.resize is not None:
        steps += [f"transforms.Resize({manifest.resize})", f"transforms.CenterCrop({manifest.resize})"]
    steps += ["transforms.ToTensor()", f"transforms.Normalize({manifest.mean!r}, {manifest.std!r})"]
    transform = "".join(f"        {step},\n" for step in steps)
    return (
        f"{HEADER}\nfrom __future__ import annotations\n\nimport numpy as np\nfrom PIL import Image\n{imports}\n\n"
        f"team_id = {config.team_id}\nteam_name = {config.team_name!r}\n"
        f"email_address = {config.email_address!r}\n"
        f"architecture = {architecture.as_dict()!r}\n"
        f"class_names = {manifest.classes!r}\n\n{_as_seen_source()}\n\n\n"
        f"eval_transform = transforms.Compose(\n    [\n{transform}    ]\n)\n\n\n{model}"
    )
