"""Features that a linear classifier is trained on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from conftest import write_params
from moco.data.cache import DecodedSplit
from moco.encoders.architecture import Architecture
from moco.encoders.encoder import build_encoder, strip_head
from moco.settings import reading as params
from moco.stages import train
from moco.training.features import extract
from moco.views.views import Views, recipe

CPU = torch.device("cpu")


def test_images_as_they_are_keep_fp32_and_random_views_take_the_precision(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = strip_head(build_encoder(Architecture("small_resnet", "small", 8, 2), 3))
    images = np.random.default_rng(0).integers(0, 256, (20, 16, 16, 3), np.uint8)
    split = DecodedSplit(images, np.zeros(20, np.int64), np.empty((0, 16), np.uint8))
    views = Views(recipe("crop", (0.5, 1.0), (0.1, 2.0)), 16, (0.5,) * 3, (0.25,) * 3, CPU)
    write_params(tmp_path, train__views=3)
    section = params.load(tmp_path / "params.yaml").train
    found = {}
    for precision in (torch.float32, torch.bfloat16):
        found[precision] = train.feature_sets(network, [split, split], views, section, CPU, precision)
    full, short = found[torch.float32], found[torch.bfloat16]
    assert full.shape == (3, 40, 32)
    plain = extract(network, images, views.plain, batch_size=train.FEATURE_BATCH, device=CPU)
    for stack in (full, short):
        assert torch.equal(stack[0], torch.cat([plain, plain]))
    torch.testing.assert_close(short[1:], full[1:], rtol=0.05, atol=0.02)
    assert not torch.equal(short[1:], full[1:]) and not torch.equal(full[1], full[2])


def test_pretraining_in_fp16_on_a_gpu_does_not_keep_a_processor_from_training(tmp_path: Path) -> None:
    found = {}
    for precision in ("auto", "fp16", "bf16", "fp32"):
        write_params(tmp_path, pretrain__precision=precision)
        found[precision] = train.views_precision(params.load(tmp_path / "params.yaml"), CPU)
    assert found["fp16"] is found["auto"]
    assert (found["bf16"], found["fp32"]) == (torch.bfloat16, torch.float32)
