"""Which epoch of the linear classifier to keep: rules compared on images of the pool, whose labels nothing else sees.

    python benchmarks/epoch_choice.py PROJECT [ORACLE] [--labels 0 60 480] [--seeds 8]

PROJECT and ORACLE as for extra_labels.py. Every seed draws so many extra labels and the held-out images of train; the
rules are to keep the best held-out epoch, the last one unless the best is ahead by so many standard errors, or the
last. As in stage `train`, the classifier is then fitted again on all labels up to that epoch.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import statistics
from pathlib import Path

import numpy as np
import torch
from extra_labels import CPU, Opened, accuracy, open_project
from torch import Tensor

from moco.data.batches import gather
from moco.data.cache import DecodedSplit
from moco.stages.train import feature_sets
from moco.training.features import extract, stratified_holdout
from moco.training.linear import fit_linear, is_significantly_better

RULES = {"best": 0.0, "last, or ahead by 1 standard error": 1.0, "last, or ahead by 2": 2.0, "last": math.inf}
TEST = 3000  # images of the pool


def one_fit(opened: Opened, rows: np.ndarray, features: Tensor, right: Tensor, seed: int) -> dict[str, float]:
    """Accuracy by rule, in per cent. rows: of the pool, whose labels are given; features, right: of the test images."""
    pool, train, classes = opened.splits["unlabeled"], opened.splits["train"], len(opened.manifest.classes)
    section = dataclasses.replace(opened.config.train, seed=seed, solver="sgd")
    assert train.labels is not None
    extra = DecodedSplit(gather(pool.images, rows), opened.truth[rows], pool.digests[rows])
    stack = feature_sets(opened.body, [train, extra] if len(rows) else [train], opened.views, section, CPU)
    labels = torch.from_numpy(np.concatenate([train.labels, opened.truth[rows]]))
    kept, held = stratified_holdout(train.labels, section.holdout, seed)
    kept = np.concatenate([kept, np.arange(len(train.labels), len(labels))])
    measured: list[float] = []
    fit_linear(
        stack[:, kept], labels[kept], stack[0, held], labels[held], classes, section,
        lambda metrics, _: measured.append(metrics["held_out_accuracy"]),
    )  # fmt: skip
    best, found, known = max(measured), {}, {}
    for rule, errors in RULES.items():
        back = is_significantly_better(best, measured[-1], len(held), errors)
        epoch = measured.index(best) + 1 if back else section.epochs
        if epoch not in known:
            known[epoch] = accuracy(stack, labels, features, right, classes, section, epoch)
        found[rule] = known[epoch]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("project", type=Path)
    parser.add_argument("oracle", type=Path, nargs="?")
    parser.add_argument("--labels", type=int, nargs="+", default=[0, 60, 480])
    parser.add_argument("--seeds", type=int, default=8)
    args = parser.parse_args()
    opened = open_project(args.project, args.oracle)
    order = np.random.default_rng(77).permutation(opened.usable)
    test, rest = np.split(order, [min(TEST, len(order) // 2)])
    images = gather(opened.splits["unlabeled"].images, test)
    features = extract(opened.body, images, opened.views.plain, batch_size=256, device=CPU)
    right = torch.from_numpy(opened.truth[test])
    print("| extra labels |" + "".join(f" {rule} |" for rule in RULES) + "\n" + "|---" * (1 + len(RULES)) + "|")
    for count in args.labels:
        drawn = [np.random.default_rng(seed).permutation(rest)[:count] for seed in range(args.seeds)]
        fits = [one_fit(opened, rows, features, right, seed) for seed, rows in enumerate(drawn)]
        cells = [[fit[rule] for fit in fits] for rule in RULES]
        row = "".join(f" {statistics.mean(values):.1f} ({min(values):.1f}) |" for values in cells)
        print(f"| {count} |{row}", flush=True)


if __name__ == "__main__":
    main()
