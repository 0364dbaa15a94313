"""Stage `baseline`: what the labels give without pretraining.

Two rows for the table. The same encoder with random weights goes through stage `train` as the pretrained one does.
The same network trained from scratch on the labels has all of them: no epoch is chosen, its schedule ends where the
rate is nothing. val is measured once.
"""

from __future__ import annotations

import contextlib
import json
import math

import numpy as np
import torch
from torch import nn

from moco.data.batches import EpochSampler
from moco.data.cache import DecodedSplit
from moco.data.manifest import load_manifest
from moco.data.prepare import open_decoded
from moco.encoders.architecture import Architecture, with_features
from moco.encoders.encoder import build_encoder, strip_head
from moco.errors import say
from moco.files import scratch_folder, write_text
from moco.layout import MANIFEST, REPORTS
from moco.runs.identity import Making, Start
from moco.runs.outputs import locked_outputs
from moco.runs.run_folder import open_run_folder, run_key
from moco.settings.baseline import BaselineConfig
from moco.settings.kinds import flatten
from moco.settings.schema import Config
from moco.stages.train import classifier_views, classify
from moco.tracking.digests import train_settings, write_provenance
from moco.tracking.origin import origin
from moco.tracking.run import Run
from moco.training.architecture import chosen_architecture
from moco.training.loop import LoopState, run_effort
from moco.training.numerics import choose_device, choose_precision, refuse_broken, set_up
from moco.training.supervised import SupervisedStep, train_supervised
from moco.views.views import Views

NETWORK = ("encoder", "stem", "width", "stages", "convolutions")  # of section `pretrain`


def run(config: Config, start: Start | None = None) -> None:
    """Measure random weights and supervised training, and write the results.

    Raises UserError where data and settings do not fit each other; Interrupted after a signal.
    """
    with locked_outputs("baseline", say):
        _run(config, (start or Start.of("baseline")).making(config))


def _run(config: Config, making: Making) -> None:
    section, model = config.baseline, config.pretrain
    device = choose_device(config.runtime.device)
    precision = choose_precision(model.precision, device)
    set_up(device, config.runtime.threads, config.runtime.deterministic)
    manifest = load_manifest(MANIFEST)
    splits = open_decoded(config.data, manifest, scratch_folder(config.runtime.scratch), say)
    architecture = with_features(chosen_architecture(model, manifest), config.train.features)
    network_settings = {f"pretrain.{name}": getattr(model, name) for name in NETWORK}
    chain = {**manifest.settings, **network_settings, **flatten(config.train, "train"), **flatten(section, "baseline")}
    views = classifier_views(manifest, device, section.crop_scale)
    classes = len(manifest.classes)
    key = run_key(chain, manifest.digest)
    with open_run_folder("baseline", key, making) as folder, contextlib.ExitStack() as stack:
        if folder.restored:
            return
        record = stack.enter_context(Run(folder.path, "baseline", config.tracking, say))
        record.start(chain, origin(config, manifest, device))
        random = strip_head(_network(architecture, classes, section.seed))
        _, linear, correct = classify(random, splits, views, config.train, classes, device, lambda *_: None)
        say(f"baseline: linear classifier on random weights: val {linear['val_accuracy']:.2%}")
        network = _network(architecture, classes, section.seed)
        supervised, right, steps = _supervised(network, splits, views, section, device, precision, record)
        say(f"baseline: supervised on the labels alone: val {supervised['val_accuracy']:.2%}")
        results = {f"random_{name}": value for name, value in linear.items()}
        results.update(_named(supervised))
        record.log(results, steps + 1)
        path = folder.own(REPORTS / "baseline" / "metrics.json")
        write_text(path, json.dumps(results, indent=2, sort_keys=True) + "\n")
        record.artifact(path)
        correct = {f"random_{name}": row for name, row in correct.items()} | {"supervised_val_accuracy": right}
        fitted = {"architecture": architecture.as_dict(), "train_settings": train_settings(config.train)}
        made = write_provenance(path.parent, manifest, **fitted, correct=correct)
        record.artifact(made)
        folder.finish(making)


def _network(architecture: Architecture, classes: int, seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build_encoder(architecture, classes)


def _supervised(
    network: nn.Module, splits: dict[str, DecodedSplit], views: Views, section: BaselineConfig,
    device: torch.device, precision: torch.dtype, record: Run,
) -> tuple[dict[str, float], np.ndarray, int]:  # fmt: skip
    """Train from scratch on all labels; return the results, which images of val are right (booleans), and the number
    of steps."""
    train, val = splits["train"], splits["val"]
    if section.batch_size > len(train.known_labels):
        say(
            f"warning: baseline.batch_size: {section.batch_size} is more than the {len(train.known_labels)} images; "
            "all of them make one batch"
        )
    sampler = EpochSampler(
        np.arange(len(train.known_labels)), even_batch(len(train.known_labels), section.batch_size), section.seed
    )  # fmt: skip
    step = SupervisedStep(
        network, torch.from_numpy(train.known_labels), views, section, sampler.batch_size, device, precision
    )  # fmt: skip
    state = LoopState()
    log = record.log
    train_supervised("baseline", step, train.images, sampler, state, lambda metrics, at: log(_named(metrics), at))
    refuse_broken(network, state.step)
    correct = step.correct(val.images, val.known_labels)
    found = {"val_accuracy": float(correct.mean()), **run_effort(state, sampler.batch_size)}
    return found, correct, state.step


def even_batch(count: int, most: int) -> int:
    """Return a batch size, at most `most`, whose whole batches leave out fewer images than there are batches."""
    return count // math.ceil(count / most)


def _named(metrics: dict[str, float]) -> dict[str, float]:
    """Return them under the names that tell supervised training from the linear classifier on random weights."""
    return {f"supervised_{name}": value for name, value in metrics.items()}
