"""What tracking costs a training: the same steps with a run that logs and delivers to MLflow, and without, in turns.

    python benchmarks/tracking.py [--rounds 5] [--seconds 20] [--every 10]

A round with tracking begins to count when the process beside the run has imported MLflow and delivered for the first
time, which takes seconds of another core once in a run; how long is told as well. On a machine whose speed drifts by
more than tracking costs, the ratio says little: what the process beside the run takes of the processors is told too.
"""

from __future__ import annotations

import argparse
import contextlib
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import torch
import torch.nn.functional as F

from moco.encoders.small_resnet import SmallResNet
from moco.settings.tracking import TrackingConfig
from moco.tracking.origin import UNKNOWN
from moco.tracking.run import Run

BATCH, SIZE, WIDTH, CLASSES = 256, 32, 16, 10


def steps_per_second(step: Callable[[], float], seconds: float, every: int, log: Callable[[float, int], None]) -> float:
    count, began = 0, time.perf_counter()
    while time.perf_counter() - began < seconds:
        loss = step()
        count += 1
        if count % every == 0:
            log(loss, count)
    return count / (time.perf_counter() - began)


def tracked(folder: Path, step: Callable[[], float], seconds: float, every: int) -> tuple[float, float, float]:
    """(steps a second, seconds until MLflow was there, share of all processors that the process beside took)."""
    config = TrackingConfig(uri=f"sqlite:///{folder.parent}/mlflow.db", experiment="benchmark", registered_model="none")
    with Run(folder, "benchmark", config, print) as run:
        began = time.perf_counter()
        run.start({}, UNKNOWN)
        while not (folder / "mlflow.json").exists():
            time.sleep(0.1)
        ready = time.perf_counter() - began

        def log(loss: float, count: int) -> None:
            run.log({"loss": loss, "lr": 0.1, "images_per_second": 1.0 * count, "minutes": 0.1 * count}, count)

        assert run.process is not None
        beside = psutil.Process(run.process.pid)
        before = sum(beside.cpu_times()[:2])
        speed = steps_per_second(step, seconds, every, log)
        return speed, ready, (sum(beside.cpu_times()[:2]) - before) / seconds / (psutil.cpu_count() or 1)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--every", type=int, default=10)
    options = parser.parse_args()
    network = SmallResNet(CLASSES, WIDTH, 4, 1)
    optimizer = torch.optim.SGD(network.parameters(), 0.01)
    images, labels = torch.randn(BATCH, 3, SIZE, SIZE), torch.randint(CLASSES, (BATCH,))

    def step() -> float:
        optimizer.zero_grad()
        loss = F.cross_entropy(network(images), labels)
        loss.backward()
        optimizer.step()
        return loss.item()

    ratios, waits, shares = [], [], []
    with tempfile.TemporaryDirectory() as place, contextlib.suppress(KeyboardInterrupt):
        steps_per_second(step, 3, options.every, lambda *_: None)
        for number in range(options.rounds):
            off = steps_per_second(step, options.seconds, options.every, lambda *_: None)
            on, ready, share = tracked(Path(place) / str(number), step, options.seconds, options.every)
            again = steps_per_second(step, options.seconds, options.every, lambda *_: None)
            ratios.append(on / ((off + again) / 2))
            waits.append(ready)
            shares.append(share)
            print(f"round {number + 1}: off {off:.2f}, on {on:.2f}, off {again:.2f} steps/s: ratio {ratios[-1]:.4f}")
    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"tracking on / off: median {statistics.median(ratios):.4f}; ready after {statistics.median(waits):.1f} s; "
          f"beside the run, {statistics.median(shares):.2%} of the processors")  # fmt: skip


if __name__ == "__main__":
    main()
