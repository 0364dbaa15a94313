"""Stage `train`: a linear classifier on the frozen encoder; writes the files that can be handed in."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from moco.config import Config, TrainConfig, flatten
from moco.data.cache import DecodedSplit
from moco.data.manifest import Manifest, load_manifest
from moco.data.prepare import open_decoded
from moco.data.views import Views, recipe
from moco.errors import UserError
from moco.files import write_text
from moco.model.encoder import build_encoder, load_body, strip_head
from moco.stages.curves import write_curve, write_metrics
from moco.stages.encoder_file import EncoderFile, load_encoder
from moco.stages.workspace import (
    CLASSIFIER,
    ENCODER,
    HOUSEKEEPING,
    MANIFEST,
    REPORTS,
    differences,
    open_run_folder,
    run_key,
    say,
    scratch_folder,
)  # fmt: skip
from moco.submission import render
from moco.tracking.provenance import provenance
from moco.tracking.run import Run
from moco.training import features
from moco.training.checkpoints import save_weights
from moco.training.linear import LinearFit, fit_linear
from moco.training.numerics import choose_device, set_up

FEATURE_BATCH = 256  # images
CROP_SCALE = (0.5, 1.0)  # of the extra views: light, since the classifier will see whole images
VAL_NEIGHBOURS = 20

Log = Callable[[dict[str, float], int], None]


def run(config: Config) -> None:
    """Raises UserError where encoder, data and settings do not fit each other."""
    section = config.train
    device = choose_device(config.runtime.device)
    set_up(device, config.runtime.threads)
    manifest = load_manifest(MANIFEST)
    encoder = load_encoder(ENCODER)
    if encoder.digest != manifest.digest:
        say("warning: the encoder was pretrained on other data than the manifest describes")
    if different := differences(encoder.settings, flatten(config.pretrain, "pretrain"), HOUSEKEEPING):
        say(f"warning: {ENCODER} was made with other settings: {'; '.join(different)}; `moco pretrain` makes it new")
    splits = open_decoded(config.data, manifest, scratch_folder(config.runtime.scratch), say)
    network = build_encoder(encoder.architecture, len(manifest.classes))
    try:
        load_body(network, encoder.weights)
    except (ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{ENCODER}: {reason}; run `moco pretrain` again") from None
    chain = {**encoder.settings, **flatten(section, "train")}
    tags = {**provenance(device), "data_digest": manifest.digest}
    key = run_key(chain, manifest.digest)
    with open_run_folder("train", key) as folder, Run(folder.path, "train", config.tracking, say) as record:
        say(f"train: features of {len(splits['train'].images)} labelled images on {device}")
        record.start(chain, tags)
        views, classes = _views(manifest, device), len(manifest.classes)
        fit, results = classify(strip_head(network), splits, views, section, classes, device, record.log)
        _assert_frozen(network, encoder.weights)
        record.log({**results, "best_epoch": fit.epoch}, section.epochs + 1)
        files = _write_classifier(config, encoder, chain, manifest, fit)
        report = REPORTS / "train"
        record.artifact(write_metrics(record.path, report / "metrics.json", {}))
        record.artifact(write_curve(record.path, report / "epochs.csv", "held_out_accuracy"))
        record.model(files, {name: f"{value:.4f}" for name, value in results.items()})
        folder.finish()
    say(
        f"train: epoch {fit.epoch}, held-out accuracy {fit.accuracy:.2%}, val {results['val_accuracy']:.2%} "
        f"-> {CLASSIFIER}"
    )


def _views(manifest: Manifest, device: torch.device) -> Views:
    chosen = recipe("crop", CROP_SCALE, (0.1, 2.0))
    return Views(chosen, manifest.height, manifest.mean, manifest.std, device)


def classify(
    network: nn.Module, splits: dict[str, DecodedSplit], views: Views, section: TrainConfig,
    classes: int, device: torch.device, log: Log,
) -> tuple[LinearFit, dict[str, float]]:  # fmt: skip
    """Fits the linear layer on features of train; returns it with the accuracies.

    The epoch is chosen on a held-out part of train; with `refit` the layer is then trained on all of train
    for so many epochs. val is measured once, at the end, and decides nothing.
    """
    network.to(device).to(memory_format=torch.channels_last)

    def outputs(images: np.ndarray, prepare: Callable[[Tensor], Tensor]) -> Tensor:
        return features.extract(network, images, prepare, batch_size=FEATURE_BATCH, device=device)

    train, val = splits["train"], splits["val"]
    assert train.labels is not None and val.labels is not None
    labels, val_labels = torch.from_numpy(train.labels), torch.from_numpy(val.labels)
    generator = torch.Generator().manual_seed(section.seed)
    sets = [outputs(train.images, views.plain)]
    for _ in range(section.views - 1):
        sets.append(outputs(train.images, lambda batch: views(views.to_unit(batch), generator)))
    stack = torch.stack(sets)  # V x N x D
    kept, held = features.stratified_holdout(train.labels, section.holdout, section.seed)
    if not len(held):
        raise UserError("train.holdout: no class has two labelled images; none can be held out")
    fit = fit_linear(stack[:, kept], labels[kept], stack[0, held], labels[held], classes, section, log)
    results = {"best_held_out_accuracy": fit.accuracy}
    if section.refit:
        accuracy = fit.accuracy
        nothing = stack[0, :0], labels[:0]
        fit = fit_linear(stack, labels, *nothing, classes, section, lambda *_: None, stop_after=fit.epoch)
        fit.accuracy = accuracy
    val_features = outputs(val.images, views.plain)
    predicted = (val_features @ fit.weight.T + fit.bias).argmax(1)
    results["val_accuracy"] = float((predicted == val_labels).float().mean())
    results["val_knn_accuracy"] = features.knn_accuracy(
        stack[0], labels, val_features, val_labels, neighbours=VAL_NEIGHBOURS, classes=classes
    )
    return fit, results


def _assert_frozen(network: nn.Module, weights: dict[str, Tensor]) -> None:
    """The encoder, its BatchNorm statistics included, is bit for bit what was loaded."""
    state = network.state_dict()
    for name, value in weights.items():
        assert torch.equal(state[name].cpu(), value), f"frozen weights changed: {name}"


def _write_classifier(
    config: Config, encoder: EncoderFile, chain: dict[str, Any], manifest: Manifest, fit: LinearFit
) -> list[Path]:
    """model_best_EPOCH_ACC.pth, model_sub.pth and submission.py, all of them or none."""
    classifier = build_encoder(encoder.architecture, len(manifest.classes))
    load_body(classifier, encoder.weights)
    with torch.no_grad():
        classifier.fc.weight.copy_(fit.weight)  # type: ignore[union-attr, operator]
        classifier.fc.bias.copy_(fit.bias)  # type: ignore[union-attr, operator]
    state = {name: value.contiguous() for name, value in classifier.state_dict().items()}
    best: dict[str, Any] = {
        "format": 1,
        "epoch": fit.epoch,
        "held_out_accuracy": fit.accuracy,
        "architecture": encoder.architecture.as_dict(),
        "settings": {name: str(value) for name, value in chain.items()},
        "classes": manifest.classes,
        "weights": state,
        "optimizer": fit.optimizer,
    }
    CLASSIFIER.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".classifier-", dir=CLASSIFIER.parent) as work:
        save_weights(Path(work) / f"model_best_{fit.epoch}_{100 * fit.accuracy:.2f}.pth", best)
        save_weights(Path(work) / "model_sub.pth", state)
        write_text(Path(work) / "submission.py", render(encoder.architecture, manifest, config.eval))
        shutil.rmtree(CLASSIFIER, ignore_errors=True)
        CLASSIFIER.mkdir()
        for path in Path(work).iterdir():
            path.replace(CLASSIFIER / path.name)
    return [CLASSIFIER / "model_sub.pth", CLASSIFIER / "submission.py"]
