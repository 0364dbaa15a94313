"""Settings of the linear classifier on images of the pool, whose labels nothing else sees.

    python benchmarks/probe.py PROJECT [ORACLE] --settings train.weight_decay=0.01 "train.views=8 train.epochs=200"

PROJECT and ORACLE as for extra_labels.py; of the settings those of section `train` count. Every setting gets a
classifier per seed, fitted on all of train for all of its epochs. Printed are the mean, lowest and highest accuracy on
images of the pool, for the features as they are and for features scaled to unit length first. val is not looked at.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from extra_labels import CPU, accuracy, open_project
from finetuning import PARAMS, changes

from moco.data.batches import gather
from moco.settings.presets import edit
from moco.settings.reading import parse
from moco.stages.train import feature_sets
from moco.training.features import extract

TEST = 10_000  # images of the pool


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("project", type=Path)
    parser.add_argument("oracle", type=Path, nargs="?")
    parser.add_argument("--settings", nargs="+", default=[""], help="each a list of KEY=VALUE, separated by spaces")
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    opened = open_project(args.project, args.oracle)
    train, classes = opened.splits["train"], len(opened.manifest.classes)
    assert train.labels is not None
    labels = torch.from_numpy(train.labels)
    chosen = np.random.default_rng(77).permutation(opened.usable)[:TEST]
    images = gather(opened.splits["unlabeled"].images, chosen)
    test = extract(opened.body, images, opened.views.plain, batch_size=256, device=CPU)
    right = torch.from_numpy(opened.truth[chosen])
    print("| setting | as they are | of unit length |\n|---|---|---|", flush=True)
    for setting in args.settings:
        config = parse(edit(PARAMS.read_text(), changes(setting), "probe"), PARAMS).train
        found: dict[str, list[float]] = {"as they are": [], "of unit length": []}
        for seed in range(args.seeds):
            seeded = dataclasses.replace(config, seed=seed)
            stack = feature_sets(opened.body, [train], opened.views, seeded, CPU)
            found["as they are"].append(accuracy(stack, labels, test, right, classes, seeded, seeded.epochs))
            unit = F.normalize(stack, dim=2), labels, F.normalize(test, dim=1)
            found["of unit length"].append(accuracy(*unit, right, classes, seeded, seeded.epochs))
        cells = [f"{statistics.mean(row):.2f} ({min(row):.2f} to {max(row):.2f})" for row in found.values()]
        print(f"| {setting or 'as params.yaml has it'} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
