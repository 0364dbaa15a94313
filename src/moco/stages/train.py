"""Stage `train`: a linear classifier on the frozen encoder; writes the files that can be handed in."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from moco.data.cache import DecodedSplit
from moco.data.manifest import Manifest, load_manifest
from moco.data.prepare import open_decoded
from moco.encoders.architecture import Architecture, with_features
from moco.encoders.encoder import build_encoder, load_body, strip_head
from moco.errors import UserError, say
from moco.exchange.classifier_files import Classifier, write_classifier
from moco.exchange.encoder_file import EncoderFile, load_encoder
from moco.files import scratch_folder, sha256, write_text
from moco.labels.extra_file import EXTRA_LABELS, packed
from moco.layout import CLASSIFIER, ENCODER, MANIFEST, REPORTS
from moco.runs.identity import Making, Start
from moco.runs.joins import check_images, differences, learned_record, tell_other_data
from moco.runs.outputs import locked_outputs
from moco.runs.run_folder import open_run_folder, run_key
from moco.settings.kinds import flatten
from moco.settings.schema import Config
from moco.settings.train import TrainConfig
from moco.tracking import pictures
from moco.tracking.digests import (
    BEFORE_REFIT,
    THESE,
    encoder_provenance,
    held_out_record,
    train_settings,
    write_provenance,
)
from moco.tracking.dvc_outputs import write_curve, write_metrics
from moco.tracking.metric_log import metric_history
from moco.tracking.origin import origin
from moco.tracking.run import Run
from moco.training import features
from moco.training.linear import LinearFit, fit_linear
from moco.training.numerics import choose_device, choose_precision, set_up
from moco.training.progress import ProgressDisplay
from moco.views.views import Views, recipe

FEATURE_BATCH = 256  # images
CROP_SCALE = (0.5, 1.0)  # of the extra views: light, since the classifier will see whole images
VAL_NEIGHBOURS = 20

Log = Callable[[dict[str, float], int], None]
Metrics = dict[str, float]
Correct = dict[str, np.ndarray]  # booleans, an image each, by the metric that is their mean


@dataclass(frozen=True)
class Inputs:
    """What training a classifier starts from. splits: the dataset's; `extra`, where it is there, has labelled images
    beside those of train."""

    device: torch.device
    manifest: Manifest
    encoder: EncoderFile
    splits: dict[str, DecodedSplit]


def run(config: Config, start: Start | None = None) -> None:
    """Train the classifier on the frozen encoder.

    Raises UserError where encoder, data and settings do not fit each other.
    """
    with locked_outputs("train", say):
        making = (start or Start.of("train")).making(config)
        train_classifier(config, open_inputs(config), "train", CLASSIFIER, {}, {}, making)


def open_inputs(config: Config) -> Inputs:
    """Open what training a classifier starts from.

    Raises UserError where encoder, data and settings do not fit each other.
    """
    device = choose_device(config.runtime.device)
    set_up(device, config.runtime.threads, config.runtime.deterministic)
    manifest = load_manifest(MANIFEST)
    encoder = load_encoder(ENCODER)
    check_images(ENCODER, encoder.images, manifest, "run `moco pretrain` again")
    tell_other_data(ENCODER, encoder.digest, encoder.images, manifest, say)
    if different := differences(encoder.settings, flatten(config.pretrain, "pretrain")):
        say(f"warning: {ENCODER} was made with other settings: {'; '.join(different)}; `moco pretrain` makes it new")
    splits = open_decoded(config.data, manifest, scratch_folder(config.runtime.scratch), say)
    return Inputs(device, manifest, encoder, splits)


def train_classifier(
    config: Config, inputs: Inputs, stage: str, folder: Path, settings: dict[str, Any], more: Metrics, making: Making,
    check: Callable[[Tensor], None] = lambda _: None, texts: Mapping[Path, str] = {},
) -> None:  # fmt: skip
    """Fit, measure and write a classifier to `folder`, its reports to reports/STAGE, unless that is done already.

    settings: those of the stage beside section `train`. more: its own metrics. check: gets the features of all labelled
    images before anything is fitted. texts: other outputs of the stage, by place. Raises UserError where the encoder
    does not fit.
    """
    section, encoder, manifest, device = config.train, inputs.encoder, inputs.manifest, inputs.device
    architecture = with_features(encoder.architecture, section.features)
    network = _loaded(architecture, encoder, len(manifest.classes))
    chain = {
        **encoder.settings, "pretrain.precision": config.pretrain.precision, **flatten(section, "train"), **settings,
    }  # fmt: skip
    key = run_key(chain, manifest.digest)
    with open_run_folder(stage, key, making) as run_folder, contextlib.ExitStack() as stack:
        if run_folder.restored:
            return
        record = stack.enter_context(Run(run_folder.path, stage, config.tracking, say))
        labelled = sum(len(inputs.splits[name].images) for name in ("train", "extra") if name in inputs.splits)
        say(f"{stage}: features of {labelled} labelled images on {device}")
        record.start(chain, origin(config, manifest, device))
        views, classes = linear_views(manifest, device), len(manifest.classes)

        def look(a: Tensor, b: Tensor) -> None:
            train, val = inputs.splits["train"], inputs.splits["val"]
            for name, write in pictures.of_features(train, val, a, b, manifest.classes).items():
                record.picture(name, write)

        body = strip_head(network)
        dtype = views_precision(config, device)
        how = (views, section, classes, device, record.log, look, check, dtype)
        fit, results, correct = classify(body, inputs.splits, *how)
        _assert_frozen(network, encoder.weights)
        report = run_folder.own(REPORTS / stage)
        record.artifact(write_curve(record.path, report / "epochs.csv", "held_out_accuracy"))
        judged = held_out(inputs, section, correct["best_held_out_accuracy"])
        in_pool = held_in_pool(inputs.splits, section)
        results["held_out_in_pool"] = float(in_pool)
        results |= {**more, "iterations" if section.solver == "lbfgs" else "best_epoch": fit.epoch}
        record.log(results, max(line["step"] for line in metric_history(record.path)) + 1)
        weights = _with_layer(architecture, encoder, classes, fit)
        made_from = encoder_provenance(encoder.sha256, manifest)
        extra = inputs.splits.get("extra")
        parts = [inputs.splits["train"], *([] if extra is None else [extra])]
        found = Classifier(
            architecture, weights, fit.epoch, fit.accuracy, fit.optimizer, chain, made_from, results,
            learned_record(parts, manifest),
        )  # fmt: skip
        kept = {} if extra is None else {EXTRA_LABELS: packed(extra, inputs.splits["unlabeled"])}
        files = write_classifier(run_folder.own(folder), found, manifest, config.eval, kept)
        for place, text in texts.items():
            write_text(run_folder.own(place), text)
            record.artifact(run_folder.own(place))
        record.artifact(write_metrics(record.path, report / "metrics.json", {}))
        made = {**made_from, "weights": sha256(files[0]), "architecture": architecture.as_dict()}
        made["train_settings"] = train_settings(section)
        record.artifact(write_provenance(report, manifest, **made, correct=correct))
        tags = {name: f"{value:.4f}" for name, value in results.items()}
        record.model(files, tags, (manifest.height, manifest.width), judged)
        drawn = ("loss", "held_out_accuracy")
        record.picture("curves", pictures.draw_curves(metric_history(record.path), drawn))
        run_folder.finish(making)
    unit = "iteration" if section.solver == "lbfgs" else "epoch"
    say(
        f"{stage}: {unit} {fit.epoch}, held-out accuracy {fit.accuracy:.2%}, val {results['val_accuracy']:.2%} "
        f"-> {folder}"
    )
    if known := features.describe_in_pool(in_pool, int(results["held_out_images"])):
        say(f"{stage}: {known}")


def _loaded(architecture: Architecture, encoder: EncoderFile, classes: int) -> nn.Module:
    network = build_encoder(architecture, classes)
    try:
        load_body(network, encoder.weights)
    except (ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{ENCODER}: {reason}; run `moco pretrain` again") from None
    return network


def held_out(inputs: Inputs, section: TrainConfig, correct: np.ndarray) -> dict[str, str]:
    """Return the record of the held-out images for the registry. correct: which of them are right."""
    train, judged = inputs.splits["train"], BEFORE_REFIT if section.refit else THESE
    *_, held = labelled(inputs.splits, section.holdout, section.seed, "train")
    return held_out_record(train.digests[held], train.known_labels[held], inputs.manifest.classes, correct, judged)


def with_steps_of_train(section: TrainConfig, parts: list[DecodedSplit], kept: np.ndarray) -> TrainConfig:
    """Return the settings with so many epochs that sgd takes as many steps with extra labels as without: the labels
    alone are to make the difference. parts: train, and the extra images where there are some. kept: rows of both."""
    if section.solver != "sgd":
        return section
    own = int((kept < len(parts[0].images)).sum())
    return replace(section, epochs=max(1, round(section.epochs * own / len(kept))))


def held_in_pool(splits: dict[str, DecodedSplit], section: TrainConfig) -> int:
    """Return how many of the held-out images pretraining sees."""
    *_, held = labelled(splits, section.holdout, section.seed, "train")
    return features.count_in_pool(splits["train"].digests[held], splits["unlabeled"].digests)


def linear_views(manifest: Manifest, device: torch.device) -> Views:
    """Return the views of the images from which features are computed."""
    return classifier_views(manifest, device, CROP_SCALE)


def classifier_views(
    manifest: Manifest, device: torch.device, crop_scale: tuple[float, float], name: str = "crop"
) -> Views:
    """Return views of whole size, by a recipe that does not blur."""
    return Views(recipe(name, crop_scale, (0.1, 2.0)), manifest.height, manifest.mean, manifest.std, device)


def views_precision(config: Config, device: torch.device) -> torch.dtype:
    """Return the precision of the network for random views.

    It is pretraining's. But its fp16 may have been that of another machine's GPU.
    """
    wanted = config.pretrain.precision
    return choose_precision("auto" if wanted == "fp16" and device.type != "cuda" else wanted, device)


def feature_sets(
    network: nn.Module, parts: list[DecodedSplit], views: Views, section: TrainConfig, device: torch.device,
    precision: torch.dtype = torch.float32,
) -> Tensor:  # fmt: skip
    """Return V x N x D features of all images of the parts, as they are and in V - 1 random views (V: train.views).

    precision: of the network for the random views. The images as they are are computed in fp32, in which the classifier
    will see them.
    """
    network.to(device).to(memory_format=torch.channels_last)
    generator = torch.Generator().manual_seed(section.seed)

    with ProgressDisplay("features").counting(section.views * sum(len(part.images) for part in parts)) as advance:

        def one(prepare: Callable[[Tensor], Tensor], dtype: torch.dtype) -> Tensor:
            how: dict[str, Any] = {
                "batch_size": FEATURE_BATCH, "device": device, "precision": dtype, "advance": advance,
            }  # fmt: skip
            return torch.cat([features.extract(network, part.images, prepare, **how) for part in parts])

        random = [
            one(lambda batch: views(views.to_unit(batch), generator), precision) for _ in range(section.views - 1)
        ]
        return torch.stack([one(views.plain, torch.float32), *random])


def labelled(
    splits: dict[str, DecodedSplit], holdout: float, seed: int, stage: str
) -> tuple[list[DecodedSplit], np.ndarray, np.ndarray, np.ndarray]:
    """Return the parts with labels, their labels, the rows to train on and those held out.

    The parts are train, and `extra` where it is there. The labels are those of both, N int64. The held-out rows are all
    of train. Raises UserError where none can be held out.
    """
    parts = [splits[name] for name in ("train", "extra") if name in splits]
    known = [part.labels for part in parts if part.labels is not None]
    kept, held = features.stratified_holdout(known[0], holdout, seed)
    if not len(held):
        raise UserError(f"{stage}.holdout: no class has two labelled images; none can be held out", "E-TRAIN-HOLDOUT")
    labels = np.concatenate(known)
    kept = np.concatenate([kept, np.arange(len(known[0]), len(labels))])
    return parts, labels, features.apart(kept, held, np.concatenate([part.digests for part in parts])), held


def classify(
    network: nn.Module, splits: dict[str, DecodedSplit], views: Views, section: TrainConfig,
    classes: int, device: torch.device, log: Log, look: Callable[[Tensor, Tensor], None] | None = None,
    check: Callable[[Tensor], None] = lambda _: None, precision: torch.dtype = torch.float32,
) -> tuple[LinearFit, Metrics, Correct]:  # fmt: skip
    """Fit the linear layer on features of train (and `extra`), and return it with the accuracies.

    Returned too is which images each accuracy counts as right (of train's held-out images those of the fit before
    `refit`). look: gets the features of both and those of val (N x D each). check: gets the features of both before
    anything is fitted. precision: as in `feature_sets`.

    Accuracy is measured on a held-out part of train, on which sgd also chooses its epoch; with `refit` the layer is
    then fitted on all labels: by lbfgs to the optimum, by sgd for so many epochs, which are the fewer the more labels
    `extra` has. val is measured once, at the end, and decides nothing. Images of `extra` are never held out: their
    labels are not as sure as train's, and so accuracy is measured on the same images with and without them.
    """
    val = splits["val"]
    parts, known, kept, held = labelled(splits, section.holdout, section.seed, "train")
    section = with_steps_of_train(section, parts, kept)
    labels, val_labels = torch.from_numpy(known), torch.from_numpy(val.known_labels)
    stack = feature_sets(network, parts, views, section, device, precision)
    check(stack[0])
    say(features.describe_holdout(known[: len(parts[0].images)], held, section.holdout, "train.holdout"))
    if section.solver == "sgd" and section.batch_size > len(kept):
        say(
            f"warning: train.batch_size: {section.batch_size} is more than the {len(kept)} images; batches are of these"
        )
    fit = fit_linear(stack[:, kept], labels[kept], stack[0, held], labels[held], classes, section, log)
    correct = {"best_held_out_accuracy": predictions(fit, stack[0, held]) == known[held]}
    fit.accuracy = float(correct["best_held_out_accuracy"].mean())
    results = {
        "held_out_accuracy": fit.accuracy, "best_held_out_accuracy": fit.accuracy, "held_out_images": float(len(held)),
    }  # fmt: skip
    if section.refit:
        accuracy = fit.accuracy
        nothing = stack[0, :0], labels[:0]
        fit = fit_linear(stack, labels, *nothing, classes, section, lambda *_: None, stop_after=fit.epoch)
        fit.accuracy = accuracy
    if fit.converged is False:
        say(
            f"warning: the linear classifier has not converged after {fit.epoch} iterations; raise train.weight_decay, "
            "or set train.feature_scaling: standardize"
        )
    with ProgressDisplay("features of val").counting(len(val.images)) as advance:
        how: dict[str, Any] = {"batch_size": FEATURE_BATCH, "device": device, "advance": advance}
        val_features = features.extract(network, val.images, views.plain, **how)
    correct["val_accuracy"] = predictions(fit, val_features) == val.known_labels
    correct["val_knn_accuracy"] = features.knn_correct(
        stack[0], labels, val_features, val_labels, neighbours=VAL_NEIGHBOURS, classes=classes
    ).numpy()
    results |= {name: float(correct[name].mean()) for name in ("val_accuracy", "val_knn_accuracy")}
    if look is not None:
        look(stack[0], val_features)
    return fit, results, correct


def predictions(fit: LinearFit, found: Tensor) -> np.ndarray:
    """Return the classes, N int64, that the layer gives to features N x D."""
    return (found @ fit.weight.T + fit.bias).argmax(1).numpy()


def _assert_frozen(network: nn.Module, weights: dict[str, Tensor]) -> None:
    """Check that the encoder, its BatchNorm statistics included, is bit for bit what was loaded.

    Raises RuntimeError where it is not.
    """
    state = network.state_dict()
    for name, value in weights.items():
        if not torch.equal(state[name].cpu(), value):
            raise RuntimeError(f"frozen weights changed: {name}")


def _with_layer(architecture: Architecture, encoder: EncoderFile, classes: int, fit: LinearFit) -> dict[str, Tensor]:
    """Return the state dict of the whole classifier."""
    classifier = build_encoder(architecture, classes)
    load_body(classifier, encoder.weights)
    with torch.no_grad():
        classifier.fc.weight.copy_(fit.weight)  # type: ignore[union-attr, operator]
        classifier.fc.bias.copy_(fit.bias)  # type: ignore[union-attr, operator]
    return classifier.state_dict()
