"""Accuracy of a classifier on labels that each strategy asks for, over the number of labels, on a real encoder.

    python benchmarks/label_requests.py PROJECT ORACLE [--validate] [--strategies random ...] [--plot PNG]

PROJECT: a folder in which `moco pretrain` has run. ORACLE: an int64 tensor with the labels of its pool. Every seed
takes four fifths of the pool; requests of growing size are answered by the oracle, each with the labels of the one
before, as `moco request` would see them; then a linear classifier is fitted on all labels so far. Strategies that need
a classifier take that of the round before, and the first round from maxherding. The accuracy is that on val, or with
`--validate`, for choosing anything, on 10,000 images of the pool that are taken out of it first.
"""

from __future__ import annotations

import argparse
import csv
import math
import os
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from scipy.stats import t
from torch import Tensor

from moco.labels.selection.clusters import margins
from moco.labels.selection.strategies import NEEDS_CLASSIFIER, Pool, choose, reduced

BUDGETS = (10, 20, 50, 100, 500)
STRATEGIES = (
    "random", "loss", "kmedoids", "typiclust", "maxherding", "uncertainty_herding", "margin", "coreset",
)  # fmt: skip
COLUMNS = ("strategy", "seed", "labels", "accuracy", "classes", "seconds")
HELD = 10_000


def fit(features: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Logistic regression on unit-length features, weight decay 0.001 / labels, by L-BFGS: exact, and the same for few
    labels and many, which the schedule of stage `train` is not."""
    weight = torch.zeros(classes, features.shape[1], requires_grad=True)
    bias = torch.zeros(classes, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(10 * features @ weight.T + bias, labels) + 0.01 * weight.square().sum() / len(labels)
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[arg-type]
    return weight.detach() * 10, bias.detach()


def one_run(strategy: str, seed: int, data: dict[str, Any], args: argparse.Namespace) -> list[dict[str, Any]]:
    whole, labels, classes = data["features"], data["labels"], int(data["labels"].max()) + 1
    order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(1000 + seed))
    rows = order[: len(whole) * 4 // 5].sort().values
    features, truth = data["reduced"][rows], labels[rows]
    losses = data["losses"][rows] if data["losses"] is not None else None
    candidates = torch.ones(len(rows), dtype=torch.bool)
    known = torch.empty(0, dtype=torch.int64)
    found, unsure = [], None
    for budget in args.budgets:
        began = time.perf_counter()
        name = "maxherding" if unsure is None and strategy in NEEDS_CLASSIFIER else strategy
        pool = Pool(features, candidates, features[known], unsure, losses)
        chosen = choose(name, pool, budget - len(known), args.bandwidth, seed).rows
        seconds = time.perf_counter() - began
        known = torch.cat([known, chosen])
        candidates[chosen] = False
        weight, bias = fit(whole[rows[known]], truth[known], classes)
        accuracy = float(((data["test"] @ weight.T + bias).argmax(1) == data["test_labels"]).float().mean())
        if strategy in NEEDS_CLASSIFIER:
            unsure = margins(torch.softmax(whole[rows] @ weight.T + bias, 1))
        found.append({"strategy": strategy, "seed": seed, "labels": budget, "accuracy": accuracy,
                      "classes": len(set(truth[known].tolist())), "seconds": round(seconds, 2)})  # fmt: skip
    return found


def interval(values: list[float]) -> float:
    """Half the width of the 95 % interval of the mean, by Student's t; not a number for a single value."""
    count = len(values)
    return float(t.ppf(0.975, count - 1)) * statistics.stdev(values) / count**0.5 if count > 1 else math.nan


def tell(rows: list[dict[str, Any]], budgets: tuple[int, ...]) -> None:
    print("| strategy |" + "".join(f" {budget} |" for budget in budgets) + "\n|---" + "|---" * len(budgets) + "|")
    for name in dict.fromkeys(row["strategy"] for row in rows):
        cells = []
        for budget in budgets:
            values = [100 * row["accuracy"] for row in rows if row["strategy"] == name and row["labels"] == budget]
            cells.append(f" {statistics.mean(values):.1f} ± {interval(values):.1f} |")
        print(f"| {name} |" + "".join(cells))


def plot(rows: list[dict[str, Any]], budgets: tuple[int, ...], picture: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for name in dict.fromkeys(row["strategy"] for row in rows):
        every = [[100 * row["accuracy"] for row in rows if row["strategy"] == name and row["labels"] == budget]
                 for budget in budgets]  # fmt: skip
        style = {"color": "black", "linestyle": "--"} if name == "random" else {}
        means = [statistics.mean(values) for values in every]
        axes.errorbar(budgets, means, yerr=[interval(v) for v in every], marker="o", capsize=3, label=name, **style)
    axes.set_xscale("log")
    axes.set_xticks(budgets, [str(budget) for budget in budgets])
    axes.set(
        xlabel="labels, of 10 classes", ylabel="linear accuracy on val, %", title="CIFAR-10: which images to label"
    )
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(picture, dpi=110)


def open_data(args: argparse.Namespace) -> dict[str, Any]:
    """Features and labels of the pool, and of what the accuracy is measured on."""
    from moco.data.manifest import load_manifest
    from moco.data.prepare import open_decoded
    from moco.encoders.encoder import build_encoder, last_width, load_body, strip_head
    from moco.exchange.encoder_file import load_encoder
    from moco.files import scratch_folder
    from moco.settings.reading import load
    from moco.stages.request import pool_losses
    from moco.stages.train import Inputs, linear_views
    from moco.training.features import extract
    from moco.training.numerics import choose_precision

    oracle = torch.load(args.oracle.resolve(), weights_only=True)
    os.chdir(args.project)
    device = torch.device("cpu")
    config, manifest = load(Path("params.yaml")), load_manifest(Path("models/manifest.json"))
    splits = open_decoded(config.data, manifest, scratch_folder(config.runtime.scratch), print)
    encoder = load_encoder(Path("models/encoder.pth"))
    network = build_encoder(encoder.architecture, 1)
    load_body(network, encoder.weights)
    last = last_width(network)
    body = strip_head(network).to(memory_format=torch.channels_last)
    views, precision = linear_views(manifest, device), choose_precision(config.pretrain.precision, device)

    def of(name: str) -> Tensor:
        return extract(body, splits[name].images, views.plain, batch_size=256, device=device, precision=precision)

    pool = of("unlabeled")
    inputs = Inputs(device, manifest, encoder, splits)
    losses = None
    if "loss" in args.strategies:
        losses = pool_losses(config, inputs, config.request.loss_views, 0)
    unit, small = F.normalize(pool, dim=1), reduced(pool[:, -last:], config.request.dimensions)
    if not args.validate:
        test, labels = F.normalize(of("val"), dim=1), torch.from_numpy(splits["val"].labels)
        return {"features": unit, "reduced": small, "labels": oracle, "losses": losses, "test": test,
                "test_labels": labels}  # fmt: skip
    order = torch.randperm(len(unit), generator=torch.Generator().manual_seed(5))
    test, rest = order[:HELD], order[HELD:]
    return {"features": unit[rest], "reduced": small[rest], "labels": oracle[rest], "test": unit[test],
            "losses": None if losses is None else losses[rest], "test_labels": oracle[test]}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("project", type=Path)
    parser.add_argument("oracle", type=Path)
    parser.add_argument("--strategies", nargs="+", default=STRATEGIES, choices=STRATEGIES)
    parser.add_argument("--budgets", type=int, nargs="+", default=BUDGETS)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--bandwidth", type=float, default=0.8)
    parser.add_argument("--validate", action="store_true")
    parser.add_argument("--rows", type=Path, default=Path("label_requests.csv"))
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    args.rows, picture = args.rows.absolute(), args.plot and args.plot.absolute()
    data = open_data(args)
    rows: list[dict[str, Any]] = []
    with args.rows.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for seed in range(args.seeds):
            for strategy in args.strategies:
                found = one_run(strategy, seed, data, args)
                writer.writerows(found)
                file.flush()
                rows += found
    tell(rows, tuple(args.budgets))
    if picture:
        plot(rows, tuple(args.budgets), picture)


if __name__ == "__main__":
    main()
