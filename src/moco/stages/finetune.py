"""Stage `finetune`: trains all weights of the linear classifier further, on the labelled images.

It starts from the encoder with a new last layer, or from model_sub.pth, with one exception. The epoch is to be chosen
on images that were not trained on, but with `train.refit` the last layer has seen all of train. So that layer is fitted
again, as stage `train` does it (by sgd for as many epochs), without the held-out images; where `train` has held out the
same ones and not refitted, that gives the layer of model_sub.pth to the bit. The start is a candidate
beside the epochs.

With `finetune.classifier: classifier_extra` it trains on the extra labels of stage `train_extra` as well.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from moco.data.batches import EpochSampler, gather
from moco.data.cache import DecodedSplit
from moco.data.manifest import Manifest, load_manifest
from moco.data.prepare import open_decoded
from moco.encoders.architecture import with_features
from moco.encoders.encoder import build_encoder, feature_width
from moco.encoders.families import family
from moco.errors import UserError, say
from moco.exchange.classifier_files import WEIGHTS, Classifier, TrainedClassifier, read_classifier, write_classifier
from moco.exchange.encoder_file import load_encoder
from moco.files import scratch_folder, sha256, write_text
from moco.labels.extra_file import EXTRA_LABELS, read_extra
from moco.layout import CLASSIFIER, CLASSIFIER_EXTRA, ENCODER, FINETUNED, MANIFEST, PRODUCED_BY, REPORTS
from moco.runs.checkpoints import CheckpointFolder
from moco.runs.identity import Making, Start
from moco.runs.joins import (
    check_classes,
    check_images,
    check_unseen,
    classifier_settings,
    differences,
    learned_record,
    tell_other_data,
)
from moco.runs.outputs import locked_outputs
from moco.runs.resuming import is_branch, saved_state
from moco.runs.run_folder import RunFolder, open_run_folder, run_key
from moco.settings.finetune import FinetuneConfig
from moco.settings.kinds import flatten
from moco.settings.schema import Config
from moco.stages.train import (
    Correct,
    classifier_views,
    feature_sets,
    labelled,
    linear_views,
    views_precision,
    with_steps_of_train,
)
from moco.tracking.digests import THESE, encoder_provenance, held_out_record, write_provenance
from moco.tracking.dvc_outputs import write_curve
from moco.tracking.origin import origin
from moco.tracking.run import Run
from moco.training import features
from moco.training.best_epoch import BestEpoch, beside_start
from moco.training.linear import fit_linear
from moco.training.loop import LoopState, run_effort
from moco.training.numerics import choose_device, choose_precision, refuse_broken, set_up
from moco.training.pool_batches import PoolBatches
from moco.training.supervised import SupervisedStep, Tuning, train_supervised
from moco.views.views import Views

STRONG, STRONG_CROPS = "v2_no_blur", (0.2, 1.0)  # views of the pool's images that pseudo-labels are learned on


def run(config: Config, resume: Path | None = None, start: Start | None = None) -> None:
    """Train, or continue the run of the same settings, data and classifier where one was interrupted.

    resume: a checkpoint of such a run, whose length and code may differ. Raises UserError where classifier, data and
    settings do not fit each other, and for divergence; Interrupted after a signal, with the state saved once training
    is under way.
    """
    with locked_outputs("finetune", say):
        _open(config, resume, (start or Start.of("finetune")).making(config))


def _open(config: Config, resume: Path | None, making: Making) -> None:
    device = choose_device(config.runtime.device)
    set_up(device, config.runtime.threads, config.runtime.deterministic)
    manifest = load_manifest(MANIFEST)
    source = _source(config)
    start = read_classifier(source) if config.finetune.start == "classifier" else _from_encoder(manifest, config)
    made, maker = _made(config)
    check_classes(source, start.classes, manifest, f"run `moco {PRODUCED_BY[source]}` again")
    check_images(made, start.images, manifest, f"run `moco {maker}` again")
    tell_other_data(made, start.made_from.get("data"), start.images, manifest, say)
    if different := differences(start.settings, classifier_settings(config, start.settings)):
        say(f"warning: {made} was made with other settings: {'; '.join(different)}; `moco {maker}` makes it new")
    splits = open_decoded(config.data, manifest, scratch_folder(config.runtime.scratch), say)
    if (extra := read_extra(source, splits["unlabeled"], start.settings)) is not None:
        splits["extra"] = extra  # images that may have moved into val since somebody labelled them
        learned = learned_record([extra], manifest)
        check_unseen(source / EXTRA_LABELS, learned, splits, config.data, manifest, "run `moco train_extra` again", say)
    chain = {
        **start.settings, "pretrain.precision": config.pretrain.precision, **flatten(config.train, "train"),
        **flatten(config.finetune, "finetune"),
    }  # fmt: skip
    key = run_key({**chain, "classifier": start.digest}, manifest.digest)
    with open_run_folder("finetune", key, making, lambda path: is_branch(path, resume)) as folder:
        if folder.restored:
            return
        with Run(folder.path, "finetune", config.tracking, say) as record:
            _run(config, chain, start, manifest, splits, device, folder, record, resume, making)
            folder.finish(making)


def _run(
    config: Config, chain: dict[str, Any], start: TrainedClassifier, manifest: Manifest,
    splits: dict[str, DecodedSplit], device: torch.device, folder: RunFolder, record: Run, resume: Path | None,
    making: Making,
) -> None:  # fmt: skip
    section, val = config.finetune, splits["val"]
    parts, labels, kept, held = labelled(splits, section.holdout, section.seed, "finetune")
    images = parts[0].images if len(parts) == 1 else np.concatenate([part.images for part in parts])
    checkpoints = CheckpointFolder(folder.path, config.checkpoint.keep)
    data = f"{manifest.digest} {start.digest}"
    facts = {"params": {name: str(value) for name, value in chain.items()}, "data": data, **making.in_state()}
    saved = saved_state(checkpoints, resume, chain, data, 1, making.identity)
    network = _network(start, manifest, config)
    if saved is None and section.start == "classifier":
        _fit_last_layer(network, config, start, manifest, parts, labels, kept, device)
    if section.batch_size > len(kept):
        say(
            f"warning: finetune.batch_size: {section.batch_size} is more than the {len(kept)} images; "
            "all of them make one batch"
        )
    sampler = EpochSampler(kept, section.batch_size, section.seed)
    views = classifier_views(manifest, device, section.crop_scale)
    pool = _pool(section, splits["unlabeled"], sampler.batch_size, views, manifest)
    precision = choose_precision(config.pretrain.precision, device)
    tuning = Tuning(section.layer_decay, section.label_smoothing, section.mixup, section.batch_norm == "frozen",
                    family(start.architecture.name).stage)  # fmt: skip
    step = SupervisedStep(
        network, torch.from_numpy(labels), views, section, sampler.batch_size, device, precision, tuning, pool
    )  # fmt: skip
    state = LoopState(**saved["loop"]) if saved else LoopState()
    choice = BestEpoch(step, state, gather(images, held), labels[held])
    if saved is not None:
        step.load_state(saved)
        choice.best, choice.start = saved["best"], saved.get("start")
        choice.last = step.accuracy(choice.images, choice.labels)
    record.start(chain, origin(config, manifest, device), -1 if saved is None else state.step)
    if saved is None:
        record.log(choice.begin(), 0)

    def save(state: LoopState) -> None:
        refuse_broken(network, state.step)
        record.sync()
        content = {**facts, "loop": state.as_dict(), "best": choice.best, "start": choice.start, **step.state()}
        record.checkpoint(checkpoints.save(state.epoch, content), state.step)

    in_pool = features.count_in_pool(parts[0].digests[held], splits["unlabeled"].digests)
    say(features.describe_holdout(labels[: len(parts[0].images)], held, section.holdout, "finetune.holdout"))
    say(f"finetune: {len(kept)} images on {device}, {len(held)} held out; log: {record.path}")
    train_supervised("finetune", step, images, sampler, state, record.log, choice, save, config.checkpoint.every)
    chosen = choice.choice()
    network.load_state_dict(chosen["weights"])
    correct = {"best_held_out_accuracy": choice.correct(), "val_accuracy": step.correct(val.images, val.known_labels)}
    results = {
        **dict.fromkeys(("held_out_accuracy", "best_held_out_accuracy"), chosen["accuracy"]),
        "held_out_images": float(len(held)),
        "held_out_in_pool": float(in_pool),
        "val_accuracy": float(correct["val_accuracy"].mean()),
        "best_epoch": chosen["epoch"],
        **run_effort(state, step.images_per_step),
        "labelled_images_seen": float(state.step * sampler.batch_size),
        "views_seen": float(state.step * step.views_per_step),
        "extra_labels": float(len(labels) - len(parts[0].images)),
        **beside_start(choice, chosen),
    }
    made_from = {**start.made_from, "data": manifest.digest, "start": start.digest}
    learned = learned_record(parts, manifest)
    found = Classifier(
        start.architecture, settings=chain, made_from=made_from, results=results, learned=learned, **chosen
    )  # fmt: skip
    right = correct["best_held_out_accuracy"]
    judged = held_out_record(parts[0].digests[held], labels[held], manifest.classes, right, THESE)
    _write(config, found, manifest, correct, judged, record, state, folder)


def _pool(
    section: FinetuneConfig, split: DecodedSplit, batch_size: int, views: Views, manifest: Manifest
) -> PoolBatches | None:
    """Return the batches of the pool that go with those of `batch_size` labelled images, where they are asked for."""
    if not section.pool:
        return None
    strong = classifier_views(manifest, views.device, STRONG_CROPS, STRONG)
    return PoolBatches(split.images, section.pool * batch_size, section.seed, views, strong, section.confidence)


def _source(config: Config) -> Path:
    return CLASSIFIER_EXTRA if config.finetune.classifier == "classifier_extra" else CLASSIFIER


def _made(config: Config) -> tuple[Path, str]:
    """Return the file of the weights that fine-tuning starts from, and the stage that makes it."""
    if config.finetune.start == "encoder":
        return ENCODER, "pretrain"
    return _source(config) / WEIGHTS, PRODUCED_BY[_source(config)]


def _from_encoder(manifest: Manifest, config: Config) -> TrainedClassifier:
    """Return the encoder with a last layer of small random weights (arXiv 1911.05722, section 4.1)."""
    encoder = load_encoder(ENCODER)
    tell_other_data(ENCODER, encoder.digest, encoder.images, manifest, say)
    architecture = with_features(encoder.architecture, config.train.features)
    network = build_encoder(architecture, len(manifest.classes))
    width, generator = feature_width(network), torch.Generator().manual_seed(config.finetune.seed)
    weight = torch.randn(len(manifest.classes), width, generator=generator) * 0.01
    layer = {"fc.weight": weight, "fc.bias": torch.zeros(len(manifest.classes))}
    settings = {**encoder.settings, **{name: str(value) for name, value in flatten(config.train, "train").items()}}
    if (source := _source(config)) == CLASSIFIER_EXTRA:  # whose labels it takes
        made = read_classifier(source)
        check_classes(source, made.classes, manifest, f"run `moco {PRODUCED_BY[source]}` again")
        settings |= {name: value for name, value in made.settings.items() if name.startswith("train_extra.")}
    return TrainedClassifier(
        architecture, {**encoder.weights, **layer}, 0, manifest.classes, settings, sha256(ENCODER),
        encoder_provenance(encoder.sha256, manifest), encoder.images,
    )  # fmt: skip


def _network(start: TrainedClassifier, manifest: Manifest, config: Config) -> nn.Module:
    network = build_encoder(start.architecture, len(manifest.classes))
    try:
        network.load_state_dict(start.weights)
    except (RuntimeError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:150]
        path, maker = _made(config)
        raise UserError(f"{path}: does not fit: {reason}; run `moco {maker}` again") from None
    return network


def _fit_last_layer(
    network: nn.Module, config: Config, start: TrainedClassifier, manifest: Manifest, parts: list[DecodedSplit],
    known: np.ndarray, kept: np.ndarray, device: torch.device,
) -> None:  # fmt: skip
    """Fit the last layer without the held-out images, in place (see above).

    known: labels of all images of the parts.
    """
    layer, network.fc = network.fc, nn.Identity()
    views, precision = linear_views(manifest, device), views_precision(config, device)
    stack = feature_sets(network, parts, views, config.train, device, precision)
    network.fc = layer
    labels = torch.from_numpy(known)
    section = with_steps_of_train(config.train, parts, kept)
    fit = fit_linear(
        stack[:, kept], labels[kept], stack[0, :0], labels[:0], len(manifest.classes), section,
        lambda *_: None, stop_after=start.epoch,
    )  # fmt: skip
    with torch.no_grad():
        network.fc.weight.copy_(fit.weight)  # type: ignore[operator, union-attr]
        network.fc.bias.copy_(fit.bias)  # type: ignore[operator, union-attr]


def _write(
    config: Config, found: Classifier, manifest: Manifest, correct: Correct, judged: dict[str, str], record: Run,
    state: LoopState, folder: RunFolder,
) -> None:  # fmt: skip
    """Write the three files and the reports, and log what MLflow gets.

    judged: the held-out images, for the registry.
    """
    results = found.results
    accuracies = {name: results[name] for name in ("best_held_out_accuracy", "val_accuracy")}
    report = folder.own(REPORTS / "finetune")
    curve = write_curve(record.path, report / "epochs.csv", "held_out_accuracy", joined=True)
    record.log(results, state.step + 1)
    files = write_classifier(folder.own(FINETUNED), found, manifest, config.eval)
    write_text(report / "metrics.json", json.dumps(results, indent=2, sort_keys=True) + "\n")
    made = write_provenance(report, manifest, **found.made_from, weights=sha256(files[0]), correct=correct)
    record.artifact(made)
    record.artifact(report / "metrics.json")
    record.artifact(curve)
    tags = {name: f"{value:.4f}" for name, value in accuracies.items()}
    tags["held_out_in_pool"] = f"{results['held_out_in_pool']:.0f}"
    record.model(files, tags, (manifest.height, manifest.width), judged)
    say(
        f"finetune: epoch {found.epoch}, held-out accuracy {found.accuracy:.2%}, val {results['val_accuracy']:.2%} "
        f"-> {FINETUNED}"
    )
    if known := features.describe_in_pool(int(results["held_out_in_pool"]), int(results["held_out_images"])):
        say(f"finetune: {known}")
