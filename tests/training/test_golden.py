"""Loss curves that were written down: whatever changes what is learned, in views, network, loss, queue, optimizer or
schedules, changes them. After a change on purpose, MOCO_WRITE_GOLDEN=1 writes them anew."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from conftest import tiny_params
from moco.data.batches import EpochSampler
from moco.data.generated import draw
from moco.methods.step import ContrastStep
from moco.settings import reading as params
from moco.views.views import Views, recipe

GOLDEN = Path(__file__).with_name("golden_losses.json")
CPU = torch.device("cpu")
EPOCHS, BATCH, SIZE, IMAGES = 4, 32, 32, 128
# Processors round in different ways, which grows with the steps; a changed setting shows in the first ones.
TOLERANCE = 0.005
VARIANTS: dict[str, dict[str, object]] = {
    "plain": {},
    "split, shuffled, symmetric": {"batch_norm": "split", "splits": 2, "shuffle": True, "loss": "symmetric"},
    "v1, steps": {"augmentation": "v1", "head": "linear", "temperature": 0.07, "schedule": "step", "milestones": [0.5]},
    "v2, cosine momentum, warm-up": {"augmentation": "v2", "momentum_schedule": "cosine", "warmup": 0.3},
}


def curve(folder: Path, changes: dict[str, object], precision: torch.dtype = torch.float32) -> list[float]:
    """The loss of every step of a small run on drawn images."""
    path = folder / "params.yaml"
    names = {"width": 8, "stages": 2, "queue": 96, "batch_size": BATCH, "lr": 0.2, "momentum": 0.9, **changes}
    path.write_text(yaml.safe_dump(tiny_params(**{f"pretrain__{name}": value for name, value in names.items()})))
    config = params.load(path).pretrain
    rng = np.random.default_rng(0)
    images = torch.from_numpy(draw(rng, rng.integers(0, 12, IMAGES), SIZE))
    made = Views(recipe(config.augmentation, (0.2, 1.0), (0.1, 2.0)), SIZE, (0.5,) * 3, (0.25,) * 3, CPU)
    step = ContrastStep(config, made, CPU, precision)
    sampler, losses = EpochSampler(np.arange(IMAGES), BATCH, config.seed), []
    total = EPOCHS * sampler.batches_per_epoch
    for epoch in range(EPOCHS):
        for indices in sampler.epoch(epoch):
            number = len(losses)
            losses.append(round(float(step(indices, images[indices], number / total, number)["loss"]), 5))
    return losses


@pytest.mark.parametrize("variant", VARIANTS)
def test_losses_are_those_written_down(variant: str, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    found = curve(tmp_path, VARIANTS[variant])
    golden = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    if os.environ.get("MOCO_WRITE_GOLDEN"):
        GOLDEN.write_text(json.dumps({**golden, variant: found}, indent=1) + "\n")
        golden[variant] = found
    assert found == pytest.approx(golden[variant], rel=TOLERANCE)


@pytest.mark.parametrize("stages", [2, 4])  # with four there are convolutions of a few pixels, which have their own way
def test_low_precision_learns_what_full_precision_learns(stages: int, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    full = curve(tmp_path, {"stages": stages})
    low = curve(tmp_path, {"stages": stages}, torch.bfloat16)
    assert low != full and low == pytest.approx(full, rel=0.01)


@pytest.mark.parametrize("change", [{"temperature": 0.19}, {"lr": 0.15}, {"momentum": 0.8}, {"queue": 64}])
def test_a_changed_setting_would_show(change: dict[str, object], tmp_path: Path) -> None:
    torch.set_num_threads(1)
    assert curve(tmp_path, change) != pytest.approx(json.loads(GOLDEN.read_text())["plain"], rel=TOLERANCE)
