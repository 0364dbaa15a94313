"""Two processes of one thread each against one of one thread: the same global batch, `moco pretrain`'s own step.

    python benchmarks/processes.py [--encoder small_resnet --size 32 --batch 128]

Each count is started anew by torchrun, in turns.
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
    ratios = []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(ROUNDS):
            seconds = {}
            for count in (1, 2):
                result = Path(folder) / str(count)
                torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(count)]
                subprocess.run(
                    [*torchrun, __file__, *sys.argv[1:], "--result", str(result)], check=True,
                    stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"},
                )  # fmt: skip
                seconds[count] = float(result.read_text())
            ratios.append(seconds[1] / seconds[2])
            rates = ", ".join(f"{count}: {args.batch / each:.0f} images/s" for count, each in seconds.items())
            print(f"processes {rates}; ratio {ratios[-1]:.2f}")
    print(
        f"{args.encoder}, {args.size} px, batch {args.batch}: two processes {statistics.median(ratios):.2f} times one"
    )


if __name__ == "__main__":
    main()
