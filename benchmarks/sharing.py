"""Two trainings at once on the same cores, whose threads wait for each other awake or asleep (moco/accel/openmp.py).

    python benchmarks/sharing.py [--size 32 --batch 128]

Every process takes `moco pretrain`'s own step (small_resnet), with as many threads as there are cores, for so many
seconds; ways take turns, and the rates are medians over the rounds.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time

import numpy as np
import torch
from speed import contrast_step

from moco.accel.openmp import SETTINGS, SPINS
from moco.training.numerics import set_up

CPU = torch.device("cpu")
AWAKE, ASLEEP = "awake", "asleep"
WAYS = ((AWAKE,), (ASLEEP,), (AWAKE, AWAKE), (AWAKE, ASLEEP), (ASLEEP, ASLEEP))


def work(args: argparse.Namespace) -> None:
    """One of the processes: gets ready, begins with the others, prints images a second."""
    set_up(CPU, 0)
    step, images = contrast_step("small_resnet", args.size, args.batch, args.batch)
    order = np.arange(args.batch)
    step(order, images, 0.0, 0)
    print("ready", flush=True)
    sys.stdin.readline()
    began, steps = time.perf_counter(), 0
    while (passed := time.perf_counter() - began) < args.seconds:
        step(order, images, 0.0, steps)
        steps += 1
    print(steps * args.batch / passed, flush=True)


def measure(way: tuple[str, ...]) -> list[float]:
    """Images a second of each process."""
    environment = {name: value for name, value in os.environ.items() if name not in {*SETTINGS, "OMP_NUM_THREADS"}}
    ours = [
        subprocess.Popen(
            [sys.executable, *sys.argv, "--work"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=environment | ({"GOMP_SPINCOUNT": SPINS} if waits == ASLEEP else {}),
        )
        for waits in way
    ]  # fmt: skip
    for process in ours:
        assert process.stdout
        if process.stdout.readline() != "ready\n":
            raise SystemExit("a process ended before it began")
    for process in ours:
        assert process.stdin
        print(file=process.stdin, flush=True)
    return [float(process.communicate()[0]) for process in ours]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        work(args)
        return
    found: dict[tuple[str, ...], list[list[float]]] = {way: [] for way in WAYS}
    for _ in range(args.rounds):
        for way in WAYS:
            found[way].append(measure(way))
    alone = statistics.median(sum(rates) for rates in found[AWAKE,])
    print(f"small_resnet, {args.size} pixels, batch {args.batch}, {torch.get_num_threads()} threads a process")
    for way, rounds in found.items():
        each = [statistics.median(rates) for rates in zip(*rounds, strict=True)]
        rates = " and ".join(f"{rate:,.0f}" for rate in each)
        print(f"{', '.join(way):16} {rates} images/s: {sum(each) / alone:.2f} of one alone, awake")


if __name__ == "__main__":
    main()
