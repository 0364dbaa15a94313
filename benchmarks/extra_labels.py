"""Accuracy on val over the number of extra labels, chosen at random, all of them right.

    python benchmarks/extra_labels.py PROJECT [ORACLE] [--labels 0 100 500 2000] [--seeds 5] [--plot PNG]

PROJECT: a folder in which `moco pretrain` has run. ORACLE: int64 labels of its pool; not needed where the
project's images are drawn. Each seed draws an order of the pool, of which the first so many get their labels, and stage
`train`'s classifier is fitted with the settings of the project, on the same held-out images. Means come with half their
95 % interval, and so does what is gained over the first of --labels, seed by seed. A shifted file is tried as well: the
agreement that `train_extra` checks before training is printed for right and for slipped labels.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
from pathlib import Path

import numpy as np
import torch
from label_requests import interval
from torch import Tensor, nn

from moco.data.batches import gather
from moco.data.cache import DecodedSplit
from moco.data.manifest import Manifest, load_manifest
from moco.data.prepare import open_decoded
from moco.encoders.encoder import build_encoder, load_body, strip_head
from moco.exchange.encoder_file import load_encoder
from moco.files import scratch_folder
from moco.labels.plausibility import check_labels
from moco.labels.pool_names import drawn_labels
from moco.settings.reading import load
from moco.settings.schema import Config
from moco.settings.train import TrainConfig
from moco.stages.train import classify, linear_views
from moco.training.linear import fit_linear
from moco.views.views import Views

CPU = torch.device("cpu")


@dataclasses.dataclass
class Opened:
    """A pretrained project. truth: labels of the pool; usable: rows of it that are neither in train nor in val."""

    config: Config
    manifest: Manifest
    splits: dict[str, DecodedSplit]
    truth: np.ndarray
    usable: np.ndarray
    body: nn.Module
    views: Views


def open_project(project: Path, oracle: Path | None) -> Opened:
    """Makes the project's folder the current one."""
    labels = torch.load(oracle.resolve(), weights_only=True).numpy() if oracle else None
    os.chdir(project)
    config, manifest = load(Path("params.yaml")), load_manifest(Path("models/manifest.json"))
    splits = open_decoded(config.data, manifest, scratch_folder(config.runtime.scratch), print)
    pool, known = splits["unlabeled"], {bytes(d) for name in ("train", "val") for d in splits[name].digests}
    truth = drawn_labels(np.arange(len(pool.images)), config.data) if labels is None else labels
    usable = np.array([row for row, digest in enumerate(pool.digests) if bytes(digest) not in known])
    encoder = load_encoder(Path("models/encoder.pth"))
    network = build_encoder(encoder.architecture, len(manifest.classes))
    load_body(network, encoder.weights)
    return Opened(config, manifest, splits, truth, usable, strip_head(network), linear_views(manifest, CPU))


def accuracy(
    stack: Tensor, labels: Tensor, test: Tensor, right: Tensor, classes: int, config: TrainConfig, epochs: int
) -> float:
    """In per cent, of a classifier fitted on all labels for so many epochs of the schedule. stack: V x N x D, of the
    labelled images; test: M x D."""
    nothing = stack[0, :0], labels[:0]
    fit = fit_linear(stack, labels, *nothing, classes, config, lambda *_: None, stop_after=epochs)
    return 100 * float(((test @ fit.weight.T + fit.bias).argmax(1) == right).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("project", type=Path)
    parser.add_argument("oracle", type=Path, nargs="?")
    parser.add_argument("--labels", type=int, nargs="+", default=[0, 100, 500, 2000])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    picture = args.plot and args.plot.absolute()
    opened = open_project(args.project, args.oracle)
    splits, pool, truth, classes = opened.splits, opened.splits["unlabeled"], opened.truth, len(opened.manifest.classes)
    found: dict[int, list[float]] = {count: [] for count in args.labels}
    for seed in range(args.seeds):
        order = np.random.default_rng(seed).permutation(opened.usable)
        section = dataclasses.replace(opened.config.train, seed=seed)
        for count in args.labels:
            rows = order[:count]
            given = dict(splits)
            if count:
                given["extra"] = DecodedSplit(gather(pool.images, rows), truth[rows], pool.digests[rows])

            def agreement(features: Tensor, rows: np.ndarray = rows) -> None:
                labels = splits["train"].labels
                assert labels is not None
                first, right = len(labels), torch.from_numpy(truth[rows])
                for name, new in (("right", right), ("slipped", right.roll(1))):
                    check = check_labels(features[:first], torch.from_numpy(labels), features[first:], new, classes)
                    parts = " ".join(f"{run.agreement:.2f}{' refused' * run.suspicious}" for run in check.runs)
                    print(f"  agreement of {name} labels, by part: {parts or 'too few to tell'}", flush=True)

            look = agreement if count and not seed else lambda _: None
            _, results, _ = classify(
                opened.body, given, opened.views, section, classes, CPU, lambda *_: None, None, look
            )  # fmt: skip
            found[count].append(100 * results["val_accuracy"])
            print(f"seed {seed}, {count} extra labels: {found[count][-1]:.2f} %", flush=True)
    print(f"| extra labels | mean | lowest to highest | more than with {args.labels[0]}, by seed |\n|---|---|---|---|")
    for count, values in found.items():
        gains = [value - before for value, before in zip(values, found[args.labels[0]], strict=True)]
        print(f"| {count} | {statistics.mean(values):.1f} ± {interval(values):.1f} % | {min(values):.1f} to "
              f"{max(values):.1f} | {statistics.mean(gains):+.1f} ± {interval(gains):.1f} |")  # fmt: skip
    if picture:
        plot(found, f"{len(splits['train'].images)} labels, and so many more", picture)


def plot(found: dict[int, list[float]], title: str, picture: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    means = [statistics.mean(values) for values in found.values()]
    axes.errorbar(list(found), means, yerr=[interval(v) for v in found.values()], marker="o", capsize=3)
    axes.set(xlabel="extra labels, chosen at random", ylabel="linear accuracy on val, %", title=title)
    axes.grid(alpha=0.3)
    figure.savefig(picture, dpi=110)


if __name__ == "__main__":
    main()
