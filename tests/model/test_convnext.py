"""A ConvNeXt of torchvision through all stages: what the seam for encoders promises."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from conftest import Moco, assert_one_line_error, write_params
from moco.encoders.architecture import Architecture
from moco.encoders.encoder import build_encoder, feature_width
from moco.encoders.families import encoders, family
from moco.exchange.known_submission import is_known

NAME = "convnext_tiny"


def test_it_is_known_beside_the_others() -> None:
    assert {"small_resnet", "resnet50", NAME} <= set(encoders())


@pytest.mark.parametrize(("stem", "size"), [("small", 16), ("imagenet", 32)])
def test_the_network_is_torchvisions_with_its_last_layer_apart(stem: str, size: int) -> None:
    network = build_encoder(Architecture(NAME, stem, 1, 1), 7).eval()
    assert feature_width(network) == 768
    assert family(NAME).smallest(Architecture(NAME, stem, 1, 1)) == size
    assert network(torch.zeros(2, 3, size, size)).shape == (2, 7)
    parts = list(dict.fromkeys(family(NAME).stage(name) for name, _ in network.named_parameters()))
    assert parts == [*(f"stage {number}" for number in range(5)), "norm", "last"]


@pytest.mark.slow
def test_it_goes_through_all_stages(moco: Moco, project: Path) -> None:
    write_params(
        project, pretrain__encoder=NAME, pretrain__stem="small", pretrain__epochs=1, finetune__epochs=1,
        finetune__layer_decay=0.7,
    )  # fmt: skip
    for stage in ("data", "pretrain", "train", "finetune", "eval", "report"):
        done = moco(stage)
        assert done.returncode == 0, done.stderr
    assert "val_accuracy" in json.loads((project / "reports/eval/metrics.json").read_text())
    assert is_known(project / "models/classifier/submission.py")
    # Without this project: the file and torchvision alone.
    code = (
        "import sys, torch; sys.path.insert(0, '.'); sys.modules['moco'] = None; import submission\n"
        "model = submission.get_model()\n"
        "model.load_state_dict(torch.load('model_sub.pth', weights_only=True))\n"
        "print(tuple(model.eval()(torch.zeros(2, 3, 24, 24)).shape))"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=project / "models/classifier", capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "(2, 5)", done.stderr


def test_images_that_its_stages_would_leave_nothing_of_are_refused(moco: Moco, project: Path) -> None:
    write_params(project, pretrain__encoder=NAME, pretrain__stem="imagenet", data__resize=24)
    assert moco("data").returncode == 0
    assert_one_line_error(moco("pretrain"), "pretrain.encoder", "32 pixels", "24", "E-PRETRAIN-VIEW-SIZE")
