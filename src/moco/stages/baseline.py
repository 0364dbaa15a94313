"""Stage `baseline`: what the labels give without pretraining, by the same rules.

Two rows for the table: a linear classifier on the same encoder with random weights, and the same network
trained from scratch on the labels alone. Both choose their epoch on held-out train images and measure val once.
"""

from __future__ import annotations

import copy
import json
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moco.config import BaselineConfig, Config, flatten
from moco.data.batches import EpochSampler, Fetcher
from moco.data.cache import DecodedSplit
from moco.data.manifest import Manifest, load_manifest
from moco.data.prepare import open_decoded
from moco.data.views import Views, recipe
from moco.files import write_text
from moco.model.encoder import Architecture, build_encoder, strip_head
from moco.stages.train import classify
from moco.stages.workspace import MANIFEST, REPORTS, open_run_folder, run_key, say, scratch_folder
from moco.tracking.provenance import provenance
from moco.tracking.run import Run
from moco.training import features
from moco.training.interrupt import watch_signals
from moco.training.loop import Hooks, Length, LoopState, run_loop
from moco.training.numerics import autocast, choose_device, choose_precision, set_up
from moco.training.progress import ProgressDisplay
from moco.training.schedules import lr_factor, scaled_lr

BATCH = 256  # images, when measuring


class SupervisedStep:
    """Callable for the loop: cross-entropy on random crops of labelled images."""

    def __init__(
        self, network: nn.Module, labels: Tensor, views: Views, section: BaselineConfig, batch_size: int,
        device: torch.device, precision: torch.dtype,
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
        generator = torch.Generator().manual_seed((section.seed << 40) + number)
        self.network.train()
        batch = self.views(self.views.to_unit(images), generator)
        with autocast(self.device, self.precision):
            loss = F.cross_entropy(self.network(batch), self.labels[indices].to(self.device))
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return {"loss": loss.detach(), "lr": self.peak_lr * factor}


def run(config: Config) -> None:
    """Raises UserError where data and settings do not fit each other; Interrupted after a signal."""
    section, model = config.baseline, config.pretrain
    device = choose_device(config.runtime.device)
    precision = choose_precision(model.precision, device)
    set_up(device, config.runtime.threads)
    manifest = load_manifest(MANIFEST)
    splits = open_decoded(config.data, manifest, scratch_folder(config.runtime.scratch), say)
    architecture = Architecture(model.encoder, model.stem, model.width, model.stages)
    params = {**flatten(config.data, "data"), **flatten(config.train, "train"), **flatten(section, "baseline"),
              **{f"pretrain.{name}": value for name, value in architecture.as_dict().items()}}  # fmt: skip
    folder = open_run_folder("baseline", run_key(params, manifest.digest))
    views = Views(recipe("crop", section.crop_scale, (0.1, 2.0)), manifest.height, manifest.mean, manifest.std, device)
    with Run(folder.path, "baseline", config.tracking, say) as record:
        record.start(f"baseline-{folder.path.name}", params, {**provenance(device), "data_digest": manifest.digest})
        classes = len(manifest.classes)
        random = strip_head(_network(architecture, classes, section.seed))
        _, linear = classify(random, splits, views, config.train, classes, device, lambda *_: None)
        say(f"baseline: linear classifier on random weights: val {linear['val_accuracy']:.2%}")
        network = _network(architecture, classes, section.seed)
        supervised = _supervised(network, splits, views, section, manifest, device, precision, record)
        say(f"baseline: supervised on the labels alone: val {supervised['val_accuracy']:.2%}")
        results = {f"random_{name}": value for name, value in linear.items()}
        results.update({f"supervised_{name}": value for name, value in supervised.items()})
        record.log(results, 0)
        path = REPORTS / "baseline" / "metrics.json"
        write_text(path, json.dumps(results, indent=2, sort_keys=True) + "\n")
        record.artifact(path)
    folder.finish()


def _network(architecture: Architecture, classes: int, seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build_encoder(architecture, classes)


def _supervised(
    network: nn.Module, splits: dict[str, DecodedSplit], views: Views, section: BaselineConfig, manifest: Manifest,
    device: torch.device, precision: torch.dtype, record: Run,
) -> dict[str, float]:  # fmt: skip
    """Trains from scratch; the weights of the epoch that is best on held-out train images are measured."""
    train, val = splits["train"], splits["val"]
    assert train.labels is not None and val.labels is not None
    labels = torch.from_numpy(train.labels)
    kept, held = features.stratified_holdout(train.labels, 0.1, section.seed)
    sampler = EpochSampler(kept, section.batch_size, section.seed)
    step = SupervisedStep(network, labels, views, section, sampler.batch_size, device, precision)
    best: dict[str, Any] = {"accuracy": -1.0}

    def accuracy(images: np.ndarray, truth: Tensor) -> float:
        outputs = features.extract(network, images, views.plain, batch_size=BATCH, device=device)
        return float((outputs.argmax(1) == truth).float().mean())

    def monitor() -> dict[str, float]:
        found = accuracy(train.images[held], labels[held])
        if found >= best["accuracy"]:  # the later on a tie: with few labels ties are common
            best.update(accuracy=found, weights=copy.deepcopy(network.state_dict()))
        return {"supervised_held_out_accuracy": found}

    state = LoopState()
    with watch_signals() as stop, ProgressDisplay("baseline") as display:
        hooks = Hooks(
            record.log, max(1, sampler.batches_per_epoch), display, stop, monitor, section.monitor_every,
            lambda _: None, section.epochs,
        )  # fmt: skip
        fetcher = Fetcher(train.images, pin=device.type == "cuda")
        run_loop(step, sampler, fetcher, Length(section.epochs, section.minutes), state, hooks)
    network.load_state_dict(best["weights"])
    return {
        "held_out_accuracy": best["accuracy"],
        "val_accuracy": accuracy(val.images, torch.from_numpy(val.labels)),
        "minutes": state.seconds / 60,
        "images_seen": float(state.step * sampler.batch_size),
    }
