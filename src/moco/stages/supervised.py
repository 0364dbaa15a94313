"""Supervised training of a whole network, from scratch (`baseline`) or from a classifier (`finetune`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moco.config import SupervisedConfig
from moco.data.batches import EpochSampler, Fetcher, step_generator
from moco.data.views import Views
from moco.training import features
from moco.training.interrupt import watch_signals
from moco.training.loop import Hooks, Length, Log, LoopState, run_loop
from moco.training.numerics import autocast
from moco.training.progress import ProgressDisplay
from moco.training.schedules import lr_factor, scaled_lr

BATCH = 256  # images, when measuring


class SupervisedStep:
    """Callable for the loop: cross-entropy on random crops of labelled images.

    Every step puts the network into training mode, whatever an evaluation left behind: BatchNorm normalises with the
    statistics of the batch and moves its running ones, which evaluation then uses. labels: N int64, of all images
    that the loop's indices can name.
    """

    def __init__(
        self, network: nn.Module, labels: Tensor, views: Views, section: SupervisedConfig,
        batch_size: int, device: torch.device, precision: torch.dtype,
    ) -> None:  # fmt: skip
        self.network = network.to(device).to(memory_format=torch.channels_last)
        self.labels, self.views, self.section = labels, views, section
        self.device, self.precision = device, precision
        self.peak_lr = scaled_lr(section.lr, batch_size)
        self.optimizer = torch.optim.SGD(
            network.parameters(), lr=self.peak_lr, momentum=section.sgd_momentum, weight_decay=section.weight_decay,
            nesterov=section.sgd_momentum > 0,
        )  # fmt: skip
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision is torch.float16)

    def __call__(self, indices: np.ndarray, images: Tensor, fraction: float, number: int) -> dict[str, Any]:
        section = self.section
        factor = lr_factor(section.schedule, fraction, section.warmup, section.milestones)
        for group in self.optimizer.param_groups:
            group["lr"] = self.peak_lr * factor
        generator = step_generator(section.seed, number)
        self.network.train()
        batch = self.views(self.views.to_unit(images), generator)
        with autocast(self.device, self.precision):
            loss = F.cross_entropy(self.network(batch), self.labels[indices].to(self.device))
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return {"loss": loss.detach(), "lr": self.peak_lr * factor}

    def state(self) -> dict[str, Any]:
        """Network, optimizer and loss scale. Random numbers need no saving."""
        return {
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Takes up what `state` returned."""
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        if state["scaler"]:  # empty where the state is from a device that needed no scaling
            self.scaler.load_state_dict(state["scaler"])

    def accuracy(self, images: np.ndarray, labels: np.ndarray) -> float:
        """Share of correct predictions, in evaluation mode and fp32. images: M x H x W x 3 uint8; labels: M int64."""
        outputs = features.extract(self.network, images, self.views.plain, batch_size=BATCH, device=self.device)
        return float((outputs.argmax(1) == torch.from_numpy(labels)).float().mean())


def train_supervised(
    name: str, step: SupervisedStep, images: np.ndarray, sampler: EpochSampler, state: LoopState, log: Log,
    monitor: Callable[[], dict[str, float]] | None = None, save: Callable[[LoopState], None] | None = None,
    save_every: int = 1,
) -> None:  # fmt: skip
    """Runs the loop from `state` to its end, with a log line, and `monitor`, after every epoch.

    Raises Interrupted after a signal, with the state saved where `save` is given; UserError for divergence.
    """
    length = Length(step.section.epochs, step.section.minutes)
    with watch_signals() as stop, ProgressDisplay(name) as display:
        hooks = Hooks(log, sampler.batches_per_epoch, display, stop, monitor, 1, save, save_every)
        run_loop(step, sampler, Fetcher(images, pin=step.device.type == "cuda"), length, state, hooks)
