"""Accuracy on CIFAR-10's val over minutes of pretraining on two CPU cores: this project, and the original's design.

    python benchmarks/curve.py student_dataset.sqsh ours --minutes 20 60 120
    python benchmarks/curve.py student_dataset.sqsh original --minutes 20 60 120
    python benchmarks/curve.py --plot docs/accuracy-over-minutes.png

`ours` runs `moco data`, `pretrain` and `train` with the preset cifar10. `original` takes the same network, and the
settings, loader and steps of original.py; its classifier is that of stage `train`, which is kind to it. Every length
is a run of its own, as the schedules end with it; val is measured once, at the end. Rows are added to curve.csv. On a
machine that does other things as well, `--rate R` ends a run after as many images as R a second would be in its
minutes, R being the mean over a run that was measured while the machine did nothing else.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import original
import torch

from moco.data.manifest import load_manifest
from moco.data.prepare import open_decoded
from moco.encoders.encoder import build_encoder, strip_head
from moco.files import scratch_folder
from moco.settings.presets import edit, render
from moco.settings.reading import load
from moco.stages.train import classify, linear_views
from moco.training.architecture import described
from moco.training.numerics import set_up

HERE = Path(__file__).resolve().parent
CPU = torch.device("cpu")
COLUMNS = ("design", "minutes", "seed", "images", "linear", "knn", "commit", "date")
BATCH, QUEUE, LR = 512, 2048, 0.0075  # the original's; the rate is that of a batch of 64 and was not scaled


def ours(data: Path, minutes: float, seed: int, rate: float | None, folder: Path) -> dict[str, Any]:
    """Runs the stages' commands in an empty folder."""
    values: dict[str, Any] = {"data.path": str(data), "pretrain.seed": seed, "tracking.uri": ""}
    values |= {"pretrain.minutes": minutes, "pretrain.epochs": 100_000}  # the clock decides
    if rate is not None:
        epochs = max(1, round(rate * 60 * minutes / 50_000))
        values |= {"pretrain.minutes": None, "pretrain.epochs": epochs}
    (folder / "params.yaml").write_text(edit(render(HERE.parent / "presets", "cifar10"), values, "curve"))
    for stage in ("data", "pretrain", "train"):
        subprocess.run([Path(sys.executable).with_name("moco"), stage], cwd=folder, check=True)
    pretrained = json.loads((folder / "reports/pretrain/metrics.json").read_text())
    found = json.loads((folder / "reports/train/metrics.json").read_text())
    return {"images": int(pretrained["images_seen"]), "linear": found["val_accuracy"], "knn": found["val_knn_accuracy"]}


def originals(data: Path, minutes: float, seed: int, rate: float | None, folder: Path) -> dict[str, Any]:
    """data: beside the .sqsh stands the folder `dataset` that it was packed from, whose files the loader reads."""
    values = {"data.path": str(data), "train.seed": seed}
    (folder / "params.yaml").write_text(edit(render(HERE.parent / "presets", "cifar10"), values, "curve"))
    subprocess.run([Path(sys.executable).with_name("moco"), "data"], cwd=folder, check=True)
    config, manifest = load(folder / "params.yaml"), load_manifest(folder / "models/manifest.json")
    splits = open_decoded(config.data, manifest, scratch_folder(config.runtime.scratch), print)
    torch.manual_seed(seed)
    original.MEAN, original.STD = manifest.mean, manifest.std  # as the classifier will
    step = original.Step(build_encoder(described(config.pretrain), 1), QUEUE)
    pool = data.parent / "dataset" / "unlabeled"
    loader = original.load(original.TwoViews(pool, len(splits["unlabeled"].images), manifest.height), BATCH)
    images, began, done = 0, time.perf_counter(), 0.0
    while done < 1:
        for a, b in loader:
            step.optimizer.param_groups[0]["lr"] = LR * 0.5 * (1 + math.cos(math.pi * done))
            step(a, b)
            images += BATCH
            spent = images / rate if rate else time.perf_counter() - began
            done = spent / (60 * minutes)
            if done >= 1:
                break
    views = linear_views(manifest, CPU)
    _, found, _ = classify(
        strip_head(step.query), splits, views, config.train, len(manifest.classes), CPU, lambda *_: None
    )
    return {"images": images, "linear": found["val_accuracy"], "knn": found["val_knn_accuracy"]}


def add_row(path: Path, row: dict[str, Any]) -> None:
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)


def plot(rows: Path, picture: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with rows.open() as file:
        found = list(csv.DictReader(file))
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for design, name, marker in (("ours", "this project", "o"), ("original", "design of the original", "s")):
        lengths = sorted({float(row["minutes"]) for row in found if row["design"] == design})
        every = [[100 * float(row["linear"]) for row in found if row["design"] == design
                  and float(row["minutes"]) == minutes] for minutes in lengths]  # fmt: skip
        means = [sum(values) / len(values) for values in every]
        reach = [[m - min(v) for m, v in zip(means, every, strict=True)],
                 [max(v) - m for m, v in zip(means, every, strict=True)]]  # fmt: skip
        axes.errorbar(lengths, means, yerr=reach, marker=marker, capsize=3, label=name)
    axes.set(xlabel="minutes of pretraining on two CPU cores, at the rate of an idle machine (120: of one in use)",
             ylabel="linear accuracy on val, %",
             title="CIFAR-10: 50,000 images without labels, 5,000 with")  # fmt: skip
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(picture, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, nargs="?", help="student_dataset.sqsh of CIFAR-10")
    parser.add_argument("design", choices=["ours", "original"], nargs="?", default="ours")
    parser.add_argument("--minutes", type=float, nargs="+", default=[20.0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rate", type=float, help="images per second, the mean of a run on an idle machine")
    parser.add_argument("--rows", type=Path, default=HERE / "curve.csv")
    parser.add_argument("--plot", type=Path, help="draw the rows, run nothing")
    args = parser.parse_args()
    if args.plot:
        plot(args.rows, args.plot)
        return
    if args.data is None:
        parser.error("name the dataset")
    set_up(CPU, 0)
    git = ["git", "-C", str(HERE), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    for minutes in args.minutes:
        with tempfile.TemporaryDirectory() as work:
            run = ours if args.design == "ours" else originals
            found = run(args.data.resolve(), minutes, args.seed, args.rate, Path(work))
        row = {"design": args.design, "minutes": minutes, "seed": args.seed, "commit": commit,
               "date": datetime.date.today().isoformat(), **found}  # fmt: skip
        print(row)
        add_row(args.rows, row)


if __name__ == "__main__":
    main()
