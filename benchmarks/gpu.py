"""Pretraining on one GPU beside the original's design on the same one, and what the original's job would take.

    PYTHONPATH=src python benchmarks/gpu.py [--encoder resnet50 --size 96 --batch 512 --queue 2048 --splits 2]

Needs torch and torchvision alone. Ours is the whole step of `moco pretrain`: images from memory to the GPU, two views
made there, forward and backward pass, update. Of the original's design both the step alone, on images that lie on the
GPU, and its loader in two workers are measured; a training runs at the slower one's rate.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import original
import torch
from speed import settings, write_images
from torch.profiler import ProfilerActivity, profile

from moco.data.batches import EpochSampler, Fetcher
from moco.encoders.architecture import Architecture
from moco.encoders.encoder import build_encoder
from moco.methods.step import ContrastStep, pass_flops
from moco.training.numerics import choose_device, choose_precision, clock, matmul_rate, set_up
from moco.views.views import Views, recipe

POOL, EPOCHS = 512_000, 100  # images and epochs of the original's job
REPEATS = 16  # of the images that are written
WARM_UP = {"cuda": 20, "cpu": 3}  # steps, in which kernels are chosen, memory is page-locked and a GPU's clock rises


def rate(call: Callable[[], object], images: int, device: torch.device, calls: int) -> float:
    """Images a second, the median of `calls` after a warm-up."""
    spent = []
    for _ in range(calls + WARM_UP[device.type]):
        began = clock(device)
        call()
        spent.append(clock(device) - began)
    return images / statistics.median(spent[WARM_UP[device.type] :])


def ours(
    args: argparse.Namespace, device: torch.device, precision: torch.dtype, images: np.ndarray
) -> tuple[float, float, int]:
    """(images a second, share of the time that was waited for images, FLOP a step). The GPU is not waited for within
    the measured steps, as in a training."""
    split = {"batch_norm": "split", "splits": args.splits, "shuffle": True} if args.splits > 1 else {}
    config = settings(
        encoder=args.encoder, stem=args.stem, queue=args.queue, momentum=0.999, augmentation="v2", epochs=EPOCHS,
        batch_size=args.batch, weight_decay=1e-4, precision=args.precision, **split,
    )  # fmt: skip
    views = Views(recipe("v2", (0.2, 1.0), (0.1, 2.0)), args.size, original.MEAN, original.STD, device)
    step = ContrastStep(config, views, device, precision, cuda_graphs=not args.no_graphs,
                        own_kernels=not args.torch_batch_norm)  # fmt: skip
    flops = pass_flops(step, args.size, args.batch)
    repeated = np.concatenate([images] * REPEATS)  # epochs as long as a training's
    sampler = EpochSampler(np.arange(len(repeated)), args.batch, 0)
    fetcher = Fetcher(repeated, pin=device.type == "cuda")
    batches = (batch for epoch in itertools.count() for batch in fetcher.batches(sampler.epoch(epoch)))
    start = clock(device)
    for number in range(WARM_UP[device.type]):
        step(*next(batches), 0.0, number)
    began, waited = clock(device), fetcher.waited
    print(f"the first {WARM_UP[device.type]} steps took {began - start:.1f} s")
    for number in range(args.calls):
        step(*next(batches), 0.0, number)
    spent = clock(device) - began
    if args.kernels:
        show_kernels(lambda: [step(*next(batches), 0.0, number) for number in range(4)])
    return args.calls * args.batch / spent, (fetcher.waited - waited) / spent, flops


def show_kernels(call: Callable[[], object]) -> None:
    """What the GPU is busy with, the 15 that take most of its time."""
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as found:
        call()
        torch.cuda.synchronize()
    kernels = sorted(found.key_averages(), key=lambda event: -event.self_device_time_total)
    busy = sum(event.self_device_time_total for event in kernels)
    for event in kernels[:15]:
        print(f"  {event.self_device_time_total / busy:5.1%} {event.count:5} {event.key[:90]}")
    print(f"  busy for {busy / 1e3:.1f} ms")


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--encoder", default="resnet50")
    parser.add_argument("--stem", default="imagenet")
    parser.add_argument("--precision", default="auto")
    parser.add_argument(
        "--deterministic", action="store_true", help="as runtime.deterministic; compare with a run without"
    )
    parser.add_argument("--no-graphs", action="store_true", help="as runtime.cuda_graphs: false")
    parser.add_argument("--kernels", action="store_true", help="which kernels take the time, once it is measured")
    parser.add_argument("--torch-batch-norm", action="store_true", help="as runtime.gpu_kernels: false")
    for name, value in (("size", 96), ("batch", 512), ("queue", 2048), ("splits", 2), ("calls", 100)):
        parser.add_argument(f"--{name}", type=int, default=value)
    return parser.parse_args()


def theirs(args: argparse.Namespace, device: torch.device, folder: Path, count: int) -> tuple[float, float]:
    """Images a second of the step alone, and of the loader alone."""
    step = original.Step(build_encoder(Architecture(args.encoder, args.stem, 24, 4), 1), args.queue, device)
    a, b = torch.randn(2, args.batch, 3, args.size, args.size, device=device)
    alone = rate(lambda: step(a, b), args.batch, device, min(args.calls, 10))
    loader = original.load(original.TwoViews(folder, count, args.size), args.batch)
    began = time.perf_counter()
    batches = sum(1 for _ in loader)
    return alone, batches * args.batch / (time.perf_counter() - began)


def main() -> None:
    args = options()
    device = choose_device(args.device)
    set_up(device, 0, args.deterministic)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    precision = choose_precision(args.precision, device)
    print(f"torch {torch.__version__}, {name}; {args.encoder}, {args.size} px, batch {args.batch}, {precision}")
    with tempfile.TemporaryDirectory() as place:
        images = write_images(Path(place), 4 * args.batch, args.size)
        mine, waited, flops = ours(args, device, precision, images)
        peak = matmul_rate(device, precision)
        print(f"ours: {mine:.0f} images/s, {flops * mine / args.batch / peak:.0%} of what matrix products reach "
              f"({peak / 1e12:.1f} TFLOP/s), {waited:.1%} of the time waiting for images")  # fmt: skip
        if device.type == "cuda":
            print(f"  at most {torch.cuda.max_memory_reserved(device) / 1e9:.1f} GB of the GPU's memory")
        alone, loaded = theirs(args, device, Path(place), len(images))
    print(f"the original's design: step {alone:.0f} images/s, loader in two workers {loaded:.0f} images/s")
    print(f"ratio: {mine / min(alone, loaded):.1f} in all, {mine / alone:.1f} of the step alone")
    for who, images_per_second in (("ours", mine), ("the original's design", min(alone, loaded))):
        epoch = POOL / images_per_second
        print(f"{who}: an epoch of {POOL:,} images {epoch / 60:.1f} min, {EPOCHS} epochs {EPOCHS * epoch / 3600:.1f} h")


if __name__ == "__main__":
    main()
