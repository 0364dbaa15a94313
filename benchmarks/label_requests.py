"""Accuracy of a classifier on labels that each strategy asks for, over the number of labels, on a real encoder.

    python benchmarks/label_requests.py PROJECT ORACLE [--validate] [--strategies random ...] [--plot PNG]

PROJECT: a folder in which `moco pretrain` has run. ORACLE: an int64 tensor with the labels of its pool. Every seed
takes four fifths of the pool; requests of growing size are answered by the oracle, each with the labels of the one before,
as `moco request` would see them; then a linear classifier is fitted on all labels so far. Strategies that need a
classifier take that of the round before, and the first round from maxherding. The accuracy is that on val, or with
`--validate`, for choosing anything, on 10,000 images of the pool that are taken out of it first.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moco.selection.strategies import NEEDS_CLASSIFIER, Pool, choose

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
    found, probabilities = [], None
    for budget in args.budgets:
        began = time.perf_counter()
        name = "maxherding" if probabilities is None and strategy in NEEDS_CLASSIFIER else strategy
        pool = Pool(features, candidates, features[known], probabilities, losses)
        chosen = choose(name, pool, budget - len(known), args.bandwidth, seed).rows
        seconds = time.perf_counter() - began
        known = torch.cat([known, chosen])
        candidates[chosen] = False
        weight, bias = fit(whole[rows[known]], truth[known], classes)
        accuracy = float(((data["test"] @ weight.T + bias).argmax(1) == data["test_labels"]).float().mean())
        if strategy in NEEDS_CLASSIFIER:
            probabilities = torch.softmax(whole[rows] @ weight.T + bias, 1)
        found.append({"strategy": strategy, "seed": seed, "labels": budget, "accuracy": accuracy,
                      "classes": len(set(truth[known].tolist())), "seconds": round(seconds, 2)})  # fmt: skip
    return found


def interval(values: list[float]) -> float:
    """Half the width of the 95 % interval of the mean (Student's t; 10 seeds: 2.262)."""
    student = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
    return student.get(len(values), 2.0) * statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0


def tell(rows: list[dict[str, Any]], budgets: tuple[int, ...]) -> None:
    print("| strategy |" + "".join(f" {budget} |" for budget in budgets) + "\n|---" + "|---" * len(budgets) + "|")
    for name in dict.fromkeys(row["strategy"] for row in rows):
        cells = []
        for budget in budgets:
            values = [100 * row["accuracy"] for row in rows if row["strategy"] == name and row["labels"] == budget]
            cells.append(f" {statistics.mean(values):.1f} ± {interval(values):.1f} |")
        print(f"| {name} |" + "".join(cells))
