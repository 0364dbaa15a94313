"""kNN accuracy on val of a pretrained encoder, with the labels of train: by the head's outputs, as MoCo's authors judge
theirs, and by the features that enter the head.

    python benchmarks/knn.py PROJECT [--neighbours 20 200]

PROJECT is a folder in which `moco data` and `moco pretrain` have run. The newest state of the newest run is judged, as
`models/encoder.pth` no longer has the head. Needs torch and torchvision alone.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
from torch import Tensor, nn

from moco.data.manifest import load_manifest
from moco.data.prepare import open_decoded
from moco.errors import say
from moco.files import scratch_folder
from moco.layout import MANIFEST
from moco.methods.step import build_model, pretraining_views
from moco.settings.reading import load
from moco.training import features
from moco.training.numerics import choose_device, choose_precision, set_up
from moco.weights import load_weights

BATCH = 500  # images


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("project", type=Path)
    parser.add_argument("--neighbours", type=int, nargs="+", default=[20, 200])
    args = parser.parse_args()
    os.chdir(args.project)
    config = load(Path("params.yaml"))
    device = choose_device(config.runtime.device)
    set_up(device, config.runtime.threads)
    precision = choose_precision(config.pretrain.precision, device)
    manifest = load_manifest(MANIFEST)
    splits = open_decoded(config.data, manifest, scratch_folder(config.runtime.scratch), say)
    states = Path("runs/pretrain").glob("*/checkpoint_*.pth")
    newest = max(states, key=lambda path: (path.stat().st_mtime, path.name))
    model = build_model(config.pretrain, own_kernels=False)
    model.load_state_dict(load_weights(newest, "run `moco pretrain` again")["model"])
    network = model.query_encoder.to(device).to(memory_format=torch.channels_last)
    views = pretraining_views(config.pretrain, manifest, device)

    def judged(name: str) -> Tensor:
        return features.extract(
            network, splits[name].images, views.plain, batch_size=BATCH, device=device, precision=precision
        )

    labels = {name: torch.as_tensor(splits[name].labels) for name in ("train", "val")}
    for kind in ("outputs", "features"):
        if kind == "features":
            network.fc = nn.Identity()
        found = {name: judged(name) for name in labels}
        for neighbours in args.neighbours:
            accuracy = features.knn_accuracy(
                found["train"], labels["train"], found["val"], labels["val"],
                neighbours=neighbours, classes=len(manifest.classes),
            )  # fmt: skip
            print(f"{newest}, {kind}, {neighbours} neighbours: {accuracy:.1%} of val")


if __name__ == "__main__":
    main()
