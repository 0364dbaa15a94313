"""Steps in low precision train what they should, and leave out what overflows without a trace."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from moco.encoders.small_resnet import SmallResNet
from moco.settings.reading import load
from moco.training.optimizer import load_sgd, make_sgd
from moco.training.pool_batches import PoolBatches
from moco.training.supervised import SupervisedStep, Tuning
from moco.views.views import Views, recipe

CPU = torch.device("cpu")


@pytest.mark.parametrize("nesterov", [False, True])
def test_a_first_step_that_overflows_leaves_no_momentum(nesterov: bool) -> None:
    """The fused update gives out memory for it before it sees that the step is left out."""
    start, gradient = torch.rand(1000), torch.rand(1000)
    settings = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "nesterov": nesterov}
    weights, plain = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    optimizer = make_sgd([weights], CPU, torch.float16, **settings)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    right = torch.optim.SGD([plain], **settings)
    weights.grad = torch.full_like(weights, float("inf"))
    scaler.scale(torch.zeros(()))  # the scale is made with the first loss
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(weights, start)
    assert torch.equal(optimizer.state[weights]["momentum_buffer"], torch.zeros(1000))
    for _ in range(3):
        weights.grad, plain.grad = gradient * scaler.get_scale(), gradient.clone()
        scaler.step(optimizer)
        scaler.update()
        right.step()
    torch.testing.assert_close(weights, plain)


def test_a_state_of_before_the_fused_update_goes_on_in_fp16() -> None:
    weights = nn.Parameter(torch.ones(10))
    before = torch.optim.SGD([weights], lr=0.1, momentum=0.9)
    weights.grad = torch.ones(10)
    before.step()
    optimizer = make_sgd([weights], CPU, torch.float16, lr=0.1, momentum=0.9, weight_decay=0)
    load_sgd(optimizer, before.state_dict(), CPU)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    scaler.scale(torch.zeros(()))
    weights.grad = torch.full((10,), 2.0)
    scaler.step(optimizer)
    assert torch.allclose(weights, torch.full((10,), 1 - 0.1 - 0.19))


def test_other_precisions_begin_without_momentum() -> None:
    assert not make_sgd([nn.Parameter(torch.ones(3))], CPU, torch.bfloat16, lr=1, momentum=0.9, weight_decay=0).state


def test_every_weight_is_trained_with_the_pool_in_low_precision(project: Path) -> None:
    """Pseudo-labels are made without gradients, by the weights that are trained next: a trap in older torch."""
    section = load(project / "params.yaml").finetune
    network = SmallResNet(5, 4, 2)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            module.__class__ = nn.Conv2d  # as on a GPU
    images = np.random.default_rng(0).integers(0, 255, (12, 32, 32, 3)).astype(np.uint8)
    views = Views(recipe("crop", (0.5, 1.0), (0.1, 2.0)), 32, (0.5,) * 3, (0.3,) * 3, CPU)
    pool = PoolBatches(images, 8, 0, views, views, confidence=0.0)
    step = SupervisedStep(network, torch.arange(5), views, section, 4, CPU, torch.bfloat16, Tuning(), pool)
    before = {name: value.clone() for name, value in network.named_parameters()}
    step(np.arange(4), torch.from_numpy(images[:4]), 0.5, 0)
    assert [name for name, value in network.named_parameters() if torch.equal(value, before[name])] == []
