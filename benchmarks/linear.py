"""The linear stage beside the original's: seconds and accuracy, on a real encoder and its data.

    python benchmarks/linear.py PROJECT DATASET

PROJECT: a folder in which `moco pretrain` has run with the preset cifar10. DATASET: the folder with `train/` and `val/`
that its `.sqsh` was packed from. Both sides classify the same frozen features over 200 epochs. The original's runs the
network anew in every epoch, over val too; here it does so over train in every epoch, over val in one, whose time counts
200 times. Its learning rate is tried ten times smaller as well, as 30 was meant for features of another size.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import time
from pathlib import Path

import original
import torch
from torch import nn

from moco.data.manifest import load_manifest
from moco.data.prepare import open_decoded
from moco.encoders.encoder import build_encoder, feature_width, load_body, strip_head
from moco.exchange.encoder_file import load_encoder
from moco.files import scratch_folder
from moco.settings.reading import load
from moco.stages.train import classify, linear_views, views_precision
from moco.training.numerics import set_up

CPU = torch.device("cpu")
EPOCHS = 200


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("project", type=Path)
    parser.add_argument("dataset", type=Path)
    args = parser.parse_args()
    dataset = args.dataset.resolve()
    os.chdir(args.project)
    set_up(CPU, 0)
    config, manifest = load(Path("params.yaml")), load_manifest(Path("models/manifest.json"))
    splits = open_decoded(config.data, manifest, scratch_folder(config.runtime.scratch), print)
    original.MEAN, original.STD = manifest.mean, manifest.std  # what the encoder has seen
    encoder = load_encoder(Path("models/encoder.pth"))
    network = build_encoder(encoder.architecture, len(manifest.classes))
    load_body(network, encoder.weights)
    width, body = feature_width(network), strip_head(network).eval()

    views = linear_views(manifest, CPU)
    began = time.perf_counter()
    section = dataclasses.replace(config.train, epochs=EPOCHS)
    precision = views_precision(config, CPU)
    fit, found, _ = classify(
        body, splits, views, section, len(manifest.classes), CPU, lambda *_: None, precision=precision
    )
    ours = time.perf_counter() - began
    print(f"ours: {ours:.1f} s, val {found['val_accuracy']:.2%}, best epoch {fit.epoch} of {EPOCHS}", flush=True)

    labels, val_labels = (torch.from_numpy(splits[name].labels) for name in ("train", "val"))

    def accuracy(layer: nn.Linear) -> float:
        loader = torch.utils.data.DataLoader(
            original.Labelled(dataset / "val", val_labels, manifest.height, train=False), 512, num_workers=2
        )
        with torch.no_grad():
            right = [(layer(body(images)).argmax(1) == targets).sum() for images, targets in loader]
        return float(sum(right)) / len(val_labels)

    def train(lr: float) -> tuple[nn.Linear, float]:
        began = time.perf_counter()
        layer = original.linear_epochs(
            body, width, dataset, labels, manifest.height, len(manifest.classes), EPOCHS, EPOCHS, lambda *_: None, lr
        )
        return layer, time.perf_counter() - began

    for lr in (30.0, 3.0):
        layer, spent = train(lr)
        began = time.perf_counter()
        value = accuracy(layer)
        whole = spent + EPOCHS * (time.perf_counter() - began)
        print(f"original's, lr {lr}: {spent:.0f} s, with val in every epoch {whole:.0f} s; val {value:.2%}; "
              f"ratio {spent / ours:.0f}, with val {whole / ours:.0f}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
