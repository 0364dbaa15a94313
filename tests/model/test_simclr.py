"""SimCLR: the loss against a reference in float64, and the method through the training step."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from conftest import Moco, assert_one_line_error, write_params
from moco.methods.simclr import nt_xent
from moco.tracking.metric_log import read_events


def reference(a: Tensor, b: Tensor, temperature: float) -> tuple[float, float]:
    """Equation 1, term by term, in the numbers of Python."""
    views = [row.tolist() for row in torch.cat([a, b]).double()]
    count = len(views)

    def similarity(i: int, j: int) -> float:
        return sum(x * y for x, y in zip(views[i], views[j], strict=True)) / temperature

    total, hits = 0.0, 0
    for i in range(count):
        positive = (i + count // 2) % count
        others = [similarity(i, j) for j in range(count) if j != i]
        total -= similarity(i, positive) - math.log(sum(map(math.exp, others)))
        hits += similarity(i, positive) == max(others) and others.count(max(others)) == 1
    return total / count, hits / count


@pytest.mark.parametrize("temperature", [0.1, 0.5, 2.0])
def test_the_loss_is_the_papers(temperature: float) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (nn.functional.normalize(torch.randn(7, 5, generator=generator), dim=1) for _ in range(2))
    loss, accuracy = nt_xent(a, (a + 0.8 * b) / (a + 0.8 * b).norm(dim=1, keepdim=True), temperature)
    wanted = reference(a, (a + 0.8 * b) / (a + 0.8 * b).norm(dim=1, keepdim=True), temperature)
    assert loss.item() == pytest.approx(wanted[0], rel=1e-5)
    assert accuracy.item() == pytest.approx(wanted[1])


def test_collapsed_features_find_nothing() -> None:
    same = torch.ones(4, 3) / math.sqrt(3)
    loss, accuracy = nt_xent(same, same, 0.5)
    assert accuracy.item() == 0 and loss.item() == pytest.approx(math.log(7), rel=1e-5)


def test_the_whole_pipeline_runs_with_it(moco: Moco, project: Path) -> None:
    write_params(project, pretrain__method="simclr", pretrain__epochs=3)
    for stage in ("data", "pretrain", "train", "eval"):
        done = moco(stage)
        assert done.returncode == 0, done.stderr
    (run,) = (project / "runs/pretrain").iterdir()
    logged = {name for event in read_events(run / "metrics.jsonl") for name in event.get("metrics", {})}
    assert {"loss", "contrast_accuracy", "lr"} <= logged and "key_momentum" not in logged
    assert json.loads((project / "reports/eval/metrics.json").read_text())["val_accuracy"] >= 0


def test_it_is_another_run_than_momentum_contrast(moco: Moco, project: Path) -> None:
    made = []
    for method in ("moco_v2", "simclr"):
        write_params(project, pretrain__method=method)
        assert moco("data").returncode == 0 and moco("pretrain").returncode == 0
        made.append((project / "models/encoder.pth").read_bytes())
    assert made[0] != made[1] and len(list((project / "runs/pretrain").iterdir())) == 2


def test_its_batch_is_not_split(moco: Moco, project: Path) -> None:
    write_params(project, pretrain__method="simclr", pretrain__accumulate=2)
    assert_one_line_error(moco("pretrain"), "pretrain.accumulate", "E-PRETRAIN-ACCUMULATE")
