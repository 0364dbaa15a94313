"""The pipeline's work beside the same work in the original's design (original.py), measured in turns.

    python benchmarks/speed.py step --encoder resnet50 --size 96 --batch 64
    python benchmarks/speed.py step --encoder resnet18 --size 32 --batch 256 --imagenet-stem
    python benchmarks/speed.py input --size 96
    python benchmarks/speed.py linear --size 32

`step`: one optimizer step of MoCo v2, with the rate of the machine's matrix products beside it. `input`: from the
files (the baseline) or the decoded cache to two views of a normalised batch. `linear`: the classifier of 5,000 labelled
images over 200 epochs; the baseline's time is that of two epochs, times 100.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import original
import torch
from PIL import Image
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from moco.data.batches import EpochSampler, Fetcher, step_generator
from moco.data.cache import DecodedSplit
from moco.encoders.architecture import Architecture
from moco.encoders.encoder import build_encoder, feature_width, strip_head
from moco.methods.momentum_contrast import MomentumContrast
from moco.methods.step import ContrastStep
from moco.settings.pretrain import PretrainConfig
from moco.settings.train import TrainConfig
from moco.stages.train import feature_sets
from moco.training.distributed import SINGLE_PROCESS, DistributedContext
from moco.training.linear import fit_linear
from moco.training.numerics import autocast, choose_precision, matmul_rate, set_up
from moco.views.views import Views, recipe

CPU = torch.device("cpu")
QUEUE = 4096
BATCHES = 8  # of an epoch of `input`


def settings(**changes: Any) -> PretrainConfig:
    """Section `pretrain`, by default that of the first CIFAR-10 preset; as a type, since a GPU may lack PyYAML."""
    values: dict[str, Any] = {
        "width": 24, "stages": 4, "dim": original.DIM, "queue": QUEUE, "temperature": original.TEMPERATURE,
        "crop_scale": (0.2, 1.0), "epochs": 200, "lr": 0.03, "warmup": 0.0,
    }  # fmt: skip
    return PretrainConfig(**values | changes)


def contrast_step(
    encoder: str, size: int, batch: int, images: int, processes: DistributedContext = SINGLE_PROCESS
) -> tuple[ContrastStep, Tensor]:
    """`moco pretrain`'s own step on the CPU with its views, and images to call it with. batch: of the settings, of all
    processes; images: of this one, B x H x W x 3 bytes."""
    views = Views(recipe("v2_no_blur", (0.2, 1.0), (0.1, 2.0)), size, original.MEAN, original.STD, CPU)
    config = settings(encoder=encoder, stem="small" if size <= 40 else "imagenet", batch_size=batch)
    step = ContrastStep(config, views, CPU, choose_precision("auto", CPU), images * processes.size, processes)
    return step, torch.randint(0, 256, (images, size, size, 3), dtype=torch.uint8)


class OurStep:
    """The step as stage `pretrain` takes it."""

    def __init__(self, architecture: Architecture) -> None:
        self.model = MomentumContrast(
            build_encoder(architecture, 1), dim=original.DIM, queue_length=QUEUE, temperature=original.TEMPERATURE,
            mlp=True, symmetric=False, shuffle=False,
        ).to(memory_format=torch.channels_last)  # fmt: skip
        parameters = self.model.query_encoder.parameters()
        self.optimizer = torch.optim.SGD(parameters, 0.06, momentum=0.9, weight_decay=5e-4, fused=True)
        self.precision = choose_precision("auto", CPU)

    def __call__(self, a: Tensor, b: Tensor) -> None:
        with autocast(CPU, self.precision):
            contrast = self.model(a, b)
        contrast.loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.model.update(contrast.keys, 0.99)


def alternate(
    first: Callable[[], object], second: Callable[[], object], rounds: int
) -> tuple[list[float], list[float]]:
    """Seconds of both, called in turns after a warm-up of two."""
    spent: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds + 2):
        for function, times in zip((first, second), spent, strict=True):
            began = time.perf_counter()
            function()
            times.append(time.perf_counter() - began)
    return spent[0][2:], spent[1][2:]


def tell(name: str, work: int, spent: tuple[list[float], list[float]]) -> None:
    """work: images in one call. The ratio is the median of the rounds' own."""
    theirs, ours = (work / statistics.median(times) for times in spent)
    ratio = statistics.median(a / b for a, b in zip(*spent, strict=True))
    print(f"{name}: baseline {theirs:.1f} images/s, ours {ours:.1f} images/s, ratio {ratio:.2f}")


def step(args: argparse.Namespace) -> None:
    stem = "small" if args.size <= 40 and not args.imagenet_stem else "imagenet"
    architecture = Architecture(args.encoder, stem, args.width, args.stages)
    a, b = torch.randn(2, args.batch, 3, args.size, args.size)
    x, y = (t.contiguous(memory_format=torch.channels_last) for t in (a, b))
    theirs, ours = original.Step(build_encoder(architecture, 1), QUEUE), OurStep(architecture)
    with FlopCounterMode(display=False) as counter:
        ours(x, y)
    spent = alternate(lambda: theirs(a, b), lambda: ours(x, y), args.rounds)
    tell(f"step, {args.encoder}, {stem} stem, {args.size} px, batch {args.batch}, {ours.precision}", args.batch, spent)
    rate, peak = counter.get_total_flops() / statistics.median(spent[1]) / 1e9, matmul_rate(CPU, ours.precision) / 1e9
    print(f"  {counter.get_total_flops() / args.batch / 1e9:.2f} GFLOP an image; ours {rate:.0f} GFLOP/s, "
          f"matrix products {peak:.0f} ({ours.precision}) and {matmul_rate(CPU, torch.float32) / 1e9:.0f} (fp32): "
          f"{rate / peak:.0%} of the peak")  # fmt: skip


def write_images(folder: Path, count: int, size: int) -> np.ndarray:
    """Smooth random images as 0.png, …, as noise would decode unlike photographs; returns them, N x H x W x 3."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    images = np.empty((count, size, size, 3), np.uint8)
    for i in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).resize(
            (size, size), Image.Resampling.BICUBIC
        )
        images[i] = np.clip(np.asarray(coarse, int) + rng.integers(-8, 9, (size, size, 3)), 0, 255)
        Image.fromarray(images[i]).save(folder / f"{i}.png")
    return images


def epochs_on_request(side: str, folder: Path, size: int, batch: int, requests: Connection) -> None:
    """A process of its own for one side of `input`: an epoch for each request, until the pipe is closed.

    The baseline's workers are forked, after which a process pays for writing to each page of its memory: ours is not to
    pay for theirs."""
    multiprocessing.set_start_method("fork", force=True)  # for the baseline's workers, though this one was spawned
    set_up(CPU, 0)
    images = np.load(folder / "images.npy")
    views = Views(recipe("v2", (0.2, 1.0), (0.1, 2.0)), size, original.MEAN, original.STD, CPU)
    sampler, fetcher = EpochSampler(np.arange(len(images)), batch, 0), Fetcher(images, pin=False)
    loader = original.load(original.TwoViews(folder / "unlabeled", len(images), size), batch)

    def ours() -> Iterator[object]:
        for number, (_, fetched) in enumerate(fetcher.batches(sampler.epoch(0))):
            generator, unit = step_generator(0, number), views.to_unit(fetched)
            yield views(unit, generator), views(unit, generator)

    with contextlib.suppress(EOFError):  # nobody asks any more
        while requests.recv():
            requests.send(sum(1 for _ in (ours() if side == "ours" else loader)))


def inputs(args: argparse.Namespace) -> None:
    """Both run all the time in a training; here each is asked for an epoch while the other waits."""
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as place:
        images = write_images(Path(place) / "unlabeled", BATCHES * args.batch, args.size)
        np.save(Path(place) / "images.npy", images)
        sides = []
        for side in ("baseline", "ours"):
            here, there = spawn.Pipe()
            what = side, Path(place), args.size, args.batch, there
            sides.append((here, spawn.Process(target=epochs_on_request, args=what)))
            sides[-1][1].start()
            there.close()  # so that a process that has ended is noticed

        def epoch(requests: Connection) -> Callable[[], object]:
            return lambda: (requests.send(True), requests.recv())

        try:
            spent = alternate(epoch(sides[0][0]), epoch(sides[1][0]), args.rounds)
        finally:
            for requests, process in sides:
                requests.close()
                process.join()
        tell(f"input, two v2 views, {args.size} px, batch {args.batch}", len(images), spent)


def linear(args: argparse.Namespace) -> None:
    architecture = Architecture(args.encoder, "small" if args.size <= 40 else "imagenet", args.width, args.stages)
    network = build_encoder(architecture, 1)
    width, body = feature_width(network), strip_head(network).eval()
    config = TrainConfig(
        solver="sgd", epochs=200, batch_size=512, lr=30.0 / 2, sgd_momentum=0.9, weight_decay=0.0, schedule="step",
        warmup=0.0, milestones=(0.3, 0.4, 0.6, 0.8), features="last", feature_scaling="none", views=args.views,
        holdout=0.1, refit=False, seed=0,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as place:
        images = write_images(Path(place) / "train", 5000, args.size)
        labels = torch.arange(len(images)) % 10
        spent: list[float] = []
        began = time.perf_counter()
        original.linear_epochs(body, width, Path(place), labels, args.size, 10, 2, 200,
                               lambda *_: spent.append(time.perf_counter()))  # fmt: skip
        theirs = 100 * (spent[-1] - began)
    began = time.perf_counter()
    views = Views(recipe("crop", (0.2, 1.0), (0.1, 2.0)), args.size, original.MEAN, original.STD, CPU)
    part = DecodedSplit(images, labels.numpy(), np.empty((0, 16), np.uint8))
    stack = feature_sets(body, [part], views, config, CPU, choose_precision("auto", CPU))
    fit_linear(stack[:, 500:], labels[500:], stack[0, :500], labels[:500], 10, config, lambda *_: None)
    ours = time.perf_counter() - began
    print(f"linear, {args.encoder}, {args.size} px, {args.views} views, 200 epochs: baseline {theirs:.0f} s (two "
          f"epochs, times 100), ours {ours:.1f} s, ratio {theirs / ours:.0f}")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", choices=["step", "input", "linear"])
    parser.add_argument("--encoder", default="small_resnet")
    parser.add_argument("--imagenet-stem", action="store_true", help="below 40 pixels as well")
    for name, value in (("size", 32), ("batch", 256), ("rounds", 5), ("width", 24), ("stages", 4), ("views", 8)):
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    print(
        f"torch {torch.__version__}, {platform.machine()}, {torch.get_num_threads()} threads, {commit.stdout.strip()}"
    )
    set_up(CPU, 0)  # of the baseline as well
    {"step": step, "input": inputs, "linear": linear}[args.work](args)


if __name__ == "__main__":
    main()
