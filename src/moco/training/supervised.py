"""Supervised training of a whole network, from scratch (`baseline`) or from a classifier (`finetune`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moco.data.batches import EpochSampler, Fetcher, step_generator
from moco.settings.supervised import SupervisedConfig
from moco.training import features
from moco.training.interrupt import watch_signals
from moco.training.loop import Hooks, Length, Log, LoopState, run_loop
from moco.training.numerics import autocast
from moco.training.optimizer import load_training_state, make_sgd, training_state
from moco.training.pool_batches import PoolBatches, pseudo_label_loss
from moco.training.progress import ProgressDisplay
from moco.training.schedules import lr_factor, scaled_lr
from moco.views.views import Views

BATCH = 256  # images, when measuring


def _first_word(parameter: str) -> str:
    return parameter.split(".", maxsplit=1)[0]


@dataclass(frozen=True)
class Tuning:
    """What fine-tuning does beside plain supervised training.

    layer_decay: each stage's learning rate as a fraction of that of the stage after it. label_smoothing: fraction of
    the target that goes to all classes alike. mixup: alpha (arXiv 1710.09412), 0 for none. frozen_norms: BatchNorm
    keeps its running statistics and normalises with them. stage_of: see `layer_groups`.
    """

    layer_decay: float = 1.0
    label_smoothing: float = 0.0
    mixup: float = 0.0
    frozen_norms: bool = False
    stage_of: Callable[[str], str] = _first_word


def layer_groups(network: nn.Module, decay: float, stage: Callable[[str], str]) -> list[dict[str, Any]]:
    """Return the optimizer's parameter groups: the stem, each stage, the last layer; `scale` of their learning rates.

    stage: which of them a parameter belongs to, by its name.
    """
    if decay == 1:
        return [{"params": list(network.parameters()), "scale": 1.0}]
    parts: dict[str, list[nn.Parameter]] = {}
    for name, parameter in network.named_parameters():
        parts.setdefault(stage(name), []).append(parameter)
    last = len(parts) - 1
    return [{"params": each, "scale": decay ** (last - depth)} for depth, each in enumerate(parts.values())]


class SupervisedStep:
    """Callable for the loop: cross-entropy on random crops of labelled images.

    Every step puts the network into training mode, whatever an evaluation left behind: BatchNorm normalises with the
    statistics of the batch and moves its running ones, which evaluation then uses. labels: N int64, of all images
    that the loop's indices can name. pool: images without labels, which are trained on as well.
    """

    def __init__(
        self, network: nn.Module, labels: Tensor, views: Views, section: SupervisedConfig,
        batch_size: int, device: torch.device, precision: torch.dtype, tuning: Tuning = Tuning(),
        pool: PoolBatches | None = None,
    ) -> None:  # fmt: skip
        self.pool = pool
        self.network = network.to(device).to(memory_format=torch.channels_last)
        self.labels, self.views, self.section = labels, views, section
        self.device, self.precision, self.tuning = device, precision, tuning
        self.peak_lr = scaled_lr(section.lr, batch_size)
        self.optimizer = make_sgd(
            layer_groups(network, tuning.layer_decay, tuning.stage_of), device, precision, lr=self.peak_lr,
            momentum=section.sgd_momentum, weight_decay=section.weight_decay, nesterov=section.sgd_momentum > 0,
        )  # fmt: skip
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision is torch.float16)
        from_pool = 0 if pool is None else pool.sampler.batch_size
        self.images_per_step = batch_size + from_pool  # each counted once; one of the pool has two views
        self.views_per_step = batch_size + 2 * from_pool

    def __call__(self, indices: np.ndarray, images: Tensor, fraction: float, number: int) -> dict[str, Any]:
        """Take one optimizer step on a batch of images and return its metrics.

        indices: of the images, by which their labels are found. images: B x H x W x 3 uint8. fraction: progress of the
        run in [0, 1]. number: of the step.
        """
        section = self.section
        factor = lr_factor(section.schedule, fraction, section.warmup, section.milestones)
        for group in self.optimizer.param_groups:
            group["lr"] = self.peak_lr * factor * group.get("scale", 1.0)  # not in older states
        generator = step_generator(section.seed, number)
        self.network.train()
        if self.tuning.frozen_norms:
            for module in self.network.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
        batch = self.views(self.views.to_unit(images), generator)
        targets = self._targets(indices)
        if self.tuning.mixup:
            share = np.random.default_rng((section.seed, number)).beta(self.tuning.mixup, self.tuning.mixup)
            other = torch.randperm(len(batch), generator=generator).to(self.device)
            batch, targets = torch.lerp(batch[other], batch, share), torch.lerp(targets[other], targets, share)
        loss, more = self._loss(batch, targets, number, generator)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return {"loss": loss.detach(), "lr": self.peak_lr * factor, **more}

    def _loss(
        self, batch: Tensor, targets: Tensor, number: int, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss, and what else there is to log."""
        if self.pool is None:
            with autocast(self.device, self.precision):
                return F.cross_entropy(self.network(batch), targets), {}
        weak, strong = self.pool.views(number, generator)
        # In a context of its own: until it ends, older versions of torch (2.6 is one) keep the weights in low precision
        # that a pass without gradients made, and one with gradients would train none of them.
        with autocast(self.device, self.precision):
            labels, sure = self.pool.targets(self.network, weak)
        with autocast(self.device, self.precision):
            known, unknown = self.network(torch.cat([batch, strong])).tensor_split([len(batch)])
            loss = F.cross_entropy(known, targets) + pseudo_label_loss(unknown, labels, sure)
        return loss, {"pool_share": sure.mean()}

    def _targets(self, indices: np.ndarray) -> Tensor:
        """Return labels B, or, where they are smoothed or mixed, fractions of the classes, B x C."""
        labels, tuning = self.labels[indices].to(self.device), self.tuning
        if not tuning.mixup and not tuning.label_smoothing:
            return labels
        classes = self.network.fc.out_features  # type: ignore[union-attr]
        shares = F.one_hot(labels, classes).float()  # type: ignore[arg-type]
        return shares.lerp(torch.full_like(shares, 1 / shares.shape[1]), tuning.label_smoothing)

    def state(self) -> dict[str, Any]:
        """Return network, optimizer and loss scale. Random numbers need no saving."""
        return {"network": self.network.state_dict(), **training_state(self.optimizer, self.scaler)}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore what `state` returned."""
        self.network.load_state_dict(state["network"])
        load_training_state(self.optimizer, self.scaler, state, self.device)

    def accuracy(self, images: np.ndarray, labels: np.ndarray) -> float:
        """Return the fraction of correct predictions; see `correct`."""
        return float(self.correct(images, labels).mean())

    def correct(self, images: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Return which predictions are right, M booleans, in evaluation mode and fp32.

        images: M x H x W x 3 uint8; labels: M int64.
        """
        outputs = features.extract(self.network, images, self.views.plain, batch_size=BATCH, device=self.device)
        correct: np.ndarray = outputs.argmax(1).numpy() == labels
        return correct


def train_supervised(
    name: str, step: SupervisedStep, images: np.ndarray, sampler: EpochSampler, state: LoopState, log: Log,
    monitor: Callable[[], dict[str, float]] | None = None, save: Callable[[LoopState], None] | None = None,
    save_every: int = 1,
) -> None:  # fmt: skip
    """Run the loop from `state` to its end, with a log line, and `monitor`, after every epoch.

    Raises Interrupted after a signal, with the state saved where `save` is given, and UserError for divergence.
    """
    length = Length(step.section.epochs, step.section.minutes)
    with watch_signals() as stop, ProgressDisplay(name) as display:
        hooks = Hooks(
            log, sampler.batches_per_epoch, display, stop, monitor, 1, save, save_every, images=step.images_per_step
        )
        run_loop(step, sampler, Fetcher(images, pin=step.device.type == "cuda"), length, state, hooks)
