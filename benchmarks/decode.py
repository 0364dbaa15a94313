"""Building the decoded cache from PNG files in squashfs, beside nothing but decoding them, on all cores.

    python benchmarks/decode.py student_dataset.sqsh [--files dataset]

The second decodes the same files, read into memory before, in as many processes; what it takes is the least that any
build can. In turns, each from new processes; the ratio is build over decoding, 1 being the bound.
"""

from __future__ import annotations

import argparse
import io
import os
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from PIL import Image

PRESETS = Path(__file__).resolve().parent.parent / "presets"
ROUNDS = 3


def decode(files: list[bytes]) -> int:
    return sum(np.asarray(Image.open(io.BytesIO(file)).convert("RGB")).shape[0] for file in files)


def bound(files: list[bytes], workers: int) -> float:
    """Seconds in the processes alone: they are started before."""
    with ProcessPoolExecutor(workers, mp_context=get_context("fork")) as pool:
        list(pool.map(decode, [files[:1]] * workers))
        parts = [files[n::workers] for n in range(workers)]
        began = time.perf_counter()
        list(pool.map(decode, parts))
        return time.perf_counter() - began


def main() -> None:
    # Not at the top: the cache's workers import this file as well, and torch in it would be counted as building.
    from moco.data.prepare import prepare
    from moco.settings.presets import edit, render
    from moco.settings.reading import parse

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--files", type=Path, help="folder with the images that were packed; else beside the .sqsh")
    args = parser.parse_args()
    root = args.files or args.data.parent / "dataset"
    files = [path.read_bytes() for path in sorted(root.rglob("*.png"))]
    workers = len(os.sched_getaffinity(0))
    config = parse(edit(render(PRESETS, "cifar10"), {"data.path": str(args.data)}, "decode"), Path("params.yaml"))
    builds, bounds = [], []
    for _ in range(ROUNDS):
        bounds.append(bound(files, workers))
        with tempfile.TemporaryDirectory() as scratch:
            began = time.perf_counter()
            prepare(config.data, Path(scratch), lambda _: None)
            builds.append(time.perf_counter() - began)
    ratio = statistics.median(a / b for a, b in zip(builds, bounds, strict=True))
    print(f"{len(files)} images, {workers} cores: built in {statistics.median(builds):.1f} s, decoding alone "
          f"{statistics.median(bounds):.1f} s, ratio {ratio:.2f}")  # fmt: skip


if __name__ == "__main__":
    main()
