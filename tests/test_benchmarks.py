"""Benchmarks on a project of seconds: a record is worth nothing if its command no longer runs."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from conftest import ROOT, Moco

pytestmark = pytest.mark.slow
BUDGETS = ("4", "12")


def run(script: str, *arguments: object) -> str:
    command = [sys.executable, str(ROOT / "benchmarks" / script), *map(str, arguments)]
    # A benchmark imports what lies beside it, which moco's own processes must not do.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=280, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def pretrained(moco: Moco, project: Path) -> Path:
    assert moco("data").returncode == 0 and moco("pretrain").returncode == 0 and moco("train").returncode == 0
    torch.save(torch.arange(40) % 2, project / "oracle.pt")
    return project


@pytest.mark.long
def test_label_requests(pretrained: Path) -> None:
    more = ("--budgets", *BUDGETS, "--seeds", "2", "--rows", "rows.csv", "--plot", "plot.png")
    table = run("label_requests.py", pretrained, "oracle.pt", *more).splitlines()
    with (pretrained / "rows.csv").open() as file:
        rows = list(csv.DictReader(file))
    strategies = {row["strategy"] for row in rows}
    assert len(strategies) == 8 and len(rows) == 8 * 2 * len(BUDGETS)
    assert {int(row["classes"]) for row in rows if row["labels"] == "12"} == {2}, "the oracle knows two"
    assert table[-8 - 2] == "| strategy | 4 | 12 |" and len(table[-1].split("±")) == 3
    assert (pretrained / "plot.png").stat().st_size > 10_000


@pytest.mark.long
def test_extra_labels(pretrained: Path) -> None:
    more = ("--labels", "0", "10", "--seeds", "2", "--plot", "plot.png")
    lines = run("extra_labels.py", pretrained, "oracle.pt", *more).splitlines()
    assert lines[-2].startswith("| 0 |") and lines[-1].startswith("| 10 |")
    assert (pretrained / "plot.png").stat().st_size > 10_000


@pytest.mark.long
def test_epoch_choice(pretrained: Path) -> None:
    lines = run("epoch_choice.py", pretrained, "oracle.pt", "--labels", "0", "10", "--seeds", "2").splitlines()
    assert [line.split("|")[1].strip() for line in lines[-2:]] == ["0", "10"]
    assert all(line.count("(") == 4 for line in lines[-2:])


@pytest.mark.long
def test_probe(pretrained: Path) -> None:
    settings = "train.epochs=2", "train.epochs=2 train.weight_decay=0.1"
    lines = run("probe.py", pretrained, "oracle.pt", "--seeds", 2, "--settings", *settings).splitlines()
    assert [line.split(" | ")[0] for line in lines[-2:]] == [f"| {setting}" for setting in settings]
    assert all(line.count(" to ") == 2 for line in lines[-2:])


@pytest.mark.long
def test_finetuning(pretrained: Path) -> None:
    before = (pretrained / "params.yaml").read_bytes()
    lines = run(
        "finetuning.py", pretrained, "oracle.pt", "--settings", "finetune.lr=0.1", "finetune.pool=2"
    ).splitlines()
    assert len(lines) == 3 and lines[2].startswith("finetune.pool=2, seed 0: ") and lines[2].endswith("%")
    lines = run("finetuning.py", pretrained, "--seeds", "2", "--supervised", "0.01").splitlines()
    assert [line.split()[0] for line in lines] == ["linear", "as", "as", "baseline", "baseline"]
    assert (pretrained / "params.yaml").read_bytes() == before


def test_knn(pretrained: Path) -> None:
    lines = run("knn.py", pretrained, "--neighbours", 5).splitlines()
    assert [line.split(", ")[1] for line in lines] == ["outputs", "features"]
    monitored = json.loads((pretrained / "reports/train/metrics.json").read_text())["val_knn_accuracy"]
    wide = run("knn.py", pretrained, "--neighbours", 20).splitlines()[1]  # as stage train judges the same features
    assert wide.endswith(f"20 neighbours: {monitored:.1%} of val")


def test_selection_scale() -> None:
    lines = run("selection_scale.py", "--images", 3000, "--budget", 50, "--sklearn").splitlines()
    coverage = {line.split(":")[0]: float(line.split("coverage ")[1].split(",")[0]) for line in lines if "cov" in line}
    assert set(coverage) == {"random", "maxherding", "typiclust", "kmedoids", "coreset", "sklearn"}
    assert max(coverage, key=lambda name: coverage[name]) == "maxherding", "it is its own measure"
    assert min(coverage, key=lambda name: coverage[name]) == "random"


@pytest.mark.long
def test_request_scale(pretrained: Path) -> None:
    lines = run("request_scale.py", pretrained, "--images", 300, "--budget", 20).splitlines()
    assert lines[-1].startswith("300 images, budget 20, maxherding: ")
    assert not (pretrained / "models/request").exists(), "it works in a copy"


def test_speed() -> None:
    for work in ("step", "input"):
        lines = run("speed.py", work, "--size", 32, "--batch", 8, "--rounds", 1).splitlines()
        assert float(lines[1].split("ratio ")[1]) > 0


def test_sharing() -> None:
    lines = run("sharing.py", "--size", 16, "--batch", 8, "--seconds", 0.2, "--rounds", 1).splitlines()
    assert [line.split(" images/s")[0].count(" and ") for line in lines[1:]] == [0, 0, 1, 1, 1]
    assert lines[1].endswith("1.00 of one alone, awake")


def test_processes() -> None:
    lines = run("processes.py", "--size", 32, "--batch", 16, "--steps", 1, "--rounds", 2).splitlines()
    assert [line.count(" together ") for line in lines] == [1, 1, 1]
    assert all(float(line.split(" times")[0].split()[-1]) > 0 for line in lines[2].split(", ")[-2:])


@pytest.mark.long
def test_reference_and_ours_have_the_same_losses(tmp_path: Path) -> None:
    coarse = torch.rand(640, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    smooth = torch.nn.functional.interpolate(coarse, size=32, mode="bicubic").clamp(0, 1)
    for name in ("unlabeled", "train"):
        (tmp_path / name).mkdir()
        for number, pixels in enumerate((smooth * 255).byte().permute(0, 2, 3, 1).numpy()):
            Image.fromarray(pixels).save(tmp_path / name / f"{number}.png")
    torch.save(torch.arange(640) % 5, tmp_path / "train_label_tensor.pt")
    few = ("--images", 640, "--labelled", 100, "--batch", 64, "--queue", 256, "--epochs", 8, "--width", 8)
    lines = run("reference.py", tmp_path, "--device", "cpu", "--precision", "fp32", *few).splitlines()
    curves = {name: [float(line.split()[6]) for line in lines if name in line] for name in ("reference", "ours")}
    assert curves["reference"] == pytest.approx(curves["ours"], rel=0.06)
    # The second epoch is the first whose queue holds keys of images alone.
    assert all(curve[-1] < curve[1] for curve in curves.values()), "both learn"


def test_gpu_on_a_processor() -> None:
    few = ("--size", 32, "--batch", 8, "--queue", 16, "--calls", 2)
    lines = run("gpu.py", "--device", "cpu", "--encoder", "small_resnet", "--stem", "small", *few).splitlines()
    assert [line.split(":")[0] for line in lines[-2:]] == ["ours", "the original's design"]
