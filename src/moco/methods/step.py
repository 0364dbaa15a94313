"""One optimizer step of self-supervision, whatever the method: what goes into it, and the state that a checkpoint needs
of it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from moco.accel.cuda_graphs import GraphedEncoder, GraphedViews
from moco.data.batches import step_generator
from moco.data.manifest import Manifest
from moco.encoders.encoder import build_encoder
from moco.encoders.split_batch_norm import kernels, use_split_batch_norm
from moco.methods.method import Method, methods
from moco.settings.pretrain import PretrainConfig
from moco.training.architecture import described
from moco.training.distributed import SINGLE_PROCESS, Average, DistributedContext
from moco.training.numerics import autocast
from moco.training.optimizer import load_training_state, make_sgd, training_state
from moco.training.schedules import key_momentum, lr_factor, scaled_lr, view_size
from moco.views.views import Views, recipe


def pretraining_views(section: PretrainConfig, manifest: Manifest, device: torch.device) -> Views:
    """Return the random views that section `pretrain` asks for, at the size of the images."""
    chosen = recipe(section.augmentation, section.crop_scale, section.blur_sigma)
    return Views(chosen, manifest.height, manifest.mean, manifest.std, device)


def pool(count: int, section: PretrainConfig) -> np.ndarray:
    """Return the indices of the unlabelled images in use: all, or a random fraction of them."""
    if section.subset == 1:
        return np.arange(count)
    size = max(2, round(section.subset * count))
    return np.sort(np.random.default_rng(section.seed).permutation(count)[:size])


def build_model(
    config: PretrainConfig, processes: DistributedContext = SINGLE_PROCESS, own_kernels: bool = True
) -> Method:
    """Return the method with random weights, which are a function of config.seed.

    BatchNorm in several processes: `plain` takes its statistics over each process's own images, which is what shuffling
    the keys is for (He et al. 2020, section 3.3); `split` takes them over config.splits parts of the whole batch, of
    which each process has its share; `sync` takes them over all images of all processes.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        encoder = build_encoder(described(config), num_outputs=1)
        if config.batch_norm == "sync":
            encoder = nn.SyncBatchNorm.convert_sync_batchnorm(encoder)
        else:
            splits = config.splits // (processes.size * config.accumulate) if config.batch_norm == "split" else 1
            use_split_batch_norm(encoder, splits, own_kernels)
        if config.accumulate > 1:  # running statistics move with every part: all together as far as with one
            for layer in encoder.modules():
                if isinstance(layer, nn.modules.batchnorm._BatchNorm):  # SyncBatchNorm too
                    layer.momentum = 1 - (1 - (layer.momentum or 0)) ** (1 / config.accumulate)
        return methods()[config.method](encoder, config, processes)


def missing_kernels(config: PretrainConfig, device: torch.device, wanted: bool) -> str | None:
    """Return why BatchNorm is PyTorch's, which is slower, on a GPU that should have this project's kernels.

    None where the GPU has them, or should not.
    """
    if device.type != "cuda" or config.batch_norm == "sync" or not wanted:
        return None
    return found if isinstance(found := kernels(), str) else None


Phase = Callable[[str], contextlib.AbstractContextManager[object]]


def _nothing() -> None: ...


def _unwatched(name: str) -> contextlib.AbstractContextManager[object]:
    return contextlib.nullcontext()


class ContrastStep:
    """Callable for the loop. All randomness of a step is a function of the seed and the step's number.

    batch_size: images in a real batch, which a small set makes smaller than the configured one; those of all
    processes together. Each process is called with its part of the batch. Gradients and BatchNorm's running statistics
    are averaged over the processes in every step, so that all of them hold the same state and any can save it. What
    they send each other travels while the views of the next step are made: the update follows then, or as soon as
    somebody wants to see the state, and none waits for one that is slower in this step and faster in the next (shuffled
    keys are still exchanged, and waited for, in the midst of a step). A batch that is accumulated goes through the
    network in parts, each with BatchNorm statistics of its own; the queue stays that of the step before until all are
    done.
    """

    def __init__(
        self, config: PretrainConfig, views: Views, device: torch.device, precision: torch.dtype,
        batch_size: int | None = None, processes: DistributedContext = SINGLE_PROCESS, cuda_graphs: bool = False,
        own_kernels: bool = True,
    ) -> None:  # fmt: skip
        self.config, self.views, self.device, self.precision = config, views, device, precision
        self.processes = processes
        model = build_model(config, processes, own_kernels).to(device).to(memory_format=torch.channels_last)
        self._model, self._pending_update = model, _nothing
        self.make_view: Callable[..., Tensor] = Views.__call__
        if cuda_graphs and device.type == "cuda":
            self.make_view = GraphedViews()
            if config.batch_norm != "sync":  # which waits for other GPUs within
                model.quick = {name: GraphedEncoder(each, precision) for name, each in model.named_children()}
        self.peak_lr = scaled_lr(config.lr, batch_size or config.batch_size)
        self.optimizer = make_sgd(
            model.encoder.parameters(), device, precision,
            lr=self.peak_lr, momentum=config.sgd_momentum, weight_decay=config.weight_decay,
        )  # fmt: skip
        self.average = Average(processes)
        self.phase: Phase = _unwatched  # around the parts of a step, for whoever wants to know
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision is torch.float16)

    def __call__(self, indices: np.ndarray, images: Tensor, fraction: float, number: int) -> dict[str, Any]:
        """Take one optimizer step on a batch of images and return its metrics.

        indices: of the images, not used. images: B x H x W x 3 uint8. fraction: progress of the run in [0, 1]. number:
        of the step. In several processes the update itself follows later; see above.
        """
        config = self.config
        generator = step_generator(config.seed, number)
        views = self.views.at(view_size(self.views.size, config.resolutions, config.resolution_changes, fraction))
        with self.phase("views"):
            unit = views.to_unit(images)
            place = self.processes.rank * len(unit), self.processes.size * len(unit)
            a, b = (self.make_view(views, unit, generator, *place) for _ in range(2))
        model = self.model
        factor = lr_factor(config.schedule, fraction, config.warmup, config.milestones)
        for group in self.optimizer.param_groups:
            group["lr"] = self.peak_lr * factor
        momentum = key_momentum(config.momentum, config.momentum_schedule, fraction)
        model.train()
        loss, accuracy = torch.zeros((), device=self.device), torch.zeros((), device=self.device)
        with self.phase("keys"), autocast(self.device, self.precision):
            targets = model.targets(a, b, generator, config.accumulate)
        for part in np.array_split(np.arange(len(a)), config.accumulate):
            rows, share = slice(int(part[0]), int(part[-1]) + 1), len(part) / len(a)
            with self.phase("queries"), autocast(self.device, self.precision):
                part_loss, part_accuracy = model.loss(a[rows], b[rows], [target[rows] for target in targets])
            with self.phase("backward"):
                self.scaler.scale(part_loss * share).backward()
            loss += part_loss.detach() * share
            accuracy += part_accuracy * share
        self._pending_update = self._update(torch.cat(targets) if targets else None, momentum)
        if self.processes.size == 1:
            self.flush_pending_update()
        moving = {"key_momentum": momentum} if model.momentum_encoder else {}
        return {"loss": loss, "contrast_accuracy": accuracy, "lr": self.peak_lr * factor, **moving}

    def _update(self, targets: Tensor | None, momentum: float) -> Callable[[], None]:
        """Send to the other processes what they need, and return a function that takes the step.

        That function waits for what the others send. Gradients (scaled: what overflows in one process overflows in all)
        and running statistics become those of all processes.
        """
        model, shared = self._model, []
        if self.processes.size > 1:
            names = ("running_mean", "running_var")
            shared = [p.grad for p in model.encoder.parameters() if p.grad is not None]
            shared += [buffer for name, buffer in model.named_buffers() if name.endswith(names)]
        everyones = None if targets is None else self.processes.gather_async(targets)
        take = self.average(shared)

        def update() -> None:
            with self.phase("update"):
                take()
                self.scaler.step(self.optimizer)
                self.scaler.update()
                self.optimizer.zero_grad(set_to_none=True)
                model.update(None if everyones is None else everyones(), momentum)

        return update

    def flush_pending_update(self) -> None:
        """Take the update of the step before, if it has not been taken."""
        pending, self._pending_update = self._pending_update, _nothing
        pending()

    @property
    def model(self) -> Method:
        """Return the model as it is after all steps."""
        self.flush_pending_update()
        return self._model

    def state(self) -> dict[str, Any]:
        """Return model (encoders, queue and its cursor), optimizer and loss scale. Random numbers need no saving."""
        self.flush_pending_update()
        return {"model": self.model.state_dict(), **training_state(self.optimizer, self.scaler)}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore what `state` returned. The state may be from another device."""
        self.model.load_state_dict(state["model"])
        load_training_state(self.optimizer, self.scaler, state, self.device)


def pass_flops(step: ContrastStep, size: int, batch: int) -> int:
    """Return the FLOP of the passes of one step, multiplications and additions, without those of the views.

    The peak of a GPU's memory is reset afterwards, so that the counted passes do not appear in it.
    """
    parts = step.config.accumulate
    images = torch.zeros(batch // parts, 3, size, size, device=step.device).to(memory_format=torch.channels_last)
    model, quick = step.model, step.model.quick
    model.quick = {}  # within which nothing can be counted
    with FlopCounterMode(display=False) as counter, autocast(step.device, step.precision):
        model.loss(images, images, model.targets(images, images, torch.Generator().manual_seed(0)))[0].backward()
    model.quick = quick
    step.optimizer.zero_grad(set_to_none=True)
    if step.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(step.device)
    return int(counter.get_total_flops()) * parts
