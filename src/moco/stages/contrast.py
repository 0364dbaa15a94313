"""One optimizer step of momentum contrast, and the state that a checkpoint needs of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from moco.config import PretrainConfig
from moco.data.batches import step_generator
from moco.data.views import Views
from moco.model.encoder import Architecture, build_encoder
from moco.model.momentum_contrast import MomentumContrast
from moco.model.split_batch_norm import use_split_batch_norm
from moco.training.numerics import autocast
from moco.training.schedules import key_momentum, lr_factor, scaled_lr


def build_model(config: PretrainConfig) -> MomentumContrast:
    """Weights are a function of config.seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        architecture = Architecture(config.encoder, config.stem, config.width, config.stages)
        encoder = build_encoder(architecture, num_outputs=1)
        if config.batch_norm == "split":
            use_split_batch_norm(encoder, config.splits)
        elif config.batch_norm == "sync":
            encoder = nn.SyncBatchNorm.convert_sync_batchnorm(encoder)
        return MomentumContrast(
            encoder,
            dim=config.dim,
            queue_length=config.queue,
            temperature=config.temperature,
            mlp=config.head == "mlp",
            symmetric=config.loss == "symmetric",
            shuffle=config.shuffle,
        )


class ContrastStep:
    """Callable for the loop. All randomness of a step is a function of the seed and the step's number.

    batch_size: images in a real batch, which a small set makes smaller than the configured one.
    """

    def __init__(
        self, config: PretrainConfig, views: Views, device: torch.device, precision: torch.dtype,
        batch_size: int | None = None,
    ) -> None:  # fmt: skip
        self.config, self.views, self.device, self.precision = config, views, device, precision
        self.model = build_model(config).to(device).to(memory_format=torch.channels_last)
        self.peak_lr = scaled_lr(config.lr, batch_size or config.batch_size)
        self.optimizer = torch.optim.SGD(
            self.model.query_encoder.parameters(),
            lr=self.peak_lr,
            momentum=config.sgd_momentum,
            weight_decay=config.weight_decay,
            fused=device.type in ("cpu", "cuda"),
        )
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision is torch.float16)

    def __call__(self, indices: np.ndarray, images: Tensor, fraction: float, number: int) -> dict[str, Any]:
        config = self.config
        generator = step_generator(config.seed, number)
        factor = lr_factor(config.schedule, fraction, config.warmup, config.milestones)
        for group in self.optimizer.param_groups:
            group["lr"] = self.peak_lr * factor
        momentum = key_momentum(config.momentum, config.momentum_schedule, fraction)
        self.model.train()
        unit = self.views.to_unit(images)
        a, b = self.views(unit, generator), self.views(unit, generator)
        with autocast(self.device, self.precision):
            contrast = self.model(a, b, generator)
        self.scaler.scale(contrast.loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.model.update(contrast.keys, momentum)
        return {
            "loss": contrast.loss.detach(),
            "contrast_accuracy": contrast.accuracy,
            "lr": self.peak_lr * factor,
            "key_momentum": momentum,
        }

    def state(self) -> dict[str, Any]:
        """Both encoders, queue, its cursor, optimizer and loss scale. Random numbers need no saving."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if state["scaler"]:  # empty where the state is from a device that needed no scaling
            self.scaler.load_state_dict(state["scaler"])
