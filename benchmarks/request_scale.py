"""Seconds and memory of the whole stage `request` where the pool is as large as the original's.

    python benchmarks/request_scale.py PROJECT [--images 512000] [--budget 12800] [--strategy maxherding]

PROJECT: a folder in which `moco data`, `pretrain` and `train` have run. Its pool is blown up by random crops, mirrored
or not, of its own images; `moco request` runs on that in a copy of the project, as a user runs it: reading all images,
their features, the choice, the near copies, form and gallery. Memory is the peak of that process, the memory map of the
images, which the system may drop at any time, included. Not for a class tree, whose files the request names.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from moco.data import cache, prepare
from moco.data.batches import gather
from moco.data.cache import DecodedSplit
from moco.data.dataset import Dataset, Split
from moco.data.manifest import Manifest, load_manifest
from moco.files import scratch_folder
from moco.settings.presets import edit
from moco.settings.reading import load
from moco.views.views import Views, recipe

BLOCK = 4096
CROPS = (0.3, 0.8)  # of the area: few near copies of the image, or of each other
PEAK = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""  # in a process between: a child's peak begins with that of the process that starts it


def blown_up(images: np.ndarray, count: int) -> np.ndarray:
    """count x H x W x 3 uint8."""
    height, device = images.shape[1], torch.device("cpu")
    views = Views(recipe("crop", CROPS, (0.1, 2.0)), height, (0.0,) * 3, (1.0,) * 3, device)
    generator, rows = torch.Generator().manual_seed(0), np.arange(count) % len(images)
    found = np.empty((count, *images.shape[1:]), np.uint8)
    for first in range(0, count, BLOCK):
        part = torch.from_numpy(gather(images, rows[first : first + BLOCK]))
        crops = views(views.to_unit(part), generator).float().mul(255).round().clamp(0, 255).byte()
        found[first : first + BLOCK] = crops.permute(0, 2, 3, 1).numpy()
    return found


def install(project: Path, splits: dict[str, DecodedSplit], pool: np.ndarray, scratch: Path) -> Manifest:
    """Cache and manifest of the data with the large pool, as `moco data` leaves them."""
    config, classes = load(project / "params.yaml"), load_manifest(project / "models/manifest.json").classes
    parts = {name: Split(name, array=split.images, labels=split.labels) for name, split in splits.items()}
    parts["unlabeled"].array = pool
    dataset = Dataset(parts, classes, {"kind": config.data.source})
    built = cache.build(dataset, None, cache.caches(scratch), print)
    manifest = prepare._describe(dataset, classes, config.data, built)
    cache.install(built, manifest.digest, scratch)
    (project / "models/manifest.json").write_text(manifest.to_json())
    return manifest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("project", type=Path)
    parser.add_argument("--images", type=int, default=512_000)
    parser.add_argument("--budget", type=int, default=12_800)
    parser.add_argument("--strategy", default="maxherding")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "project"
        shutil.copytree(args.project / "models", copy / "models")
        before = Path.cwd()
        os.chdir(args.project)
        config, manifest = load(Path("params.yaml")), load_manifest(Path("models/manifest.json"))
        if config.data.source == "classes":
            parser.error("PROJECT has a class tree")
        splits = prepare.open_decoded(config.data, manifest, scratch_folder(config.runtime.scratch), print)
        text = edit(Path("params.yaml").read_text(), {"runtime.scratch": folder, "request.answers": "people"}, "scale")
        os.chdir(before)
        (copy / "params.yaml").write_text(text)
        install(copy, splits, blown_up(splits["unlabeled"].images, args.images), Path(folder))
        command = [sys.executable, "-c", PEAK, str(Path(sys.executable).with_name("moco")), "request"]
        command += ["--strategy", args.strategy, "--budget", str(args.budget)]
        began = time.perf_counter()
        done = subprocess.run(command, cwd=copy, check=True, stdout=subprocess.PIPE, text=True)
        seconds = time.perf_counter() - began
        print((copy / "reports/request/metrics.json").read_text())
    memory = int(done.stdout.split()[-1]) / 1e6
    print(f"{args.images} images, budget {args.budget}, {args.strategy}: {seconds:.0f} s, peak {memory:.1f} GB")


if __name__ == "__main__":
    main()
