"""Two processes of one thread each against one of one thread: the same global batch, `moco pretrain`'s own step.

    python benchmarks/processes.py [--encoder small_resnet --size 32 --batch 128]

Each count is started anew by torchrun, in turns, and with them two processes apart: half of the batch each, at the same
time, without a word to each other. That is the most that this machine could give two.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import original
import torch
from speed import settings

from moco.data.views import Views, recipe
from moco.stages.contrast import ContrastStep
from moco.training.distributed import from_environment
from moco.training.numerics import choose_precision, set_up

STEPS, WARM_UP, ROUNDS = 25, 5, 3
CPU = torch.device("cpu")
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}


def work(args: argparse.Namespace) -> None:
    """One of the processes; rank 0 writes the seconds of a step."""
    set_up(CPU, 1)
    processes = from_environment()
    stem = "small" if args.size <= 40 else "imagenet"
    config = settings(encoder=args.encoder, stem=stem, batch_size=args.batch)
    views = Views(recipe("v2_no_blur", (0.2, 1.0), (0.1, 2.0)), args.size, original.MEAN, original.STD, CPU)
    mine = args.batch // processes.size
    images = torch.randint(0, 256, (mine, args.size, args.size, 3), dtype=torch.uint8)
    with processes.joined(CPU):
        step = ContrastStep(config, views, CPU, choose_precision("auto", CPU), args.batch, processes)
        spent = []
        for number in range(WARM_UP + STEPS):
            began = time.perf_counter()
            step(np.arange(mine), images, 0.0, number)
            spent.append(time.perf_counter() - began)
    if processes.rank == 0:
        Path(args.result).write_text(str(statistics.median(spent[WARM_UP:])))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", default="small_resnet")
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--result", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.result:
        work(args)
        return
    ratios: dict[str, list[float]] = {"together": [], "apart": []}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(ROUNDS):
            one = together(args, 1, Path(folder) / "one")
            ratios["together"].append(one / together(args, 2, Path(folder) / "two"))
            ratios["apart"].append(one / apart(args, Path(folder)))
            print(f"one process {args.batch / one:.0f} images/s; two", *(
                f"{name} {found[-1]:.2f} times that" for name, found in ratios.items()))  # fmt: skip
    print(f"{args.encoder}, {args.size} px, batch {args.batch}: two processes", ", ".join(
        f"{name} {statistics.median(found):.2f} times one" for name, found in ratios.items()))  # fmt: skip


def together(args: argparse.Namespace, count: int, result: Path) -> float:
    """Seconds of a step in so many processes."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(count), __file__]
    subprocess.run([*torchrun, *words(args, args.batch, result)], check=True, stderr=subprocess.DEVNULL, env=ONE_THREAD)
    return float(result.read_text())


def apart(args: argparse.Namespace, folder: Path) -> float:
    """Seconds of a step of the slower of two that know nothing of each other."""
    results = [folder / "left", folder / "right"]
    processes = [
        subprocess.Popen([sys.executable, __file__, *words(args, args.batch // 2, result)], env=ONE_THREAD)
        for result in results
    ]
    if any([process.wait() for process in processes]):  # noqa: C419 (all are waited for)
        raise SystemExit("a process failed")
    return max(float(result.read_text()) for result in results)


def words(args: argparse.Namespace, batch: int, result: Path) -> list[str]:
    return ["--encoder", args.encoder, "--size", str(args.size), "--batch", str(batch), "--result", str(result)]


if __name__ == "__main__":
    main()
