"""Accuracy after fine-tuning, beside the linear classifier and supervised training from scratch in the same time.

    python benchmarks/finetuning.py PROJECT ORACLE --settings "finetune.lr=0.03" "finetune.lr=0.03 finetune.mixup=0.2"
    python benchmarks/finetuning.py PROJECT --seeds 3 [--supervised MINUTES]

PROJECT: a folder in which `moco data`, `pretrain` and `train` have run. With ORACLE, the int64 labels of its pool, val
is left alone and settings are compared by their accuracy on 10,000 images of the pool. Without, stage `finetune` runs
as params.yaml has it, for every seed, and is measured on val, and so is stage `baseline` with `--supervised`, for that
many minutes. Stages run as a user runs them, so PROJECT's results are those of the last run.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from moco.data.batches import gather
from moco.data.manifest import load_manifest
from moco.data.prepare import open_decoded
from moco.encoders.encoder import build_encoder
from moco.exchange.classifier_files import read_classifier
from moco.files import scratch_folder
from moco.settings.presets import edit
from moco.settings.reading import load
from moco.stages.train import linear_views
from moco.training.features import extract

CPU = torch.device("cpu")
HELD = 10_000
PARAMS = Path("params.yaml")


def changes(setting: str) -> dict[str, Any]:
    """By key, of a list of KEY=VALUE, separated by spaces."""
    return {key: yaml.safe_load(value) for key, value in (each.split("=") for each in setting.split())}


def run(stage: str) -> dict[str, Any]:
    """The report of a stage that has run."""
    with contextlib.suppress(FileNotFoundError):
        Path(f"reports/{stage}/metrics.json").unlink()
    subprocess.run([Path(sys.executable).with_name("moco"), stage], check=True, stdout=subprocess.DEVNULL)
    found: dict[str, Any] = json.loads(Path(f"reports/{stage}/metrics.json").read_text())
    return found


def pool_accuracy(folder: Path, oracle: np.ndarray) -> float:
    """Of a classifier, on images of the pool, always the same."""
    config, manifest = load(PARAMS), load_manifest(Path("models/manifest.json"))
    pool = open_decoded(config.data, manifest, scratch_folder(config.runtime.scratch), lambda _: None)["unlabeled"]
    rows = np.random.default_rng(7).permutation(len(pool.images))[:HELD]
    found = read_classifier(folder)
    network = build_encoder(found.architecture, len(found.classes))
    network.load_state_dict(found.weights)
    plain = linear_views(manifest, CPU).plain
    outputs = extract(network, gather(pool.images, rows), plain, batch_size=256, device=CPU)
    return float((outputs.argmax(1).numpy() == oracle[rows]).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("project", type=Path)
    parser.add_argument("oracle", type=Path, nargs="?")
    parser.add_argument("--settings", nargs="+", default=[""], help="each a list of KEY=VALUE, separated by spaces")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--supervised", type=float, metavar="MINUTES")
    args = parser.parse_args()
    oracle = torch.load(args.oracle.resolve(), weights_only=True).numpy() if args.oracle else None
    os.chdir(args.project)
    text = PARAMS.read_text()
    try:
        if oracle is None:
            print("linear", {key: round(value, 4) for key, value in run("train").items()}, flush=True)
        else:
            print(f"linear: {pool_accuracy(Path('models/classifier'), oracle):.2%} on images of the pool", flush=True)
        for setting in args.settings:
            values = changes(setting)
            for seed in range(args.seeds):
                PARAMS.write_text(edit(text, {**values, "finetune.seed": seed}, "finetuning"))
                found = run("finetune")
                row = f"{setting or 'as it is'}, seed {seed}: {found['minutes']:.1f} min, epoch {found['best_epoch']}, "
                row += f"held out {found['held_out_accuracy']:.2%}, "
                if oracle is None:
                    print(row + f"val {found['val_accuracy']:.2%}", flush=True)
                else:
                    print(row + f"pool {pool_accuracy(Path('models/finetuned'), oracle):.2%}", flush=True)
        for seed in range(args.seeds if args.supervised else 0):
            values = {"baseline.minutes": args.supervised, "baseline.epochs": 1_000_000, "baseline.seed": seed}
            PARAMS.write_text(edit(text, values, "finetuning"))
            print("baseline", seed, {key: round(value, 4) for key, value in run("baseline").items()}, flush=True)
    finally:
        PARAMS.write_text(text)


if __name__ == "__main__":
    main()
