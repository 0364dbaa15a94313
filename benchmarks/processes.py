"""Two processes of one thread each against one of one thread: the same global batch, `moco pretrain`'s own step.

    python benchmarks/processes.py [--encoder small_resnet --size 32 --batch 128]

The same two processes take some steps in turns: one alone with the whole batch while the other waits; both together;
both apart, half of the batch each at the same time without a word to each other, which is the most that this machine
could give two. Turns take seconds, as a machine that others use as well gives something else a minute later.
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
import torch.distributed as dist
from speed import contrast_step

from moco.training.distributed import SINGLE_PROCESS, DistributedContext, end_process, from_environment
from moco.training.numerics import set_up

CPU = torch.device("cpu")


class Turn:
    """Some steps of a process in one of the ways that are compared. images: of this process; 0 waits for the others."""

    def __init__(self, args: argparse.Namespace, processes: DistributedContext, images: int) -> None:
        self.step, self.images = contrast_step(args.encoder, args.size, args.batch, images, processes)

    def __call__(self, steps: int) -> float:
        """Seconds of a step: all begin together, and the last to end counts."""
        dist.barrier()
        began = time.perf_counter()
        for number in range(steps if len(self.images) else 0):
            self.step(np.arange(len(self.images)), self.images, 0.0, number)
        self.step.flush_pending_update()
        dist.barrier()
        return (time.perf_counter() - began) / steps


def work(args: argparse.Namespace) -> None:
    """One of the two processes; rank 0 prints."""
    set_up(CPU, 1)
    processes = from_environment()
    with processes.process_group(CPU):
        turns = {
            "one": Turn(args, SINGLE_PROCESS, 0 if processes.rank else args.batch),
            "together": Turn(args, processes, args.batch // 2),
            "apart": Turn(args, SINGLE_PROCESS, args.batch // 2),
        }
        for turn in turns.values():
            turn(2)  # memory is given out
        rounds = [{name: turn(args.steps) for name, turn in turns.items()} for _ in range(args.rounds)]
    if processes.rank == 0:
        for seconds in rounds:
            print("ms a step:", ", ".join(f"{name} {1000 * spent:.0f}" for name, spent in seconds.items()))
        print(f"{args.encoder}, {args.size} px, batch {args.batch}: two processes", ", ".join(
            f"{name} {statistics.median(each['one'] / each[name] for each in rounds):.2f} times one"
            for name in ("together", "apart")))  # fmt: skip
    end_process(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", default="small_resnet")
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--steps", type=int, default=5, help="in a turn")
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    if "RANK" in os.environ:
        work(args)
        return
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", *sys.argv]
    raise SystemExit(subprocess.run(torchrun, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}).returncode)


if __name__ == "__main__":
    main()
